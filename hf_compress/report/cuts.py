"""Which magnitude separates the smallest weights from the rest, of layers that are read one after the other.

A pattern prunes exactly so many entries, ties by position, and the weights never lie in memory together. The bits of
|w| are ordered as the floats are, so the k-th smallest is found digit by digit, 16 bits at a time: every pass counts
the next digit of the entries that agree with what is known so far. All shares advance in the same passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..patterns.base import count_pruned
from ..selection import CHUNK

_DIGIT = 1 << 16


@dataclass(frozen=True)
class Cut:
    """Entries below `threshold` are pruned, and the first `ties` of those that equal it, in order of position."""

    threshold: float
    ties: int


@dataclass(frozen=True)
class Place:
    """A cut in one layer.

    Attributes:
        threshold: what lies below is pruned.
        ties: so many entries that equal it are pruned too.
        end: row-major position behind the last of them, 0 if there is none.
    """

    threshold: float
    ties: int
    end: int


class Sums:
    """Sums over a layer that comes in parts: of all entries, and of those below each of some thresholds."""

    def __init__(self, thresholds: Sequence[float]) -> None:
        self._thresholds = thresholds
        self.zeros, self.square_sum = 0, 0.0
        self._counts, self._squares = np.zeros(len(thresholds), np.int64), np.zeros(len(thresholds))

    def add(self, magnitudes: torch.Tensor) -> None:
        """A part of the layer; sorting it once costs less than one comparison with each threshold."""
        flat = magnitudes.reshape(-1)
        ordered = np.sort((flat.float() if flat.dtype == torch.bfloat16 else flat).numpy())
        with np.errstate(over="ignore"):  # the caller looks whether the sum is finite
            squares = np.concatenate([[0.0], np.cumsum(np.square(ordered, dtype=np.float64))])
        below = np.searchsorted(ordered, np.array(self._thresholds, ordered.dtype))
        self.zeros += int(np.searchsorted(ordered, 0, side="right"))
        self.square_sum += float(squares[-1])
        self._counts += below
        self._squares += squares[below]

    @property
    def below(self) -> list[tuple[int, float]]:
        """For each threshold how many entries lie below it, and the sum of their squares."""
        return list(zip(self._counts.tolist(), self._squares.tolist(), strict=True))


def find_cuts(
    read: Sequence[Callable[[], torch.Tensor]], shares: Sequence[float], dtype: torch.dtype
) -> tuple[list[Cut], set[int]]:
    """The cuts that prune floor(share * n) of the n entries of all layers together.

    Args:
        read: gives a layer, contiguous; called once for every 16 bits of `dtype`.
        shares: removed, one for each cut.
        dtype: float64, float32 or bfloat16, which must hold the values of all layers.

    Returns:
        The cuts, and the positions of layers that hold NaN or infinity, which take no part.
    """
    levels = 8 * dtype.itemsize // 16
    infinity = int(_bits(torch.tensor([float("inf")]), dtype)[0]) >> 16 * (levels - 1)
    broken: set[int] = set()
    prefixes = np.zeros(len(shares), np.uint64)
    wanted = np.zeros(len(shares), np.int64)
    for level in range(levels if shares else 1):  # the first looks for broken layers too
        shift = 16 * (levels - 1 - level)
        known = np.unique(prefixes) if level else np.zeros(1, np.uint64)
        counts = np.zeros((len(known), _DIGIT), np.int64)
        for i, load in enumerate(read):
            if i in broken:
                continue
            here = _count_digits(load(), dtype, shift, known)
            if level == 0 and here[0, infinity:].any():
                broken.add(i)
            else:
                counts += here
        if level == 0:
            wanted[:] = [count_pruned(share, int(counts.sum())) for share in shares]
        cumulated = counts.cumsum(1)
        for s, row in enumerate(np.searchsorted(known, prefixes)):
            digit = int(np.searchsorted(cumulated[row], wanted[s]))
            wanted[s] -= cumulated[row, digit] - counts[row, digit]
            prefixes[s] = (int(prefixes[s]) << 16) + digit
    thresholds = [_float(int(bits), dtype) for bits in prefixes]
    return [Cut(t, int(ties)) for t, ties in zip(thresholds, wanted, strict=True)], broken


def place_cuts(weight: torch.Tensor, cuts: Sequence[Cut], dtype: torch.dtype) -> tuple[list[Place], list[Cut]]:
    """The cuts in a contiguous layer, and what is left of them for the next one, which is fewer ties."""
    left = [cut.ties for cut in cuts]
    ends = [0] * len(cuts)
    start = 0
    for chunk in weight.view(-1).split(CHUNK):
        magnitudes = chunk.to(dtype).abs()
        for i in (i for i, ties in enumerate(left) if ties):
            tied = (magnitudes == cuts[i].threshold).nonzero()
            if len(tied):
                last = min(len(tied), left[i])
                ends[i] = start + int(tied[last - 1]) + 1
                left[i] -= last
        start += chunk.numel()
    return (
        [Place(c.threshold, c.ties - ties, end) for c, ties, end in zip(cuts, left, ends, strict=True)],
        [Cut(c.threshold, ties) for c, ties in zip(cuts, left, strict=True)],
    )


def prune_mask(weight: torch.Tensor, block: torch.Tensor, magnitudes: torch.Tensor, place: Place) -> torch.Tensor:
    """True where a part of a layer is pruned.

    Args:
        weight: the whole layer, contiguous.
        block: `narrow` of it.
        magnitudes: of the block, in the type of the cut.
        place: of the cut in the layer.
    """
    mask = magnitudes < place.threshold
    if place.end:
        tied = (magnitudes == place.threshold).nonzero()
        offset = block.storage_offset() - weight.storage_offset()
        first = tied[(tied * torch.tensor(weight.stride())).sum(1) + offset < place.end]
        mask[tuple(first.T)] = True
    return mask


def _count_digits(weight: torch.Tensor, dtype: torch.dtype, shift: int, known: np.ndarray) -> np.ndarray:
    """How often each digit at `shift` follows each of the known prefixes; at the first digit there is one, empty."""
    counts = np.zeros((len(known), _DIGIT), np.int64)
    for bits in _chunks(weight, dtype):
        digits = bits >> bits.dtype.type(shift)
        if shift == 8 * dtype.itemsize - 16:
            counts[0] += np.bincount(digits.astype(np.int64), minlength=_DIGIT)
            continue
        upper = digits >> bits.dtype.type(16)
        for row, prefix in enumerate(known.astype(bits.dtype)):
            follows = digits[upper == prefix] & bits.dtype.type(_DIGIT - 1)
            counts[row] += np.bincount(follows.astype(np.int64), minlength=_DIGIT)
    return counts


def _chunks(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[np.ndarray]:
    for chunk in weight.view(-1).split(CHUNK):
        yield _bits(chunk, dtype)


_WORDS = {8: (torch.int64, np.uint64), 4: (torch.int32, np.uint32), 2: (torch.int16, np.uint16)}


def _bits(values: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """The bit patterns of |w| as whole numbers."""
    signed, unsigned = _WORDS[dtype.itemsize]
    return values.to(dtype).abs().view(signed).numpy().view(unsigned)


def _float(bits: int, dtype: torch.dtype) -> float:
    return torch.tensor(bits, dtype=_WORDS[dtype.itemsize][0]).view(dtype).item()
