"""N of every M weights along the reduction axis: the pattern that sparse tensor cores run (2:4)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch

from ..distributed import dealt_like, gathered, is_sharded, local, sharded_like
from ..targets import Target
from .base import Pattern, check_progress

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
        return {name: self._mask(target) for name, target in weights.items()}

    def _mask(self, target: Target) -> torch.Tensor:
        weight, dim = target.parameter.detach(), target.reduction_dim
        if self.skip_reason(target):
            return torch.ones_like(weight, dtype=torch.bool)
        if is_sharded(weight) and dim == 0:  # rows are dealt to ranks, so that a group may lie on two of them
            return dealt_like(_keep_n_of_m(gathered(weight), dim, self.n, self.m), weight)
        return sharded_like(_keep_n_of_m(local(weight), dim, self.n, self.m), weight)


def _keep_n_of_m(weight: torch.Tensor, dim: int, n: int, m: int) -> torch.Tensor:
    """Count for every weight of a group how many go before it; a sort would take as long as the training step."""
    groups = weight.abs().movedim(dim, -1).unflatten(-1, (-1, m))
    goes_before = torch.zeros(groups.shape, dtype=torch.int8 if m < 128 else torch.int32, device=weight.device)
    for i, j in combinations(range(m), 2):
        lower_first = groups[..., i] <= groups[..., j]
        goes_before[..., j] += lower_first
        goes_before[..., i] += ~lower_first
    return (goes_before >= m - n).flatten(-2).movedim(-1, dim)
