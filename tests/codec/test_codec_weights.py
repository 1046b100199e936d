"""Weights are the same bits everywhere: sums in order, one rounding, no -0."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compress.codec import CodecError, Latents, decode, encode, read_groups, weights_of
from tests.codec.cases import laplace

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def bits(array):
    return array.view(np.uint32).tolist()


def nearest(exact):
    """The float32 next to a fraction, ties to even; its bits."""
    guess = np.float32(float(exact))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    near = [x for x in near if np.isfinite(x)]
    best = min(near, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1))
    return (best + np.float32(0)).view(np.uint32)


@given(st.integers(-32_768, 32_767), floats)
def test_a_product_is_rounded_once(q, s):
    exact = q * Fraction(s)
    if abs(exact) >= 2**128 - 2**103:  # half a step above the largest number
        with pytest.raises(CodecError, match="does not fit float32"):
            weights_of(Latents(np.array([q])), np.array([[s]], np.float32))
    else:
        found = weights_of(Latents(np.array([q])), np.array([[s]], np.float32))
        assert bits(found) == [nearest(exact)]


short = st.integers(-1023, 1023).map(lambda n: n / 64)


@settings(max_examples=100)
@given(
    st.lists(st.integers(-2_000, 2_000), min_size=6, max_size=6), st.lists(short, min_size=9, max_size=9), short, short
)
def test_sums_of_short_numbers_are_exact(values, matrix, gain, scale):
    """All products and sums fit float64 here, so the result is the fraction, rounded once."""
    s = np.array(matrix, np.float32).reshape(3, 3)
    found = weights_of(Latents(np.array([values]), 3, 0, gain, np.array([scale], np.float32)), s)
    for i, weight in enumerate(found[0]):
        row = values[i // 3 * 3 : i // 3 * 3 + 3]
        total = sum(q * Fraction(float(s[k, i % 3])) for k, q in enumerate(row)) * Fraction(gain) * Fraction(scale)
        assert weight.view(np.uint32) == nearest(total)


def test_the_order_of_the_sum_is_that_of_the_slice():
    """1 + 2^-54 - 1 is 0 from the left, and 2^-54 in any other order."""
    column = np.array([1, 2**-54, -1], np.float32)
    matrix = np.stack([column, column[::-1], column[[0, 2, 1]]], axis=1)
    found = weights_of(Latents(np.array([1, 1, 1]), 3), matrix)
    assert found.tolist() == [0, 0, 2**-54]


@pytest.mark.parametrize("gain", [1, -1, -0.0, 2.0**-149])
@pytest.mark.parametrize("s", [1, -1, -0.0, 2.0**-149])
@pytest.mark.parametrize("scale", [1, -1, -0.0])
def test_zeros_have_no_sign(gain, s, scale):
    """Whatever factor is negative; only a product below the smallest number keeps its sign, as rounding does."""
    values = np.array([[0, 0, 1, -1]])
    found = weights_of(Latents(values, 1, 0, gain, np.array([scale], np.float32)), np.array([[s]], np.float32))
    exact = values * Fraction(gain) * Fraction(s) * Fraction(scale)
    assert np.signbit(found).tolist() == [[x < 0 for x in exact[0]]]
    assert not found[0, :2].any()


def test_slices_of_zeros_are_zeros():
    values = laplace(90_000, 9, 0.5)
    matrix = np.random.default_rng(0).normal(size=(9, 9)).astype(np.float32)
    blobs, data = encode({"w": Latents(values, 9, gain=-3)}, [matrix])
    weights = decode(blobs["w"], read_groups(data), values.shape)
    assert np.array_equal(weights.any(1), values.any(1))
    assert not np.signbit(weights[weights == 0]).any()


@pytest.mark.parametrize("row", [1, 2, 7])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_scales", [False, True])
def test_parts_join_where_slices_cross_outputs(row, is_transposed, has_scales):
    """More values than are decoded together, and slices that do not end with an output."""
    outputs, width = 1_400, 77 if row == 7 else 62
    values = laplace(outputs * width, 1, 0, 20).reshape(outputs, width)
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(row, row)).astype(np.float32)
    scales = rng.random(outputs).astype(np.float32) if has_scales else None
    found = weights_of(Latents(values, row, 0, 0.3, scales, is_transposed), matrix)
    total = np.zeros((values.size // row, row))
    for k in range(row):
        total += values.reshape(-1, row)[:, k : k + 1].astype(np.float64) * matrix[k].astype(np.float64)
    total = total.reshape(outputs, width) * float(np.float32(0.3))
    if has_scales:
        total *= scales[:, None].astype(np.float64)
    expected = (total + 0.0).astype(np.float32)
    assert found.flags.c_contiguous
    assert np.array_equal(found.T if is_transposed else found, expected)


@pytest.mark.parametrize("where", [0, 40_000, 99_999])
def test_a_weight_beyond_float32_is_an_error(where):
    values = np.zeros(100_000, np.int16)
    values[where] = 2
    with pytest.raises(CodecError, match="does not fit float32"):
        weights_of(Latents(values, gain=3e38), np.ones((1, 1), np.float32))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int64, np.uint64])
def test_the_integer_type_makes_no_difference(dtype):
    values = np.array([0, 1, 100], dtype)
    found = weights_of(Latents(values, 3, 0, 0.1), np.arange(9, dtype=np.float32).reshape(3, 3) / 7)
    expected = weights_of(Latents(values.astype(np.int8), 3, 0, 0.1), np.arange(9, dtype=np.float32).reshape(3, 3) / 7)
    assert bits(found) == bits(expected)
