"""How often each integer occurs: in each channel of the slices of a tensor, and without the slices of zeros."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

_PAIRS = 131_072  # values from which on two are counted at once
_PART = 524_288


@dataclass(frozen=True, eq=False)
class Counts:
    """What occurs in a tensor of n slices of d values.

    Attributes:
        lo: the value of the first counter.
        channels: (d, span) int64.
        has_values: bool for each slice, whether a value of it is not 0; None where all or none are, or d is 1.
    """

    lo: int
    channels: np.ndarray
    has_values: np.ndarray | None

    @property
    def constant(self) -> int | None:
        """The only value that occurs."""
        used = np.flatnonzero(self.channels.any(0))
        return self.lo + int(used[0]) if used.size == 1 else None

    def streams(self, has_flags: bool) -> list[tuple[int, np.ndarray]]:
        """Smallest value and counts of each stream: with flags for slices, or of the d channels alone."""
        if not has_flags:
            return [(self.lo, counts) for counts in self.channels]
        total = int(self.channels[0].sum())
        filled = total if self.has_values is None else int(np.count_nonzero(self.has_values))
        found, flags = self.channels.copy(), np.array([total - filled, filled])
        if total > filled:
            found[:, -self.lo] -= total - filled
        return [(0, flags), *((self.lo, counts) for counts in found)]


def count(columns: np.ndarray) -> Counts:
    """Count a tensor.

    Args:
        columns: (d, n) int8 or int16, C-contiguous: the slices of the tensor stand upright.
    """
    lo, hi = (-128, 127) if columns.dtype == np.int8 else (int(columns.min()), int(columns.max()))
    channels = np.stack([_counts(column, lo, hi) for column in columns])
    if len(columns) == 1:
        return Counts(lo, channels, None)
    has_values = np.bitwise_or.reduce(columns, axis=0) != 0
    filled = int(np.count_nonzero(has_values))
    return Counts(lo, channels, has_values if 0 < filled < len(has_values) else None)


def _counts(values: np.ndarray, lo: int, hi: int) -> np.ndarray:
    """How often lo to hi occur in contiguous values."""
    if values.dtype != np.int8:
        return _bincount((np.subtract(part, lo, dtype=np.int64) for part in _parts(values)), hi - lo + 1)
    # Two neighbours are one number of 16 bits: half the steps, but 65,536 counters.
    pairs = values[: len(values) & ~1 if len(values) >= _PAIRS else 0].view(np.uint16)
    total = _bincount(_parts(values[2 * len(pairs) :].view(np.uint8)), 256)
    if len(pairs):
        both = _bincount(_parts(pairs), 65_536).reshape(256, 256)
        total += both.sum(0) + both.sum(1)
    return np.roll(total, 128)


def _bincount(parts: Iterable[np.ndarray], size: int) -> np.ndarray:
    total = np.zeros(size, np.int64)
    for part in parts:
        total += np.bincount(part, minlength=size)
    return total


def _parts(values: np.ndarray) -> Iterator[np.ndarray]:
    """So few at a time that their copies of 64 bits stay small."""
    return (values[start : start + _PART] for start in range(0, len(values), _PART))
