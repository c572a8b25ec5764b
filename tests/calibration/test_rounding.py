"""Rounding of weights: what each way promises, on random weights and inputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from admth_calibration.affine import weight_scales
from admth_calibration.rounding import gptq_columns, gptq_per_channel, inverse_factor, nearest, zero_sum

SEEDS = st.integers(0, 2**32 - 1)


def make_rows(seed, channels=12, inputs=40):
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=(channels, inputs)) * rng.uniform(0.01, 10, (channels, 1))).astype(np.float32)
    return rng, rows, weight_scales(rows, half=False)


def positive_inputs(rng, inputs, count=500):
    """Correlated values behind a ReLU, ``[count, inputs]``."""
    mixed = rng.normal(size=(count, 6)) @ rng.normal(size=(6, inputs)) + 0.5 * rng.normal(size=(count, inputs))
    return np.maximum(mixed, 0).astype(np.float32)


def squared_error(values, scales, rows, moments):
    wrong = values * scales[:, None] - rows
    return (
        np.einsum("ci,...ij,cj->c", wrong, moments, wrong)
        if moments.ndim == 2
        else np.einsum("ci,cij,cj->c", wrong, moments, wrong)
    )


def test_nearest_is_half_to_even_and_bounded():
    rows = np.float32([[127, 0.5, 1.5, -2.5, -0.5], [254, 1, 3, -5, 400]])
    values = nearest(rows, np.float32([1, 2]))
    assert values.dtype == np.int8
    assert values.tolist() == [[127, 0, 2, -2, 0], [127, 0, 2, -2, 127]]
    assert np.abs(nearest(rows, np.float32([1, 2]), 63)).max() == 63


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 60))
def test_zero_sum_moves_a_weight_by_one_step_at_most_and_its_error_to_about_zero(seed, inputs):
    rng, rows, scales = make_rows(seed, inputs=inputs)
    means = rng.uniform(0, 2, inputs).astype(np.float32)
    plain, values = nearest(rows, scales), zero_sum(rows, scales, means)
    steps = rows / scales[:, None]
    assert np.abs(values.astype(int) - plain).max() <= 1
    assert np.abs(values - steps).max() <= 1 + 1e-3  # up or down, and never further
    before, after = (np.abs(((found - steps) * means).sum(axis=1)) for found in (plain, values))
    assert (after <= before + 1e-3).all()
    # One flip moves the error by a mean; while it is larger than that there is a flip that brings it nearer.
    assert (after <= means.max() / 2 + 1e-3)[after < before - 1e-3].all() or inputs < 8


def test_zero_sum_cuts_the_error_on_the_mean_input():
    rng, rows, scales = make_rows(3, channels=64, inputs=200)
    means = rng.uniform(0, 2, 200).astype(np.float32)
    steps = rows / scales[:, None]
    before, after = (
        np.abs(((found - steps) * means).sum(axis=1)).mean()
        for found in (nearest(rows, scales), zero_sum(rows, scales, means))
    )
    assert after < before / 5
    # The flips are the cheap ones: the weights themselves are hardly further from the truth.
    assert (
        np.square(zero_sum(rows, scales, means) - steps).mean() < 1.3 * np.square(nearest(rows, scales) - steps).mean()
    )


def test_zero_sum_takes_means_of_every_channels_own():
    rng, rows, scales = make_rows(4, channels=2000, inputs=9)  # more channels than are sorted at once
    means = rng.uniform(0, 2, rows.shape).astype(np.float32)
    whole = zero_sum(rows, scales, means)
    for channel in (0, 999, 1023, 1024, 1999):
        part = slice(channel, channel + 1)
        np.testing.assert_array_equal(whole[part], zero_sum(rows[part], scales[part], means[channel]))


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_gptq_beats_nearest_and_zero_sum_in_squared_error(seed):
    rng, rows, scales = make_rows(seed, channels=24, inputs=96)  # more columns than one block of the algorithm
    inputs = positive_inputs(rng, 96)
    moments = inputs.T @ inputs
    values = gptq_columns(rows, scales, moments)
    assert np.abs(values.astype(int)).max() <= 127
    error = squared_error(values, scales, rows, moments).sum()
    assert error < 0.7 * squared_error(nearest(rows, scales), scales, rows, moments).sum()
    assert error < squared_error(zero_sum(rows, scales, inputs.mean(axis=0)), scales, rows, moments).sum()


def test_gptq_equals_its_definition():
    """Column after column, in falling order of the moments, with a fresh inverse of what is left each time."""
    rng, rows, scales = make_rows(5, channels=3, inputs=10)
    inputs = positive_inputs(rng, 10)
    moments = (inputs.T @ inputs).astype(np.float64)
    damped = moments + (0.01 * np.trace(moments) / 10 + 1e-9) * np.eye(10)
    left = list(np.argsort(-np.diag(moments)))
    weights, expected = rows.astype(np.float64).copy(), np.zeros(rows.shape)
    while left:
        column = left[0]
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        expected[:, column] = np.clip(np.rint(weights[:, column] / scales), -127, 127)
        error = weights[:, column] - expected[:, column] * scales
        weights[:, left] -= error[:, None] * inverse[0] / inverse[0, 0]
        left.pop(0)
    np.testing.assert_array_equal(gptq_columns(rows, scales, moments), expected)


def test_per_channel_is_columns_for_one_channel():
    rng, rows, scales = make_rows(6, channels=8, inputs=9)
    # Sorted, as one takes the columns as they are and the other by their moments.
    inputs = [np.sort(positive_inputs(rng, 9) * np.linspace(3, 1, 9), axis=1)[:, ::-1] for _ in rows]
    moments = np.stack([values.T @ values for values in inputs])
    together = gptq_per_channel(rows, scales, inverse_factor(moments))
    for channel in range(8):
        part = slice(channel, channel + 1)
        np.testing.assert_array_equal(together[part], gptq_columns(rows[part], scales[part], moments[channel]))
    assert (
        squared_error(together, scales, rows, moments).sum()
        < squared_error(nearest(rows, scales), scales, rows, moments).sum()
    )


@pytest.mark.parametrize("largest", [127, 63])
def test_inputs_that_are_always_zero_and_bounds(largest):
    rng, rows, _ = make_rows(7, channels=5, inputs=20)
    scales = weight_scales(rows, half=False, largest=largest)
    inputs = positive_inputs(rng, 20)
    inputs[:, 5:9] = 0
    for found in (
        gptq_columns(rows, scales, inputs.T @ inputs, largest=largest),
        gptq_columns(rows, scales, np.zeros((20, 20)), largest=largest),
        gptq_per_channel(rows, scales, inverse_factor(np.zeros((5, 20, 20))), largest=largest),
        zero_sum(rows, scales, inputs.mean(axis=0), largest),
        zero_sum(rows, scales, np.zeros(20), largest),
    ):
        assert np.abs(found.astype(int)).max() <= largest
    np.testing.assert_array_equal(
        gptq_columns(rows, scales, np.zeros((20, 20)), largest=largest), nearest(rows, scales, largest)
    )
