"""The K largest entries of several balls at once, where a call costs more than the bytes that it moves.

On an accelerator, and on shards: kernels and collectives are as many for a hundred balls as for one, but for the
thresholds of the former. No number is looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ....distributed import counts_here, is_sharded, local, sharded_like, sum_over_shards
from ....selection import kth_largest_of_shards, kth_smallest
from .base import Oracle, Tensors
from .chunks import numbers_on, wide


class TogetherOracle(Oracle):
    """Vertices of K-sparse polytopes or of K-support balls, one ball for each group of tensors.

    Entries that tie with the smallest of the K share what is left of the K. All entries on this rank lie in one tensor,
    ball after ball.

    Args:
        groups: directions of each ball, on one device; sharded ones over the same ranks.
        counts: K of each ball.
        radii: of each ball.
        is_polytope: +-radius for each entry of a vertex; scaled to the radius otherwise.
        is_single: numbers are those of the one ball, 0-dim, rather than (balls,).
    """

    def __init__(
        self,
        groups: Sequence[Tensors],
        counts: Sequence[int],
        radii: Sequence[float],
        is_polytope: bool,
        is_single: bool = False,
    ) -> None:
        self.directions = [g for group in groups for g in group]
        self.is_polytope, self.is_single = is_polytope, is_single
        self._tensors = [len(group) for group in groups]
        self._numels = [local(g).numel() for g in self.directions]
        self._sizes = [sum(local(g).numel() for g in group) for group in groups]
        self._shared = next(filter(is_sharded, self.directions), self.directions[0])
        self._counts_here = counts_here(self.directions)
        self.entries = self._flat(self.directions)
        self._radii = numbers_on(self.entries.device, radii)
        magnitudes = self.entries.abs()
        thresholds = self._thresholds(groups, magnitudes, counts)
        level = self._spread(thresholds)
        self._above = (magnitudes > level).to(level.dtype)
        self._tied = (magnitudes == level).to(level.dtype)
        tops = magnitudes.mul_(self._above)  # 0 * NaN is NaN, so that a direction with NaN is not valid
        num_above, num_tied, norm, whole = self._norms(
            (self._above, 1), (self._tied, 1), (tops, 1 + (not is_polytope)), (self.entries, 2)
        )
        missing, smallest = numbers_on(self.entries.device, counts) - num_above, thresholds.double()
        dual = norm + missing * smallest if is_polytope else (norm + missing * smallest.square()).sqrt()
        self._share_of_ties = missing / num_tied
        self._squares = whole
        self.dual = self._given(dual)

    @functools.cached_property
    def vertices(self) -> torch.Tensor:
        """All entries of all vertices on this rank; 0 in a ball whose direction has none."""
        dual, is_valid = self.dual.view(-1), self.is_valid.view(-1)
        unit = self.entries.sign() if self.is_polytope else self.entries / self._spread(dual)
        unit.mul_(torch.addcmul(self._above, self._tied, self._spread(self._share_of_ties)))
        return torch.where(self._spread(is_valid), unit.mul_(self._spread(-self._radii)), 0)

    def vertex(self, index: int) -> torch.Tensor:
        direction = self.directions[index]
        part = self.vertices.split(self._numels)[index].view(local(direction).shape)
        return sharded_like(part.to(direction.dtype), direction)

    def move_all_(self, weights: Tensors, share: torch.Tensor) -> None:
        moved = self._flat(weights).lerp_(self.vertices, self._spread(share.view(-1)))
        parts = [part.view(local(w).shape) for part, w in zip(moved.split(self._numels), weights, strict=True)]
        torch._foreach_copy_([local(w) for w in weights], parts)

    def norm(self) -> torch.Tensor:
        return self._given(self._squares.sqrt())

    def inner(self, weights: Tensors) -> torch.Tensor:
        products = self.entries.double() * self._flat(weights)
        sums = torch.stack([part.sum() for part in self._here(products)])
        return self._given(self._everywhere(self._of_balls(sums)))

    def squared_distance(self, weights: Tensors) -> torch.Tensor:
        return self._given(self._norms((self.vertices - self._flat(weights), 2))[0])

    def _thresholds(self, groups: Sequence[Tensors], magnitudes: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        if is_sharded(self._shared):
            return kth_largest_of_shards(list(zip(groups, counts, strict=True)))
        pairs = zip(magnitudes.split(self._sizes), counts, strict=True)
        return torch.stack([kth_smallest(part, part.numel() - k + 1) for part, k in pairs])

    def _norms(self, *asked: tuple[torch.Tensor, int]) -> torch.Tensor:
        """For each pair of entries and 1 or 2: the sum of magnitudes, or of squares, in every ball, (pairs, balls)."""
        found = []
        for flat, order in asked:
            norms = torch.stack(torch._foreach_norm(self._here(flat), order, dtype=torch.float64))
            found.append(self._of_balls(norms.square() if order == 2 else norms))
        return self._everywhere(torch.stack(found))

    def _here(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The part of every tensor, empty where another rank counts it."""
        parts = zip(flat.split(self._numels), self._counts_here, strict=True)
        return [part if counts else part[:0] for part, counts in parts]

    def _of_balls(self, values: torch.Tensor) -> torch.Tensor:
        """From a number of each tensor to one of each ball."""
        if max(self._tensors) == 1:
            return values
        return torch.stack([part.sum() for part in values.split(self._tensors)])

    def _everywhere(self, values: torch.Tensor) -> torch.Tensor:
        return sum_over_shards([values], [self._shared])

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """From a value of each ball to one of each entry."""
        values = values if values.dtype == torch.bool else values.to(self.entries.dtype)
        return torch.cat([v.expand(size) for v, size in zip(values.unbind(), self._sizes, strict=True)])

    def _flat(self, tensors: Tensors) -> torch.Tensor:
        return torch.cat([wide(local(t)).reshape(-1) for t in tensors])

    def _given(self, values: torch.Tensor) -> torch.Tensor:
        return values[0] if self.is_single else values
