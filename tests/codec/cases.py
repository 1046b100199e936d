"""Latents of all kinds, for the tests of this room."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

from hf_compress.codec import Latents

KINDS = ["constant", "narrow", "sparse slices", "int8", "limits", "wide", "outlier"]


def values_of(kind, size, row, rng):
    """int64 values of a kind in one dimension."""
    if kind == "constant":
        return np.full(size, int(rng.choice([0, 1, -1, 127, 128, -128, -129, 32_767, -32_768])))
    if kind in ("narrow", "sparse slices"):
        found = np.rint(rng.laplace(0, 1.5, (size // row, row))).astype(np.int64)
        if kind == "sparse slices":
            found[rng.random(len(found)) < 0.75] = 0
        return found.reshape(-1)
    if kind == "limits":
        return rng.choice([-32_768, -1, 0, 1, 32_767], size)
    if kind == "wide":
        return rng.integers(-2_000, 2_000, size)
    found = rng.integers(-128, 128, size) if kind == "int8" else np.zeros(size, np.int64)
    if kind == "outlier":
        found[rng.integers(size)] = int(rng.choice([4_095, 4_096, -4_095, -4_096]))
    return found


@st.composite
def latents(draw, rows=(1, 2, 3, 9), groups=4):
    """Latents of group i have slices of rows[i % len(rows)] values."""
    group = draw(st.integers(0, groups - 1))
    row = rows[group % len(rows)]
    ndim = draw(st.integers(1, 5))
    shape = [draw(st.integers(1, {1: 60, 2: 9}.get(ndim, 3))) for _ in range(ndim)]
    if math.prod(shape) % row:
        shape[draw(st.integers(0, ndim - 1))] *= row
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = values_of(draw(st.sampled_from(KINDS)), math.prod(shape), row, rng).reshape(shape)
    fits = [t for t in (np.int8, np.int16, np.int32, np.int64) if np.array_equal(values.astype(t), values)]
    values = values.astype(draw(st.sampled_from(fits)))
    if draw(st.booleans()):
        values = np.asfortranarray(values)
    scales = None
    if draw(st.booleans()):
        kind = draw(st.sampled_from([np.float16, np.float32, np.float64]))
        scales = rng.normal(size=shape[0]).astype(kind).astype(np.float32)
        if kind is np.float64:  # as bfloat16 has them
            scales = (scales.view(np.uint32) & 0xFFFF0000).view(np.float32)
    gain = draw(st.floats(-(2.0**40), 2.0**40, width=32))
    return Latents(values, row, group, gain, scales, len(shape) == 2 and draw(st.booleans()))


def decoders(rows=(1, 2, 3, 9), groups=4, seed=0):
    """Random matrices for those groups."""
    rng = np.random.default_rng(seed)
    sizes = [rows[i % len(rows)] for i in range(groups)]
    return [rng.normal(size=(d, d)).astype(np.float32) for d in sizes]


def laplace(size, row=1, zero_slices=0.0, scale=1.5, seed=0):
    """int8 values (n, d) with a share of slices of zeros."""
    rng = np.random.default_rng(seed)
    found = np.rint(rng.laplace(0, scale, (size // row, row))).clip(-127, 127).astype(np.int8)
    found[rng.random(len(found)) < zero_slices] = 0
    return found


def same(a, b):
    """Whether two latents are equal in all that the file keeps."""
    scales = (a.scales is None) == (b.scales is None)
    if scales and a.scales is not None:
        scales = np.array_equal(a.scales.view(np.uint32), b.scales.view(np.uint32))
    fields = [(x.row, x.group, np.float32(x.gain).tobytes(), x.is_transposed, x.values.shape) for x in (a, b)]
    return scales and fields[0] == fields[1] and np.array_equal(a.values, b.values)
