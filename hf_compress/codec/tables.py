"""Integer tables of frequencies, from counts by a rule without floating point (section 3.2 of the specification).

A table covers the symbols lo to lo + n - 1. Stored are weights w_s (whole numbers up to 65,535), from which everyone
derives the same frequencies:

    f_s = max(1, w_s * (65536 - n) div sum(w)), and what is missing to 65,536 is added to the first largest f_s

Weights may be the counts themselves or coarser: small weights take fewer bytes, and `fit` weighs them against the
longer code. Tables of one symbol hold no weights, and their streams no words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

from .fields import CodecError, Reader, write_number

TOTAL = 65_536  # sum of the frequencies of a table
MOST_SYMBOLS = 4_096
MOST_WEIGHT = 65_535
CHUNK = 65_536  # symbols that are coded together
BIT = 65_536  # costs are whole numbers of 1/65536 bit: the choices of the encoder are the same on every machine
_FINENESS = (127, 2_047, 16_383, MOST_WEIGHT)  # largest weights that are tried


@dataclass(frozen=True, eq=False)
class Table:
    """Frequencies of the symbols of a stream.

    Attributes:
        lo: the smallest symbol.
        weights: int64, one for each symbol from there on; not all 0.
    """

    lo: int
    weights: np.ndarray

    @property
    def hi(self) -> int:
        """The largest symbol."""
        return self.lo + len(self.weights) - 1

    @property
    def is_constant(self) -> bool:
        """Whether there is but one symbol."""
        return len(self.weights) == 1

    @cached_property
    def frequencies(self) -> np.ndarray:
        """int64, each at least 1, sum 65,536."""
        return _frequencies(self.weights[None])[0]

    @cached_property
    def model(self) -> Any:
        """What constriction codes with; its frequencies are 256 times ours (precision 24)."""
        import constriction

        # Without `perfect` it gives every symbol 1 of the 2^24 and the rest in proportion, here exactly.
        probabilities = ((self.frequencies << 8) - 1).astype(np.float64)
        return constriction.stream.model.Categorical(probabilities, perfect=False)

    def write(self) -> bytes:
        """i16 lo, number n, and n weights as numbers unless n is 1."""
        found = [self.lo.to_bytes(2, "little", signed=True), write_number(len(self.weights))]
        if not self.is_constant:
            found += map(write_number, self.weights.tolist())
        return b"".join(found)

    @classmethod
    def read(cls, reader: Reader) -> Table:
        """What `write` wrote."""
        (lo,) = reader.unpack("h", "the smallest symbol of a table")
        count = reader.number(MOST_SYMBOLS, "the number of symbols of a table")
        if not count or lo + count - 1 > 32_767:
            raise CodecError(f"a table has {count} symbols from {lo} on; allowed are 1 or more, up to 32767")
        if count == 1:
            return cls(lo, np.ones(1, np.int64))
        if count > reader.left:
            raise CodecError(f"a table has {count} symbols, and {reader.left} bytes are left")
        weights = np.array([reader.number(MOST_WEIGHT, "a weight of a table") for _ in range(count)], np.int64)
        if not weights.any():
            raise CodecError("the weights of a table are all 0")
        return cls(lo, weights)

    @property
    def cost(self) -> int:
        """What the table itself takes in a file, in 1/65536 bit."""
        sizes = 0 if self.is_constant else int(_number_bytes(self.weights))
        return 8 * BIT * (2 + len(write_number(len(self.weights))) + sizes)

    def cost_of(self, lo: int, counts: np.ndarray) -> float:
        """What a stream takes that holds the symbols lo, lo + 1, ... so often: a whole number of 1/65536 bit.

        Infinite where the table does not cover the symbols.
        """
        used = np.flatnonzero(counts)
        if used.size and (lo + used[0] < self.lo or lo + used[-1] > self.hi):
            return math.inf
        if self.is_constant:
            return 0
        return int(counts[used] @ _costs()[self.frequencies[used + (lo - self.lo)]])


def fit(lo: int, counts: np.ndarray) -> Table:
    """The table that makes a stream and itself smallest.

    Args:
        lo: the symbol of the first count.
        counts: int64, how often each symbol occurs; not all 0, and at most 4,096 from the first to the last that
            occurs.
    """
    used = np.flatnonzero(counts)
    lo, counts = lo + int(used[0]), counts[used[0] : used[-1] + 1]
    if len(counts) == 1:
        return Table(lo, np.ones(1, np.int64))
    peak = int(counts.max())
    most = np.array(sorted({min(peak, fineness) for fineness in _FINENESS}))[:, None]
    # What occurs keeps a weight: a frequency of 1 is an expensive symbol.
    weights = np.maximum(counts > 0, (counts * most + peak // 2) // peak)
    costs = 8 * BIT * _number_bytes(weights) + _costs()[_frequencies(weights)] @ counts
    return Table(lo, weights[costs.argmin()])


def pooled(streams: Iterable[tuple[int, np.ndarray]]) -> tuple[int, np.ndarray]:
    """Counts of several streams together: smallest symbol, counts from there on."""
    parts = list(streams)
    lo, hi = min(lo for lo, _ in parts), max(lo + len(counts) for lo, counts in parts)
    total = np.zeros(hi - lo, np.int64)
    for start, counts in parts:
        total[start - lo : start - lo + len(counts)] += counts
    return lo, total


def is_codable(counts: np.ndarray) -> bool:
    """Whether a table can cover what occurs."""
    used = np.flatnonzero(counts)
    return bool(used.size) and int(used[-1] - used[0]) < MOST_SYMBOLS


def chunks_of(count: int) -> int:
    """In how many chunks so many symbols are coded."""
    return -(-count // CHUNK)


@cache
def _costs() -> np.ndarray:
    """What a symbol of frequency 0 (never used), 1, ... 65,536 takes, in 1/65536 bit."""
    return np.rint((16 - np.log2(np.maximum(1, np.arange(TOTAL + 1)))) * BIT).astype(np.int64)


def _number_bytes(numbers: np.ndarray) -> Any:
    """What rows of weights take in a file."""
    return numbers.shape[-1] + (numbers > 127).sum(-1) + (numbers > 16_383).sum(-1)


def _frequencies(weights: np.ndarray) -> np.ndarray:
    """Of each row of weights."""
    found = np.maximum(1, weights * (TOTAL - weights.shape[-1]) // weights.sum(-1, keepdims=True))
    found[np.arange(len(found)), found.argmax(-1)] += TOTAL - found.sum(-1)
    return found
