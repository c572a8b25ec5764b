"""What is seen of tensors, in bounded memory, and the ranges that the methods choose from it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from admth_calibration.affine import asymmetric_u8, symmetric_s8
from admth_calibration.observing import POINTS, Observation, channel_extremes, observe
from admth_calibration.thresholds import METHODS, choose_range
from admth_runtime.errors import ModelError


def observation(values):
    values = np.asarray(values, dtype=np.float32)
    low, high = float(values.min()), float(values.max())
    counts = np.zeros(POINTS, dtype=np.int64)
    width = max(high - low, 1e-30)
    np.add.at(counts, np.rint((values - low) / width * (POINTS - 1)).astype(int), 1)
    return Observation(low, high, counts)


def error(values, affine):
    return float(np.square(affine.round(np.asarray(values, dtype=np.float32)) - values).mean())


class TestObserving:
    def test_extremes_and_counts_are_those_of_the_values(self, case, run_model):
        found = case("cnnf")
        names = ["relu_1", "div"]
        seen = observe(found.graph.model, names, lambda: iter(np.split(found.pixels, 3)), histograms=True)
        values = run_model(found.graph.model, names, found.pixels, **dict.fromkeys(names, 1))
        for name, tensor in zip(names, values, strict=True):
            assert (seen[name].low, seen[name].high) == pytest.approx((tensor.min(), tensor.max()), rel=1e-5)
            assert seen[name].counts.sum() == tensor.size
            step = (seen[name].high - seen[name].low) / (POINTS - 1)
            mean = seen[name].counts @ seen[name].points.astype(np.float64) / tensor.size
            assert mean == pytest.approx(tensor.mean(), abs=step)
            # Values that are exactly zero are counted where they are, not in a bin beside it.
            zeros = (tensor == 0).sum()
            assert zeros <= seen[name].counts[0] <= zeros + (tensor < step).sum()

    def test_it_does_not_depend_on_the_batches(self, case):
        found = case("lite")
        names = ["relu6", "conv2d_2", "mean_1_1"]
        whole, parts = (
            observe(found.graph.model, names, lambda batches=batches: iter(batches), histograms=True)
            for batches in ([found.pixels[:20]], np.split(found.pixels[:20], [7, 8]))
        )
        for name in names:
            assert (parts[name].low, parts[name].high) == pytest.approx((whole[name].low, whole[name].high), abs=1e-4)
            assert np.abs(parts[name].counts - whole[name].counts).sum() < 0.02 * whole[name].counts.sum()

    def test_one_batch_is_held_at_a_time(self, case):
        """A pass asks for a batch only when nothing but its own loop holds the one before."""
        found = case("cnnf")
        alive, most, passes = [0], [0], [0]

        class Batch(np.ndarray):
            def __del__(self):
                if getattr(self, "counted", False):
                    alive[0] -= 1

        def batches():
            passes[0] += 1
            for pixels in np.split(found.pixels[:12], 6):
                batch = pixels.copy().view(Batch)
                batch.counted = True
                alive[0] += 1
                most[0] = max(most[0], alive[0])
                yield batch
                del batch

        observe(found.graph.model, ["relu_1"], batches, histograms=True)
        channel_extremes(found.graph.model, ["relu_1"], batches())
        assert passes[0] == 3
        assert most[0] <= 2  # the one that is being made, and the last one of the loop that takes them
        assert alive[0] == 0

    def test_min_max_needs_one_pass(self, case):
        found, passes = case("cnnf"), []

        def batches():
            passes.append(1)
            return iter([found.pixels[:2]])

        seen = observe(found.graph.model, ["relu_1"], batches, histograms=False)
        assert len(passes) == 1
        assert not seen["relu_1"].counts.any()

    def test_channels(self, case, run_model):
        found = case("cnnf")
        largest = channel_extremes(found.graph.model, ["relu_1", "linear"], np.split(found.pixels, 3))
        values = run_model(found.graph.model, ["relu_1", "linear"], found.pixels, relu_1=1, linear=1)
        np.testing.assert_allclose(largest["relu_1"], np.abs(values[0]).max(axis=(0, 2, 3)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(largest["linear"], np.abs(values[1]).max(axis=0), rtol=1e-4, atol=1e-5)

    def test_values_that_are_not_finite(self, case):
        found = case("cnnf")
        broken = onnx.ModelProto()
        broken.CopyFrom(found.graph.model)
        bias = next(tensor for tensor in broken.graph.initializer if tensor.name == "trunk.conv2.bias")
        bias.CopyFrom(onnx.numpy_helper.from_array(np.full(list(bias.dims), np.inf, dtype=np.float32), bias.name))
        with pytest.raises(ModelError, match=r"the tensor relu_1 is not finite on the calibration images: train again"):
            observe(broken, ["relu_1"], lambda: iter([found.pixels[:2]]), histograms=True)


class TestThresholds:
    def test_min_max(self):
        seen = Observation(-1.5, 7.0, np.zeros(POINTS, dtype=np.int64))
        assert choose_range(seen, "min-max", asymmetric_u8) == (-1.5, 7.0)

    def test_percentile_leaves_the_tails_out(self):
        values = np.concatenate([np.linspace(-1, 1, 1_000_000), [-50.0, 80.0]])
        low, high = choose_range(observation(values), "percentile", asymmetric_u8)
        assert low == pytest.approx(-1, abs=0.1)
        assert high == pytest.approx(1, abs=0.1)
        values = np.linspace(0, 6, 1000)
        assert choose_range(observation(values), "percentile", asymmetric_u8) == pytest.approx((0, 6), abs=0.02)

    @pytest.mark.parametrize("make", [asymmetric_u8, symmetric_s8])
    def test_mse_is_least_of_all_methods(self, make):
        rng = np.random.default_rng(0)
        for values in (rng.laplace(size=50_000), np.maximum(rng.laplace(size=50_000), 0), rng.standard_t(3, 50_000)):
            seen = observation(values)
            errors = {method: error(values, make(*choose_range(seen, method, make))) for method in METHODS}
            assert errors["mse"] <= 1.02 * min(errors.values()), errors
            assert errors["mse"] < errors["min-max"], errors

    def test_entropy_keeps_the_bulk(self):
        values = np.concatenate([np.abs(np.random.default_rng(1).normal(size=200_000)), [40.0]])
        low, high = choose_range(observation(values), "entropy", asymmetric_u8)
        assert low == pytest.approx(0, abs=1e-4)
        assert 2.0 < high < 20.0

    @settings(max_examples=15, deadline=None)
    @given(st.sampled_from(sorted(METHODS)), st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40))
    def test_a_range_is_within_what_was_seen(self, method, values):
        seen = observation(values)
        low, high = choose_range(seen, method, asymmetric_u8)
        assert seen.low - 1e-4 <= low <= high <= seen.high + 1e-4

    @pytest.mark.parametrize("method", sorted(METHODS))
    @pytest.mark.parametrize("value", [0.0, 2.5, -2.5])
    def test_a_tensor_that_is_constant(self, method, value):
        counts = np.zeros(POINTS, dtype=np.int64)
        counts[0] = 100
        low, high = choose_range(Observation(value, value, counts), method, asymmetric_u8)
        affine = asymmetric_u8(low, high)
        assert affine.round(np.float32([value]))[0] == pytest.approx(value, rel=0.01)
