"""N of every M weights along the reduction axis: the pattern that sparse tensor cores run (2:4)."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import numpy as np
import torch

from ..distributed import dealt_like, gathered, is_sharded, local, sharded_like
from ..selection import CHUNK
from ..targets import Target
from .base import Pattern, check_progress

_BYTES = np.uint32(0x01010101)
_LANES = {1: np.uint32(0x00010101), 2: np.uint32(0x00000101), 3: np.uint32(0x00000001)}  # with a partner in the group
_MOST_TOGETHER = 1 << 28  # entries whose masks are made at once on an accelerator: a GiB in float32
_FORMS = '"N:M" with 1 <= N < M, such as 2:4'


@dataclass(frozen=True)
class NM(Pattern):
    """In every group of M weights along the reduction axis the N largest magnitudes stay, ties by position.

    Weights whose reduction axis is no multiple of M stay dense and are reported.

    Attributes:
        n: weights kept in a group.
        m: size of a group.
    """

    forms: ClassVar[str] = _FORMS
    n: int
    m: int

    def __post_init__(self) -> None:
        whole = all(isinstance(v, int) and not isinstance(v, bool) for v in (self.n, self.m))
        if not whole or not 1 <= self.n < self.m:
            raise ValueError(f"{self.n!r}:{self.m!r} is no pattern; allowed: {_FORMS}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @classmethod
    def parse(cls, text: str) -> NM | None:
        match = re.fullmatch(r"(\d+):(\d+)", text)
        return cls(int(match[1]), int(match[2])) if match else None

    @property
    def revision(self) -> str:
        return f"nm-{self.n}of{self.m}"

    def partway(self, progress: float) -> NM | None:
        """As for every pattern: floor(progress * (M - N)) weights of each group are removed."""
        pruned = math.floor(check_progress(progress) * (self.m - self.n))
        return NM(self.m - pruned, self.m) if pruned else None

    def skip_reason(self, target: Target) -> str | None:
        shape = tuple(target.parameter.shape)
        if not shape or shape[target.reduction_dim] % self.m:
            size = shape[target.reduction_dim] if shape else 1
            return f"its reduction axis of {size} is no multiple of {self.m}"
        return None

    def select(self, weights: Mapping[str, Target]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for names in _together([n for n, t in weights.items() if self._is_whole_elsewhere(t)], weights):
            given = [(weights[n].parameter.detach(), weights[n].reduction_dim) for n in names]
            found |= zip(names, keep_in_all(given, self.n, self.m), strict=True)
        return {name: found[name] if name in found else self._mask(target) for name, target in weights.items()}

    def _is_whole_elsewhere(self, target: Target) -> bool:
        is_elsewhere = target.parameter.device.type != "cpu"
        return is_elsewhere and not self.skip_reason(target) and not is_sharded(target.parameter)

    def _mask(self, target: Target) -> torch.Tensor:
        weight, dim = target.parameter.detach(), target.reduction_dim
        if self.skip_reason(target):
            return torch.ones_like(weight, dtype=torch.bool)
        if is_sharded(weight) and dim == 0:  # rows are dealt to ranks, so that a group may lie on two of them
            return dealt_like(_keep_n_of_m(gathered(weight), dim, self.n, self.m), weight)
        return sharded_like(_keep_n_of_m(local(weight), dim, self.n, self.m), weight)


def _keep_n_of_m(weight: torch.Tensor, dim: int, n: int, m: int) -> torch.Tensor:
    """The mask of whole weights, by the way that the device is fastest with."""
    if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64):
        return _keep_in_chunks(weight, dim, n, m)
    return keep_by_counting(weight, dim, n, m)


def keep_by_counting(weight: torch.Tensor, dim: int, n: int, m: int) -> torch.Tensor:
    """Count for every weight of a group how many go before it; a sort would take as long as the training step."""
    groups = weight.abs().movedim(dim, -1).unflatten(-1, (-1, m))
    goes_before = torch.zeros(groups.shape, dtype=torch.int8 if m < 128 else torch.int32, device=weight.device)
    for i, j in combinations(range(m), 2):
        lower_first = groups[..., i] <= groups[..., j]
        goes_before[..., j] += lower_first
        goes_before[..., i] += ~lower_first
    return (goes_before >= m - n).flatten(-2).movedim(-1, dim)


def _together(names: Iterable[str], weights: Mapping[str, Target]) -> list[list[str]]:
    """Neighbours on one device, up to a size that leaves room for the model."""
    batches: list[list[str]] = []
    left, device = 0, None
    for name in names:
        weight = weights[name].parameter
        if weight.device != device or weight.numel() > left:
            batches.append([])
            left, device = _MOST_TOGETHER, weight.device
        batches[-1].append(name)
        left -= weight.numel()
    return batches


def keep_in_all(weights: Sequence[tuple[torch.Tensor, int]], n: int, m: int) -> list[torch.Tensor]:
    """`keep_by_counting` of all weights at once, each with its dimension: as many calls as for one of them."""
    turned = [weight.movedim(dim, -1) for weight, dim in weights]
    groups = torch.cat([t.reshape(-1, m) for t in turned])
    parts = keep_by_counting(groups, 1, n, m).reshape(-1).split([t.numel() for t in turned])
    pairs = zip(parts, turned, weights, strict=True)
    return [part.view(t.shape).movedim(-1, dim) for part, t, (_, dim) in pairs]


def _keep_in_chunks(weight: torch.Tensor, dim: int, n: int, m: int) -> torch.Tensor:
    """The same, while a chunk is in the cache: member i of all its groups is a row, which is compared with row j."""
    order = _order_in_memory(weight)
    values = weight.permute(order)
    back = sorted(range(len(order)), key=order.__getitem__)
    inner = math.prod(values.shape[order.index(dim) + 1 :])
    if inner == 1 and m == 4 and sys.byteorder == "little":
        return torch.from_numpy(_keep_in_words(values.reshape(-1).numpy(), n)).view(values.shape).permute(back)
    groups = values.reshape(values.numel() // (m * inner or 1), m, inner).numpy()
    absolute = _torch_abs if inner > 1 else np.abs  # rows of a few numbers are faster there, single ones here
    mask = np.empty(groups.shape, bool)
    step = max(1, CHUNK // (m * inner or 1))
    shape = (m, min(step, len(groups)), inner)
    magnitude, before = np.empty(shape, groups.dtype), np.empty(shape, np.uint8 if m < 256 else np.uint32)
    later_wins = np.empty(shape[1:], bool)
    for start in range(0, len(groups), step):
        chunk, kept = (part[start : start + step].transpose(1, 0, 2) for part in (groups, mask))
        size, wins, count = chunk.shape[1], later_wins[: chunk.shape[1]], before[:, : chunk.shape[1]]
        absolute(chunk, out=magnitude[:, :size])
        count[:] = np.arange(m - 1, -1, -1, dtype=count.dtype)[:, None, None]  # all pairs in which a row is the first
        for i, j in combinations(range(m), 2):
            np.less_equal(magnitude[i, :size], magnitude[j, :size], out=wins)
            count[j] += wins.view(np.uint8)
            count[i] -= wins.view(np.uint8)
        np.greater_equal(count, m - n, out=kept)
    return torch.from_numpy(mask).view(values.shape).permute(back)


def _keep_in_words(values: np.ndarray, n: int) -> np.ndarray:
    """The same for groups of four neighbours, without turning them: the four counts of a group are bytes of a word.

    At distance d every weight is compared with a later one. The comparison counts for the later one, d bytes up, or
    for the weight itself; lanes whose partner lies in the next group are cut off.
    """
    mask = np.empty(values.size, bool)
    size = min(CHUNK, values.size)
    magnitude, wins = np.zeros(size + 3, values.dtype), np.empty(size, bool)
    counts, other = np.empty((2, size // 4), np.uint32)
    for start in range(0, values.size, CHUNK):
        chunk, kept = values[start : start + CHUNK], mask[start : start + CHUNK]
        later_wins, words = wins[: chunk.size], wins[: chunk.size].view(np.uint32)
        count, moved = counts[: words.size], other[: words.size]
        np.abs(chunk, out=magnitude[: chunk.size])
        count.fill(_BYTES * n)
        for distance, lanes in _LANES.items():
            np.greater_equal(magnitude[distance : distance + chunk.size], magnitude[: chunk.size], out=later_wins)
            np.bitwise_and(words, lanes, out=words)
            np.left_shift(words, np.uint32(8 * distance), out=moved)
            count += moved
            np.bitwise_xor(words, lanes, out=moved)
            count += moved
        np.right_shift(count, np.uint32(2), out=count)  # n more than those that go before are four or more: it stays
        np.bitwise_and(count, _BYTES, out=kept.view(np.uint32))
    return mask


def _torch_abs(values: np.ndarray, out: np.ndarray) -> None:
    torch.abs(torch.from_numpy(values), out=torch.from_numpy(out))


def _order_in_memory(weight: torch.Tensor) -> list[int]:
    """Dimensions from the outermost to the innermost, of a contiguous weight or one in channels_last."""
    strides = weight.stride()
    order = sorted(range(weight.ndim), key=lambda d: (-strides[d], d))
    return order if weight.permute(order).is_contiguous() else list(range(weight.ndim))
