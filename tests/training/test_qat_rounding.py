"""Rounding as an INT8 model rounds: values, gradients, scales that survive a journey through the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from admth_runtime.errors import TrainingError
from admth_training.qat.ranges import Observer, best_range
from admth_training.qat.rounding import (
    fake_quantize,
    quantize_weight,
    round_scale,
    round_scale_down,
    straight_through,
)

finite = st.floats(-1e4, 1e4, width=32)
weights = arrays(np.float32, (3, 4), elements=st.floats(-2.0, 2.0, width=32))


def onnx_quantize(x, scale, zero_point, low, high):
    """QuantizeLinear and DequantizeLinear as the operators' documents have them, a value at a time."""
    result = np.empty_like(x)
    for index, value in np.ndenumerate(x):
        q = np.rint(np.float32(value) / np.float32(scale)) + zero_point  # half to even
        result[index] = (np.float32(np.clip(q, low, high)) - np.float32(zero_point)) * np.float32(scale)
    return result


@settings(deadline=None)
@given(arrays(np.float32, 9, elements=finite), st.floats(2.0**-10, 4.0, width=32), st.integers(0, 255))
def test_values_are_those_of_the_onnx_operators(x, scale, zero_point):
    found = fake_quantize(torch.from_numpy(x), torch.tensor(scale), -zero_point, 255 - zero_point).numpy()
    assert np.array_equal(found, onnx_quantize(x, scale, zero_point, 0, 255))


def test_halves_go_to_the_even_integer():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 300.0, -300.0])
    assert fake_quantize(x, torch.tensor(1.0), -128, 127).tolist() == [0.0, 2.0, 2.0, 0.0, -2.0, 127.0, -128.0]


def test_gradients_are_those_of_learned_step_sizes():
    rng = np.random.default_rng(1)
    x = torch.tensor(rng.normal(0, 3, (4, 50)), dtype=torch.float32, requires_grad=True)
    scale = torch.tensor(0.031, requires_grad=True)
    outer = torch.tensor(rng.normal(size=(4, 50)), dtype=torch.float32)
    (fake_quantize(x, scale, -100, 90) * outer).sum().backward()
    of_x, of_scale = np.zeros(200), 0.0
    for place, (value, weight) in enumerate(zip(x.detach().flatten().tolist(), outer.flatten().tolist(), strict=True)):
        v = value / 0.031
        if v < -100.5 or v > 90.5:
            of_scale += weight * (-100 if v < 0 else 90)
        else:
            of_x[place] = weight
            of_scale += weight * (round(v) - v)
    np.testing.assert_allclose(x.grad.flatten().numpy(), of_x, rtol=1e-6)
    assert float(scale.grad) == pytest.approx(of_scale / (200 * 100) ** 0.5, rel=1e-3)


def test_a_replaced_value_hands_its_gradient_on():
    value = torch.tensor([0.3, -1.0], requires_grad=True)
    result = straight_through(value, torch.tensor([0.25, -1.25]))
    assert result.tolist() == [0.25, -1.25]
    (result * torch.tensor([2.0, 5.0])).sum().backward()
    assert value.grad.tolist() == [2.0, 5.0]


@settings(deadline=None)
@given(weights, st.sampled_from([7, 16]), st.booleans())
def test_scales_and_integers_are_found_again_in_the_weights(values, bits, floor):
    weight = torch.from_numpy(values)
    least = torch.tensor([0.0, 0.003, 1e-7]) if floor else None
    integers, scales = quantize_weight(weight, least, bits=bits)
    snapped = (integers * scales[:, None]).numpy()
    largest = np.abs(snapped).max(axis=1)
    for channel, scale in enumerate(scales.numpy()):
        if largest[channel] == 0:
            assert scale == 1.0
            continue
        found = np.float32(largest[channel]) / np.float32(127)
        assert found == scale
        assert np.array_equal(np.rint(snapped[channel] / found), integers[channel].numpy())
        if floor:
            assert scale >= least[channel] * 0.99
    again, same = quantize_weight(torch.from_numpy(snapped), least, bits=bits)
    assert torch.equal(again, integers)
    assert torch.equal(same, scales)


@given(weights)
def test_weights_for_tensorrt_have_scales_that_fp16_has(values):
    integers, scales = quantize_weight(torch.from_numpy(values), None, bits=7)
    assert torch.equal(scales.half().float(), scales)
    used = np.abs(values).max(axis=1) > 2.0**-17 * 127
    assert (integers.abs().amax(dim=1).numpy()[used] == 127).all()


@given(st.floats(1e-20, 1e20), st.integers(1, 23))
def test_a_rounded_scale_is_near_and_has_few_bits(scale, bits):
    value = torch.tensor(scale, dtype=torch.float32)
    rounded = float(round_scale(value, bits))
    assert abs(rounded / float(value) - 1) <= (2**0.5 - 1 + 1e-6 if bits == 1 else 2.0**-bits)
    mantissa, _ = np.frexp(rounded)
    assert float(mantissa) * 2**bits == int(float(mantissa) * 2**bits)
    below = round_scale_down(float(value), bits)
    assert float(value) * (1 - 2.0 ** (1 - bits)) <= below <= float(value)


@given(arrays(np.float32, 64, elements=st.floats(-50, 50, width=32)), st.booleans())
def test_the_chosen_range_is_no_worse_than_the_whole_one(values, signed):
    sample = torch.from_numpy(values)
    low, high = min(float(sample.min()), 0.0), max(float(sample.max()), 0.0)
    found = best_range(sample, low, high, signed=signed)
    assert found.scale > 0
    assert 0 <= found.zero_point <= 255
    if signed:
        assert found.zero_point == 0
        assert np.frexp(found.scale)[0] == 0.5  # a power of two
        return
    if low == 0.0:
        assert found.zero_point == 0

    def error(scale, zero_point):
        rounded = onnx_quantize(values, scale, zero_point, 0, 255)
        return float(np.square(rounded - values).sum())

    if high > low:
        full = (high - low) / 255
        assert error(found.scale, found.zero_point) <= error(full, round(-low / full)) * (1 + 1e-4) + 1e-9


def test_an_outlier_does_not_take_all_levels():
    sample = torch.cat([torch.linspace(0, 1, 40_000), torch.tensor([1.3])])
    found = best_range(sample, 0.0, 1.3, signed=False)
    assert 1.0 < found.scale * 255 < 1.29


def test_observation_is_bounded_and_says_what_is_not_finite():
    observer = Observer()
    with pytest.raises(TrainingError, match=r"trunk.stem was never computed"):
        observer.check("trunk.stem")
    for _ in range(3):
        observer.update(torch.rand(4, 100_000))
    observer.check("trunk.stem")
    assert sum(len(part) for part in observer._sample) < 20_000
    observer.update(torch.tensor([1.0, float("nan")]))
    with pytest.raises(TrainingError, match=r"trunk.stem is not finite on the training images"):
        observer.check("trunk.stem")
