from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from admth_runtime import packing
from admth_runtime.errors import InputError

sizes = st.tuples(st.integers(0, 6), st.integers(1, 12))


def codes_of(shape):
    return hnp.arrays(np.uint8, shape)


@st.composite
def two_tables(draw):
    width = draw(st.integers(1, 17))
    return draw(codes_of((draw(st.integers(0, 6)), width))), draw(codes_of((draw(st.integers(0, 6)), width)))


def count_bits_slowly(a: bytes, b: bytes) -> int:
    return sum((x ^ y) >> bit & 1 for x, y in zip(a, b, strict=True) for bit in range(8))


@pytest.fixture(params=["bitwise_count", "table"])
def popcount_path(request, monkeypatch):
    if request.param == "table":
        monkeypatch.delattr(np, "bitwise_count", raising=False)
    elif not hasattr(np, "bitwise_count"):
        pytest.skip("NumPy 1 has no bitwise_count")


@given(st.data())
def test_pack_logits_equals_numpy_and_the_written_out_definition(data):
    rows, octets = data.draw(sizes)
    logits = data.draw(hnp.arrays(np.float32, (rows, 8 * octets), elements=st.floats(-2, 2, width=32)))
    packed = packing.pack_logits(logits)
    assert packed.dtype == np.uint8
    assert packed.flags.c_contiguous
    assert np.array_equal(packed, np.packbits(logits > 0, axis=1))
    for row in range(rows):
        for octet in range(octets):
            bits = [logits[row, 8 * octet + bit] > 0 for bit in range(8)]
            assert packed[row, octet] == sum(1 << (7 - bit) for bit in range(8) if bits[bit])


def test_zero_minus_zero_and_nan_are_zero_bits():
    logits = np.array([[0.0, -0.0, np.nan, 1e-45, -1e-45, np.inf, -np.inf, 1.0]], dtype=np.float32)
    assert packing.unpack_bits(packing.pack_logits(logits)).tolist() == [[0, 0, 0, 1, 0, 1, 0, 1]]


@given(sizes.flatmap(codes_of))
def test_unpack_then_pack_and_hex_there_and_back(codes):
    assert np.array_equal(packing.pack_bits(packing.unpack_bits(codes)), codes)
    texts = packing.to_hex(codes)
    assert all(len(text) == 2 * codes.shape[1] and text == text.lower() for text in texts)
    if texts:
        assert np.array_equal(packing.from_hex(texts), codes)
        assert np.array_equal(packing.from_hex([text.upper() for text in texts]), codes)


@pytest.mark.usefixtures("popcount_path")
class TestHamming:
    def check(self, a, b):
        expected = [[count_bits_slowly(x.tobytes(), y.tobytes()) for y in b] for x in a]
        matrix = packing.hamming_matrix(a, b)
        assert matrix.dtype == np.uint16
        assert matrix.shape == (len(a), len(b))
        assert matrix.tolist() == expected
        if len(a) and len(b):
            assert packing.hamming_distance(a[:, None], b[None]).tolist() == expected

    def test_against_loops(self):
        @settings(max_examples=60)
        @given(two_tables())
        def run(tables):
            self.check(*tables)

        run()

    @pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 8, 12, 16, 32, 64])
    def test_extremes_of_every_width(self, width):
        low, high = np.zeros((1, width), np.uint8), np.full((1, width), 255, np.uint8)
        assert packing.hamming_matrix(low, high).tolist() == [[8 * width]]
        assert packing.hamming_matrix(high, high).tolist() == [[0]]

    def test_arrays_that_are_not_contiguous(self):
        table = np.random.default_rng(0).integers(0, 256, (9, 16), dtype=np.uint8)
        self.check(table[::2, ::2], table[1::3, 8:])

    def test_is_a_metric(self):
        codes = np.random.default_rng(1).integers(0, 256, (12, 6), dtype=np.uint8)
        d = packing.hamming_matrix(codes, codes).astype(int)
        assert (d == d.T).all()
        assert (np.diag(d) == 0).all()
        assert (d[:, None, :] <= d[:, :, None] + d[None, :, :]).all()


@pytest.mark.parametrize("length", [12, 0, -8, True, 8.0, "64", None])
def test_code_lengths_are_positive_multiples_of_eight(length):
    with pytest.raises(InputError, match="multiple of 8"):
        packing.check_code_length(length)


@pytest.mark.parametrize(
    ("lengths", "message"), [((), "no code length"), ((32, 16), "do not increase"), ((16, 16), "do not increase")]
)
def test_code_lengths_increase(lengths, message):
    with pytest.raises(InputError, match=message):
        packing.check_code_lengths(lengths)


def test_code_lengths_may_be_numpy_integers():
    assert packing.check_code_lengths(np.array([8, 24])) == (8, 24)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: packing.pack_bits(np.zeros(8)), "two-dimensional"),
        (lambda: packing.pack_bits(np.zeros((2, 12))), "multiple of 8"),
        (lambda: packing.pack_bits(np.full((1, 8), 2)), "other than 0 and 1"),
        (lambda: packing.unpack_bits(np.zeros((2, 2), np.int64)), "not uint8"),
        (lambda: packing.from_hex(["xy"]), "not hexadecimal"),
        (lambda: packing.from_hex(["a"]), "not hexadecimal"),
        (lambda: packing.from_hex(["aa", "aabb"]), "mixed"),
        (lambda: packing.from_hex([""]), "empty"),
        (lambda: packing.hamming_distance(np.zeros(2), np.zeros(2)), "not packed"),
        (lambda: packing.hamming_distance(np.zeros(2, np.uint8), np.zeros(3, np.uint8)), "differ in length"),
        (lambda: packing.hamming_matrix(np.zeros((1, 2), np.uint8), np.zeros((1, 4), np.uint8)), "differ"),
        (lambda: packing.hamming_matrix(np.zeros(2, np.uint8), np.zeros((1, 4), np.uint8)), "not uint8"),
    ],
)
def test_bad_arrays_are_refused(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
