"""The simulation that layers are fitted in is what ONNX Runtime computes, and errors are made good in layer order."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from admth_calibration.lockstep import IntegerLayer, fit_layers


@pytest.mark.parametrize("target", ["cpu", "trt"])
@pytest.mark.parametrize("backbone", ["lite", "cnnf"])
def test_the_simulation_is_what_onnx_runtime_computes(case, candidate, run_model, backbone, target):
    """Integers that were fitted before are given back, and every layer's input is held to that of the model."""
    found, made = case(backbone), candidate(backbone, target)
    recipe = found.recipe(target)
    pixels = found.pixels[:8]
    inputs = {}

    def known(given):
        inputs[given.layer.name] = given.affine.quantize(given.rounded)
        return made.integers[given.layer.name]

    fit_layers(
        recipe.graph, recipe.layers, recipe.places(recipe.layers), made.affines, pixels, known, correct_bias=False
    )
    names = {name: f"{layer.source}.int8" for name, layer in recipe.layers.items()}
    kind = int(onnx.TensorProto.INT8 if target == "trt" else onnx.TensorProto.UINT8)
    wanted = dict(
        zip(
            names,
            run_model(made.model, list(names.values()), pixels, **dict.fromkeys(names.values(), kind)),
            strict=True,
        )
    )
    assert inputs.keys() == wanted.keys()
    for name, integers in wanted.items():
        assert inputs[name].dtype == integers.dtype
        different = inputs[name].astype(int) - integers.astype(int)
        # Sums fall on the edge between two integers now and then, and every layer carries that further. ONNX Runtime
        # with its optimisers and without them differs as much.
        assert np.abs(different).mean() < 1.0, name
    for name in list(names)[:3]:
        assert (inputs[name] != wanted[name]).mean() < 3e-3, name


def test_layers_are_fitted_in_order_with_progress(case):
    found = case("cnnf")
    recipe = found.recipe("trt", "nearest")
    steps, seen = [], []

    def watch(given):
        seen.append(given.layer.name)
        return recipe.fitter(given)

    places = recipe.places(recipe.layers)
    fitted = fit_layers(
        recipe.graph,
        recipe.layers,
        places,
        recipe.affines(places),
        found.pixels[:4],
        watch,
        correct_bias=True,
        advance=steps.append,
    )
    assert seen == list(fitted) == list(recipe.layers)
    assert steps == [1] * len(seen)


def test_biases_make_means_right_behind_each_layer(case):
    found = case("lite")
    errors = {}
    for correct in (False, True):
        recipe = found.recipe("trt", "nearest", correct_bias=correct)
        wrong = []

        def watch(given, recipe=recipe, wrong=wrong):
            if given.layer.name == "first.0":
                shift = given.rounded.mean(axis=0) - given.exact.mean(axis=0)
                wrong.append(np.abs(shift).mean() / np.abs(given.exact).mean())
            return recipe.fitter(given)

        places = recipe.places(recipe.layers)
        fit_layers(
            recipe.graph, recipe.layers, places, recipe.affines(places), found.pixels[:16], watch, correct_bias=correct
        )
        errors[correct] = wrong[0]
    assert errors[True] < 0.5 * errors[False]


def test_a_layer_alone_has_its_own_bias(case, candidate, run_model):
    """Where everything before is float, a bias that makes good for it would do harm."""
    found, whole = case("lite"), candidate("lite", "trt")
    recipe = found.recipe("trt")
    exact = run_model(found.model, found.graph.logits, found.pixels)
    errors = []
    for name in ("trunk.head.conv", "first.0"):
        layer = whole.integers[name]
        for chosen in (layer, layer.alone()):
            logits = run_model(recipe.reuse({name: chosen}).model, found.graph.logits, found.pixels)
            errors.append(np.mean([np.square(a - b).mean() for a, b in zip(logits, exact, strict=True)]))
    assert errors[1] < 0.5 * errors[0]
    assert errors[3] < 0.5 * errors[2]


def test_integers_stand_for_their_weight(case):
    layer = case("cnnf").recipe("cpu").layers["trunk.conv1"]
    values = np.arange(-6, 6, dtype=np.int8).reshape(2, 3, 1, 2)
    bias = np.zeros(2, dtype=np.float32)
    found = IntegerLayer(values, np.float32([2, 0.5]), bias, bias).weight(layer)
    np.testing.assert_array_equal(found[0], values[0] * 2.0)
    np.testing.assert_array_equal(found[1], values[1] * 0.5)
