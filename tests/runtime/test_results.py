from __future__ import annotations

import pickle

import numpy as np
import pytest

from admth_runtime import CodeLengthError, HashCodes, InputError


def make(count: int, seed: int = 0, lengths=(16, 64)) -> HashCodes:
    generator = np.random.default_rng(seed)
    logits = {length: generator.normal(size=(count, length)).astype(np.float32) for length in lengths}
    return HashCodes({length: np.packbits(values > 0, axis=1) for length, values in logits.items()}, logits)


def test_is_a_mapping_by_code_length():
    codes = make(5)
    assert (len(codes), codes.count, codes.code_lengths, list(codes)) == (2, 5, (16, 64), [16, 64])
    assert {length: array.shape for length, array in codes.items()} == {16: (5, 2), 64: (5, 8)}
    assert codes.logits[64].shape == (5, 64)
    assert 16 in codes
    assert 24 not in codes
    assert codes.get(24) is None
    assert codes[np.int64(16)] is codes[16]
    assert repr(codes) == "HashCodes(count=5, code_lengths=(16, 64))"


@pytest.mark.parametrize("length", [12, 24, "64", None])
def test_a_wrong_length_lists_those_there_are(length):
    codes = make(1)
    for table in (codes, codes.logits):
        with pytest.raises(CodeLengthError, match="is not there: this model or file has 16, 64") as caught:
            table[length]
        assert isinstance(caught.value, KeyError)
        assert isinstance(caught.value, InputError)
        assert not str(caught.value).startswith(("'", '"'))  # as KeyError prints


def test_arrays_are_read_only_and_the_callers_stay_writable():
    array = np.zeros((2, 2), np.uint8)
    codes = HashCodes({16: array})
    with pytest.raises(ValueError, match="read-only"):
        codes[16][0, 0] = 1
    array[0, 0] = 1
    with pytest.raises(AttributeError):
        codes.extra = 1


def test_hex():
    codes = HashCodes({16: np.array([[0, 255], [18, 52]], np.uint8)})
    assert codes.hex(16) == ["00ff", "1234"]
    with pytest.raises(CodeLengthError):
        codes.hex(64)


def test_concatenate():
    parts = [make(3, 1), make(2, 2), make(1, 3)]
    joined = HashCodes.concatenate(parts)
    assert joined.count == 6
    for length in joined:
        assert np.array_equal(joined[length], np.concatenate([part[length] for part in parts]))
        assert np.array_equal(joined.logits[length], np.concatenate([part.logits[length] for part in parts]))
    assert HashCodes.concatenate(parts[:1]) is parts[0]
    with pytest.raises(InputError, match="cannot be joined"):
        HashCodes.concatenate([make(1), make(1, lengths=(32,))])
    with pytest.raises(InputError, match="no codes to join"):
        HashCodes.concatenate([])


def test_can_cross_a_process_boundary():
    codes = make(3)
    copy = pickle.loads(pickle.dumps(codes))
    assert np.array_equal(copy[64], codes[64])
    assert np.array_equal(copy.logits[16], codes.logits[16])
