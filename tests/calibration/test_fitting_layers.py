"""How a layer's integers are chosen from what it gets: better ways make its output better."""

from __future__ import annotations

import numpy as np
import pytest

from admth_calibration.fitting_layers import LayerFitter
from admth_calibration.lockstep import fit_layers
from admth_calibration.options import ROUNDINGS


@pytest.fixture(scope="module")
def inputs(case):
    """Give what layers are fitted on, from one pass with nearest rounding, by backbone."""
    found = {}

    def get(backbone, layer):
        if backbone not in found:
            recipe = case(backbone).recipe("cpu", "nearest")
            places, seen = recipe.places(recipe.layers), {}

            def watch(given):
                seen[given.layer.name] = given
                return recipe.fitter(given)

            pixels = case(backbone).pixels
            fit_layers(recipe.graph, recipe.layers, places, recipe.affines(places), pixels, watch, correct_bias=True)
            found[backbone] = seen
        return found[backbone][layer]

    return get


def error_of(given, chosen, run_node):
    """Mean squared error of the layer's output, apart from what a bias makes good."""
    layer = given.layer
    wrong = run_node(given, chosen.weight(layer)) - run_node(given, given.weight)
    axes = tuple(axis for axis in range(wrong.ndim) if axis != 1)
    return float(wrong.var(axis=axes).mean()), float(np.square(wrong.mean(axis=axes)).mean())


@pytest.fixture(scope="module")
def run_node():
    """Apply a layer without its bias, as plain sums over windows."""

    def run(given, weight):
        values, layer = given.rounded[:12], given.layer
        if layer.kind == "dense":
            return values @ layer.rows(weight).T
        attributes = layer.attributes()
        top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
        step = attributes.get("strides", [1, 1])
        padded = np.pad(values, ((0, 0), (0, 0), (top, bottom), (left, right)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(2, 3))
        windows = windows[:, :, :: step[0], :: step[1]]
        if layer.kind == "depthwise":
            return np.einsum("nchwij,cij->nchw", windows, weight[:, 0], optimize=True)
        return np.einsum("nchwij,ocij->nohw", windows, weight, optimize=True)

    return run


@pytest.mark.parametrize(
    ("backbone", "name"),
    [
        ("lite", "trunk.stem.conv"),
        ("lite", "trunk.blocks.1.depthwise.conv"),
        ("lite", "trunk.blocks.3.depthwise.conv"),  # of 5x5
        ("lite", "trunk.blocks.2.project.conv"),
        ("cnnf", "trunk.conv1"),  # of 11x11 with strides
        ("cnnf", "attention.squeeze"),
    ],
)
def test_gptq_makes_the_least_error(inputs, run_node, backbone, name):
    given = inputs(backbone, name)
    errors = {}
    for rounding in ROUNDINGS:
        chosen = LayerFitter(rounding)(given)
        assert chosen.values.shape == given.weight.shape
        assert chosen.values.dtype == np.int8
        assert chosen.scales.shape == given.bias.shape
        np.testing.assert_array_equal(chosen.bias, given.bias)
        errors[rounding] = error_of(given, chosen, run_node)
    spread, shift = ({rounding: values[part] for rounding, values in errors.items()} for part in (0, 1))
    assert sum(errors["gptq"]) < 0.75 * sum(errors["nearest"]), errors
    if given.exact.min() >= 0:  # behind a ReLU, where errors add up
        assert shift["zero-sum"] < 0.5 * shift["nearest"], errors
    assert spread["zero-sum"] < 2 * spread["nearest"], errors


def test_fitting_is_repeatable_and_follows_its_options(inputs):
    given = inputs("lite", "trunk.blocks.1.depthwise.conv")
    first, again = LayerFitter()(given), LayerFitter()(given)
    np.testing.assert_array_equal(first.values, again.values)
    np.testing.assert_array_equal(first.scales, again.scales)
    reduced = LayerFitter(largest=63)(given)
    assert np.abs(reduced.values.astype(int)).max() == 63
    half = LayerFitter(half=True)(given)
    assert (half.scales.astype(np.float16).astype(np.float32) == half.scales).all()
    # Finer scales than the largest weight asks for are tried, and the best of all is kept.
    plain = LayerFitter("nearest")(given)
    assert (first.scales <= plain.scales * 1.0001).all()
    assert (first.scales < 0.999 * plain.scales).any()


def test_images_that_count_more_are_fitted_better(inputs, run_node):
    given = inputs("lite", "trunk.blocks.2.project.conv")
    weights = np.full(len(given.rounded), 0.01, dtype=np.float32)
    weights[:3] = 10.0

    def error(chosen):
        wrong = run_node(given, chosen.weight(given.layer)) - run_node(given, given.weight)
        return float(np.square(wrong[:3]).mean())

    assert error(LayerFitter(weights=weights)(given)) < 0.95 * error(LayerFitter()(given))
