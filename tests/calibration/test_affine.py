"""Affine quantisation: the definition, ONNX Runtime's own operators bit for bit, and scales that FP16 has."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx.helper
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from admth_calibration.affine import (
    Affine,
    asymmetric_u8,
    quantize_weight,
    representable_scale,
    symmetric_s8,
    weight_scales,
)

FLOATS = arrays.arrays(np.float32, st.integers(1, 70), elements=st.floats(-1000, 1000, width=32))
ENDS = st.floats(-500, 500)


@pytest.fixture(scope="module")
def run_onnx():
    """Quantise and dequantise with ONNX Runtime's operators, with scale and zero point as inputs of the graph."""
    sessions = {}

    def run(affine, values):
        kind = onnx.TensorProto.INT8 if affine.signed else onnx.TensorProto.UINT8
        if kind not in sessions:
            info = onnx.helper.make_tensor_value_info
            graph = onnx.helper.make_graph(
                [
                    onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
                    onnx.helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
                ],
                "pair",
                [info("x", 1, ["n"]), info("scale", 1, []), info("zero", kind, [])],
                [info("q", kind, ["n"]), info("y", 1, ["n"])],
            )
            model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
            sessions[kind] = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        feeds = {
            "x": values,
            "scale": np.array(affine.scale, dtype=np.float32),
            "zero": np.array(affine.zero_point, dtype=affine.dtype),
        }
        return sessions[kind].run(None, feeds)

    return run


@pytest.mark.parametrize("make", [asymmetric_u8, symmetric_s8])
@settings(max_examples=80, deadline=None)
@given(values=FLOATS, low=ENDS, high=ENDS)
def test_integers_and_values_are_those_of_onnx_runtime(run_onnx, make, values, low, high):
    affine = make(min(low, high), max(low, high))
    integers, back = run_onnx(affine, values)
    found = affine.quantize(values)
    assert found.dtype == integers.dtype
    np.testing.assert_array_equal(found, integers)
    np.testing.assert_array_equal(affine.dequantize(found), back)
    np.testing.assert_array_equal(affine.round(values), back)


@pytest.mark.parametrize("make", [asymmetric_u8, symmetric_s8])
@settings(max_examples=60, deadline=None)
@given(values=FLOATS)
def test_a_range_holds_its_values_to_half_a_step(make, values):
    affine = make(float(values.min()), float(values.max()))
    low, high = affine.bounds
    inside = np.clip(values, low, high)
    # The zero point is an integer, so an end may lie half a step outside.
    assert (np.abs(inside - values) <= 0.501 * affine.scale + 1e-4).all()
    assert (np.abs(affine.round(values) - inside) <= 0.501 * affine.scale + 1e-4).all()
    rounded = affine.round(values)
    np.testing.assert_array_equal(affine.round(rounded), rounded)
    assert affine.round(np.zeros(1, dtype=np.float32))[0] == 0  # padding and ReLU's zero are exact


def test_half_goes_to_even_and_the_ends_saturate():
    values = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9])
    assert Affine(1.0, 0, signed=True).quantize(values).tolist() == [0, 2, 2, 0, -2, 127, -128]
    # Rounding comes before the zero point: an odd one turns no half the other way.
    assert Affine(1.0, 11, signed=False).quantize(values).tolist() == [11, 13, 13, 11, 9, 255, 0]
    assert Affine(0.5, 0, signed=True).bounds == (-64.0, 63.5)
    assert Affine(0.5, 127, signed=False).bounds == (-63.5, 64.0)


def test_ranges():
    assert asymmetric_u8(0.0, 255.0) == Affine(1.0, 0, signed=False)
    assert asymmetric_u8(3.0, 255.0) == Affine(1.0, 0, signed=False)  # widened to hold 0
    assert asymmetric_u8(-127.0, 128.0) == Affine(1.0, 127, signed=False)
    assert asymmetric_u8(-255.0, -1.0) == Affine(1.0, 255, signed=False)
    assert symmetric_s8(-254.0, 10.0) == Affine(2.0, 0, signed=True)
    for nothing in (asymmetric_u8(0.0, 0.0), symmetric_s8(0.0, 0.0)):
        assert nothing.scale > 0
        assert nothing.round(np.zeros(3, dtype=np.float32)).tolist() == [0, 0, 0]


@given(st.floats(min_value=0.0, max_value=60000.0))
def test_a_scale_is_the_next_number_that_fp16_has(scale):
    found = representable_scale(scale)
    assert found > 0
    assert float(np.float16(found)) == found
    if scale > 0:
        assert found >= scale
        below = float(np.nextafter(np.float16(found), np.float16(0)))
        assert below < scale or math.isclose(below, 0.0)


@given(st.floats(-60000, 60000), st.floats(-60000, 60000))
def test_scales_for_tensorrt_are_numbers_that_fp16_has(low, high):
    scale = symmetric_s8(low, high).scale
    assert float(np.float16(scale)) == scale
    assert scale * 127 >= max(abs(low), abs(high)) * (1 - 1e-6)


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)),
        elements=st.floats(-100, 100, width=32),
    ),
    st.integers(0, 2),
)
def test_a_weight_is_within_half_a_step_of_its_integers(weight, axis):
    values, scales = quantize_weight(weight, axis)
    assert values.dtype == np.int8
    assert values.min(initial=0) >= -127  # symmetric: -128 has no counterpart
    assert scales.shape == (weight.shape[axis],)
    assert (scales > 0).all()
    assert (scales == scales.astype(np.float16)).all()
    shape = [1, 1, 1]
    shape[axis] = -1
    step = scales.reshape(shape)
    assert (np.abs(values * step - weight) <= step * 0.5001 + 1e-12).all()


def test_a_channel_of_zeros():
    values, scales = quantize_weight(np.zeros((2, 3), dtype=np.float32), 0)
    assert not values.any()
    assert (scales == 1).all()
    assert weight_scales(np.float32([[0, 0], [0, -254]]), half=False).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("largest", [127, 63])
@pytest.mark.parametrize("half", [False, True])
def test_the_largest_weight_gets_the_largest_integer(half, largest):
    rows = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32) * np.logspace(-1, 2, 20)[:, None]
    scales = weight_scales(rows, half=half, largest=largest)
    assert scales.dtype == np.float32
    most = np.abs(rows).max(axis=1) / scales
    assert (most <= largest * (1 + 1e-6)).all()
    assert (most > largest * (1 - 1e-3)).all()  # a number that FP16 has is at most a thousandth larger
