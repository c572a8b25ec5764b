"""The measures of sign parity, against cases made by hand and a plain loop."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from admth_export.gate import GATES, Gate
from admth_export.parity import MARGIN_EDGES, compare_length, compare_run, retrieval_effect
from admth_runtime.errors import InputError, ParityError
from admth_runtime.packing import pack_logits


def compare(reference, logits, codes=None):
    reference, logits = np.asarray(reference, np.float32), np.asarray(logits, np.float32)
    names = [f"img[{row}]" for row in range(len(reference))]
    return compare_length(
        reference,
        logits,
        pack_logits(logits) if codes is None else codes,
        names=names,
        indices=np.arange(100, 100 + len(reference)),
    )


@pytest.fixture
def reference():
    return np.random.default_rng(0).normal(size=(10, 16)).astype(np.float32)


def test_equal_outputs_agree_in_everything(reference):
    parity = compare(reference, reference)
    assert (parity.bit_parity, parity.exact_code_rate, parity.mean_hamming_distance) == (1.0, 1.0, 0.0)
    assert (parity.flips, parity.faults, parity.max_hamming_distance, parity.max_logit_error) == ((), (), 0, 0.0)
    assert parity.max_flip_margin is None
    assert sum(parity.margin_counts) == 160
    assert sum(parity.flip_counts) == 0


def test_flips_are_named_by_image_bit_and_value(reference):
    reference[2, 5], reference[7, 0], reference[7, 15] = 5e-4, -0.25, 3.0
    logits = reference.copy()
    logits[2, 5], logits[7, 0], logits[7, 15] = -1e-4, 0.5, -1.0
    parity = compare(reference, logits)
    assert [(flip.image, flip.index, flip.bit) for flip in parity.flips] == [
        ("img[7]", 107, 15),
        ("img[7]", 107, 0),
        ("img[2]", 102, 5),
    ]
    assert parity.flips[1].reference == -0.25
    assert parity.flips[1].candidate == 0.5
    assert parity.max_flip_margin == 3.0
    assert parity.bit_parity == pytest.approx(1 - 3 / 160)
    assert parity.exact_codes == 8
    assert parity.mean_hamming_distance == pytest.approx(0.3)
    assert parity.max_hamming_distance == 2
    assert parity.max_logit_error == 4.0
    assert sum(parity.flip_counts) == 3


def test_a_logit_of_exactly_zero_is_a_zero_bit():
    zeros = np.zeros((1, 8), np.float32)
    assert compare(zeros, zeros).flips == ()
    assert compare(zeros, -zeros).flips == ()
    above = zeros.copy()
    above[0, 3] = 1e-30
    (flip,) = compare(zeros, above).flips
    assert (flip.bit, flip.margin) == (3, 0.0)
    # A margin of zero is noise at any threshold, and counts in the first bin.
    assert Gate(0.0, 0.0).judge([_run(zeros, above)]) == ()
    assert compare(zeros, above).flip_counts[0] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_faults_by_name(reference, value):
    logits = reference.copy()
    logits[4, 9] = value
    parity = compare(reference, logits)
    assert len(parity.faults) == 1
    assert "1 of 160 values of logits_16 are not finite" in parity.faults[0]
    assert "bit 9 of image img[4]" in parity.faults[0]
    assert str(value) in parity.faults[0]
    assert math.isfinite(parity.max_logit_error)
    json.dumps(parity.to_dict(), allow_nan=False)
    failures = Gate(1e9, 0.0).judge([_run(reference, logits)])
    assert any("not finite" in line for line in failures)


def test_codes_that_are_not_the_signs_of_their_logits_are_faults_by_name(reference):
    codes = pack_logits(reference)
    codes[3, 1] ^= 0b00010000
    parity = compare(reference, reference, codes)
    assert len(parity.faults) == 1
    assert "1 of 10 codes of code_16 are not the packed signs" in parity.faults[0]
    assert "img[3]" in parity.faults[0]
    assert codes[3].tobytes().hex() in parity.faults[0]
    (flip,) = parity.flips  # what a user gets is the code
    assert flip.bit == 11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits, codes: (logits.astype(np.float64), codes), r"logits_16 is float64 \[10, 16\], not float32"),
        (lambda logits, codes: (logits[:9], codes), r"logits_16 is float32 \[9, 16\], not float32 \[10, 16\]"),
        (lambda logits, codes: (logits, codes.astype(np.int8)), r"code_16 is int8 \[10, 2\], not uint8"),
        (lambda logits, codes: (logits, codes[:, :1]), r"code_16 is uint8 \[10, 1\], not uint8 \[10, 2\]"),
    ],
)
def test_outputs_of_another_form_are_refused(reference, change, message):
    logits, codes = change(reference.copy(), pack_logits(reference))
    with pytest.raises(ParityError, match=message):
        compare_length(reference, logits, codes, names=["x"] * 10, indices=np.arange(10))


def test_a_missing_length_is_refused(reference):
    with pytest.raises(ParityError, match=r"logits of \[16\] and codes of \[8\]"):
        compare_run(
            {16: reference},
            {16: reference},
            {8: pack_logits(reference)},
            batch_size=1,
            names=["x"] * 10,
            indices=np.arange(10),
        )


def test_a_reference_that_is_not_finite_is_refused(reference):
    reference[0, 0] = math.nan
    with pytest.raises(InputError, match="reference logit is not finite"):
        compare(reference, np.ones_like(reference))


finite = st.floats(-8, 8, width=32)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_measures_equal_a_plain_loop(data):
    shape = data.draw(st.tuples(st.integers(1, 6), st.sampled_from([8, 16, 24])))
    reference = data.draw(hnp.arrays(np.float32, shape, elements=finite))
    logits = data.draw(hnp.arrays(np.float32, shape, elements=finite))
    parity = compare(reference, logits)
    flips, per_image, error = [], [0] * shape[0], 0.0
    for row in range(shape[0]):
        for bit in range(shape[1]):
            error = max(error, abs(float(reference[row, bit]) - float(logits[row, bit])))
            if (reference[row, bit] > 0) != (logits[row, bit] > 0):
                flips.append((row + 100, bit))
                per_image[row] += 1
    assert sorted((flip.index, flip.bit) for flip in parity.flips) == flips
    margins = [flip.margin for flip in parity.flips]
    assert margins == sorted(margins, reverse=True)
    assert parity.exact_codes == per_image.count(0)
    assert parity.max_hamming_distance == max(per_image)
    assert parity.mean_hamming_distance == pytest.approx(sum(per_image) / shape[0])
    assert parity.max_logit_error == pytest.approx(error)
    assert parity.faults == ()
    assert sum(parity.margin_counts) == shape[0] * shape[1]
    assert sum(parity.flip_counts) == len(flips)
    assert len(parity.margin_counts) == len(MARGIN_EDGES) - 1


def _run(reference, logits, batch_size=32):
    count = len(reference)
    return compare_run(
        {reference.shape[1]: reference},
        {reference.shape[1]: logits},
        {reference.shape[1]: pack_logits(logits)},
        batch_size=batch_size,
        names=[f"img[{row}]" for row in range(count)],
        indices=np.arange(count),
    )


def _flipped(reference, margins):
    """Give the first bits of the first image these reference margins, and flip them in a copy."""
    reference = reference.copy()
    reference[0, : len(margins)] = margins
    logits = reference.copy()
    logits[0, : len(margins)] *= -1
    return reference, logits


def test_a_flip_at_the_threshold_is_noise_and_one_above_it_fails(reference):
    at = np.float32(0.001)
    gate = Gate(float(at), 0.9)
    assert gate.judge([_run(*_flipped(reference, [at]))]) == ()
    (failure,) = gate.judge([_run(*_flipped(reference, [np.nextafter(at, np.float32(1))]), batch_size=3)])
    assert failure.startswith("batch 3, 16 bits: bit 0 of image img[0] flipped from 0.001 to -0.001")
    assert "noise threshold 0.001" in failure


def test_many_flips_above_the_threshold_are_counted_and_the_worst_are_named(reference):
    run = _run(*_flipped(reference, list(range(1, 9))))
    failures = Gate(0.001, 0.0).judge([run])
    assert len(failures) == 6
    assert "from 8 to -8" in failures[0]
    assert "3 more flips" in failures[-1]


def test_the_floor_of_bit_parity_is_judged_without_a_threshold(reference):
    run = _run(*_flipped(reference, [2.0] * 16))
    assert Gate(None, 0.9).judge([run]) == ()
    (failure,) = Gate(None, 0.95).judge([run])
    assert "bit parity 0.900000 is below 0.95: 16 of 160 bits differ and 8 may" in failure


@pytest.mark.parametrize(
    ("minimum", "bits", "allowed"),
    [
        (0.9999, 64_000, 7),
        (0.9999, 10_000, 1),
        (0.9999, 768, 1),
        (1.0, 64_000, 0),
        (0.95, 160, 8),
        (0.998, 1_000, 2),
        (0.0, 8, 8),
    ],
)
def test_the_floor_allows_at_least_one_flip_unless_it_is_one(minimum, bits, allowed):
    assert Gate(0.001, minimum).allowed_flips(bits) == allowed


def test_every_run_is_judged(reference):
    good, bad = _run(reference, reference), _run(*_flipped(reference, [1.0]), batch_size=1)
    failures = Gate.of_precision("fp32").judge([good, bad])
    assert failures
    assert all(line.startswith("batch 1, ") for line in failures)


def test_each_precision_has_its_gate_and_limits_can_be_replaced():
    assert GATES["fp32"] == Gate(1e-3, 0.9999)
    assert GATES["int8"].noise_threshold is None
    assert Gate.of_precision("fp16", minimum_bit_parity=0.5) == Gate(GATES["fp16"].noise_threshold, 0.5)
    assert Gate.of_precision("int8", noise_threshold=0.0) == Gate(0.0, GATES["int8"].minimum_bit_parity)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gate(-1.0, 1.0),
        lambda: Gate(math.nan, 1.0),
        lambda: Gate(math.inf, 1.0),
        lambda: Gate(0.1, 1.5),
        lambda: Gate(0.1, math.nan),
        lambda: Gate(True, 1.0),
        lambda: Gate.of_precision("fp8"),
    ],
)
def test_limits_out_of_range_are_refused(make):
    with pytest.raises(InputError):
        make()


def test_retrieval_effect_is_the_change_of_map():
    # Two classes; a database of one code a class; one query whose code is right and then wrong.
    database = {8: np.asarray([[0b00000000], [0b11111111]], np.uint8)}
    labels = np.eye(2, dtype=np.uint8)
    right, wrong = np.asarray([[0b00000001]], np.uint8), np.asarray([[0b11111110]], np.uint8)
    effect = retrieval_effect({8: right}, {8: wrong}, database, query_labels=labels[:1], database_labels=labels)[8]
    assert (effect.reference_map, effect.candidate_map, effect.difference) == (1.0, 0.5, -0.5)
    same = retrieval_effect({8: right}, {8: right}, database, query_labels=labels[:1], database_labels=labels)[8]
    assert same.difference == 0.0
