"""Regions whose vertex is, entry by entry, a function of the direction: Lp balls, K-sparse polytope, K-support ball.

Sharded directions need no gathering: thresholds and norms are all that ranks exchange.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ....distributed import gathered, is_sharded, local, shard_group, sharded_like, sum_over_shards
from ....selection import Cut, cut_on_cpu, kth_largest_magnitude
from .base import Constraint, Oracle, Tensors, check_k, count_of
from .chunks import chunks, pieces, square_sums, squared_norm, summed, wide
from .together import TogetherOracle

# From a part of the direction, in float32 or float64, to the same part of the vertex, written to the second tensor; the
# number is the position of the first entry among those of all directions on this rank.
Rule = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


class ElementwiseOracle(Oracle):
    """A vertex that is written chunk by chunk, so that nothing of the size of a weight is kept."""

    def __init__(self, directions: Tensors, dual: torch.Tensor, rule: Rule) -> None:
        self.directions, self.dual, self.rule = directions, dual, rule

    def vertex(self, index: int) -> torch.Tensor:
        direction = self.directions[index]
        part = wide(local(direction)).contiguous()
        vertex = self.rule(part, torch.empty_like(part), self._start(index))
        return sharded_like(vertex.to(direction.dtype), direction)

    def move_(self, weight: torch.Tensor, index: int, share: torch.Tensor) -> None:
        part, direction = local(weight), local(self.directions[index])
        if part.device.type != "cpu" or not (part.is_contiguous() and direction.is_contiguous()):
            super().move_(weight, index, share)
        elif self.is_valid:
            for piece, vertex in zip(chunks(part), self._pieces(index), strict=True):
                piece.lerp_(vertex.to(part.dtype), float(share))

    def inner(self, weights: Tensors) -> torch.Tensor:
        products = []
        for weight, direction in zip(weights, self.directions, strict=True):
            pieces = zip(chunks(local(weight)), chunks(local(direction)), strict=True)
            products.append(summed((wide(g).double() * w).sum() for w, g in pieces))
        return sum_over_shards(products, weights)

    def squared_distance(self, weights: Tensors) -> torch.Tensor:
        squares = []
        for index, weight in enumerate(weights):
            pieces = zip(chunks(local(weight)), self._pieces(index), strict=True)
            squares.append(square_sums(vertex.sub_(w) for w, vertex in pieces))
        return sum_over_shards(squares, weights)

    def _pieces(self, index: int) -> Iterator[torch.Tensor]:
        """The part of the vertex on this rank in chunks; the next one takes the place of the one before."""
        scratch: torch.Tensor | None = None
        start = self._start(index)
        for piece in pieces(self.directions[index]):
            scratch = torch.empty_like(piece) if scratch is None else scratch[: piece.numel()]
            yield self.rule(piece, scratch, start)
            start += piece.numel()

    def _start(self, index: int) -> int:
        return sum(local(g).numel() for g in self.directions[:index])


class LargestEntriesOracle(ElementwiseOracle):
    """The K largest entries; those that tie with the smallest of them share what is left of the K.

    Shrinking an entry hard keeps it where it is above a limit: here the number just below the threshold.
    """

    def __init__(self, directions: Tensors, cut: Cut, k: int, radius: float, is_polytope: bool) -> None:
        self.directions, self.cut, self.k = directions, cut, k
        self.radius, self.is_polytope = radius, is_polytope
        self.limit = float(np.nextafter(cut.threshold, cut.threshold.dtype.type(0)))
        self.num_missing = k - (_numel(directions) - cut.num_smaller - cut.ties.size)
        self.ties = cut.ties if self.num_missing < cut.ties.size else cut.ties[:0]

    @functools.cached_property
    def dual(self) -> torch.Tensor:  # type: ignore[override]
        threshold = float(self.cut.threshold)
        above = (torch.nn.functional.hardshrink(x, threshold) for g in self.directions for x in pieces(g))
        if self.is_polytope:
            return summed(map(_abs_sum, above)) + self.num_missing * threshold
        return (square_sums(above) + self.num_missing * threshold**2).sqrt()

    @functools.cached_property
    def is_valid(self) -> torch.Tensor:
        limits = torch.finfo(torch.float32)
        # The dual norm is at least the largest entry, at most K times it, and costs a pass.
        if limits.smallest_normal <= self.cut.largest and self.k * self.cut.largest <= limits.max:
            return torch.tensor(True)
        return super().is_valid

    def rule(self, g: torch.Tensor, out: torch.Tensor, start: int) -> torch.Tensor:
        """See `Rule`."""
        torch.ops.aten.hardshrink.out(g, self.limit, out=out)
        # A radius over a small dual norm would be more than a float32 can hold.
        out = out.sign_() if self.is_polytope else out.div_(self.dual.item())
        out.mul_(-self.radius)
        if self.ties.size:
            first, last = np.searchsorted(self.ties, (start, start + g.numel()))
            out.view(-1)[torch.from_numpy(self.ties[first:last] - start)] *= self.num_missing / self.cut.ties.size
        return out


class LpBall(Constraint):
    """{norm_p(w) <= radius} for 1 <= p <= infinity.

    Its vertex for p = 1 is one entry (of several that tie, the average), for p = 2 the normalized direction, for
    infinity the sign of every entry.

    Args:
        p: at least 1; math.inf is allowed.
        radius: see `Constraint`.
        diameter: see `Constraint`.
    """

    name = "lp"

    def __init__(self, p: float, radius: float | str | None = None, *, diameter: float | None = None) -> None:
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not p >= 1:
            raise ValueError(f"p must be a number of at least 1, math.inf for the largest entry, got {p!r}")
        super().__init__(radius, diameter=diameter)
        self.p = float(p)

    @property
    def options(self) -> dict[str, Any]:
        return {"p": self.p if self.p % 1 else int(self.p) if self.p < math.inf else self.p}

    def oracle(self, directions: Tensors, memory: Sequence[dict[str, Any]] | None = None) -> Oracle:
        radius = self.radius_of(directions)
        if self.p == 1:
            return _largest_entries(directions, 1, radius, is_polytope=True)
        if self.p == math.inf:
            dual = sum_over_shards([summed(_abs_sum(x) for x in pieces(g)) for g in directions], directions)
            return ElementwiseOracle(directions, dual, lambda g, out, _: torch.sign(g, out=out).mul_(-radius))
        if self.p == 2:
            norm = sum_over_shards([squared_norm(g) for g in directions], directions).sqrt()
            scaled: Rule = lambda g, out, _: torch.div(g, norm.to(g.dtype), out=out).mul_(-radius)  # noqa: E731
            return ElementwiseOracle(directions, norm, scaled)
        # Powers of entries over the largest one neither overflow nor vanish.
        largest, q = _largest(directions), self.p / (self.p - 1)
        powers = [summed(_power_sum(x, largest, q) for x in pieces(g)) for g in directions]
        norm = sum_over_shards(powers, directions).pow(1 / q)

        def rule(g: torch.Tensor, out: torch.Tensor, _: int) -> torch.Tensor:
            unit = torch.div(g, largest.to(g.dtype), out=out)
            return unit.abs_().pow_(q - 1).copysign_(g).mul_((-radius / norm.pow(q - 1)).to(g.dtype))

        return ElementwiseOracle(directions, largest * norm, rule)

    def gauge(self, weights: Tensors) -> torch.Tensor:
        largest = _largest(weights)
        if self.p == math.inf:
            return largest
        scale = torch.where(largest > 0, largest, 1)
        powers = [summed(_power_sum(x, scale, self.p) for x in pieces(w)) for w in weights]
        return scale * sum_over_shards(powers, weights).pow(1 / self.p)

    def diameter_of_unit_ball(self, weights: Tensors) -> float:
        # Up to p = 2 the farthest points are two opposite unit vectors, from there two opposite corners.
        return 2 * _numel(weights) ** max(0.0, 0.5 - 1 / self.p)

    @torch.no_grad()
    def project_(self, weights: Tensors) -> None:
        radius = self.radius_of(weights)
        if self.p == 2:
            self.shrink_(weights)
        elif self.p == math.inf:
            for weight in weights:
                local(weight).clamp_(-radius, radius)
        elif self.p == 1:
            excess = _excess_over(torch.cat([wide(gathered(w)).abs().flatten() for w in weights]), radius)
            for weight in weights:
                part = local(weight)
                part.copy_((wide(part).abs() - excess.to(wide(part).dtype)).clamp_(min=0).copysign_(part))
        else:
            super().project_(weights)


class KSparsePolytope(Constraint):
    """The convex hull of all tensors with exactly K entries of +-radius: an L1 ball of K times the radius in a cube.

    Args:
        k: how many entries a vertex has: a count, or a share as a float in (0, 1].
        radius: of an entry; see `Constraint`.
        diameter: see `Constraint`.

    Source: Miao et al., Learning Pruning-Friendly Networks via Frank-Wolfe, ICLR 2022.
    """

    name = "k_sparse"

    def __init__(self, k: float, radius: float | str | None = None, *, diameter: float | None = None) -> None:
        super().__init__(radius, diameter=diameter)
        self.k = check_k(k)

    @property
    def options(self) -> dict[str, Any]:
        return {"k": self.k}

    def check(self, weights: Tensors) -> None:
        total = _numel(weights)
        if isinstance(self.k, int) and self.k > total:
            raise ValueError(f"{self} keeps {self.k} entries, but the tensors that it covers have {total}")

    def oracle(self, directions: Tensors, memory: Sequence[dict[str, Any]] | None = None) -> Oracle:
        return _largest_entries(directions, self.count(directions), self.radius_of(directions), is_polytope=True)

    def kind_together(self, weights: Tensors) -> tuple[Hashable, ...] | None:
        shared = next(filter(is_sharded, weights), weights[0])
        if local(shared).device.type == "cpu" and not is_sharded(shared):
            return None  # where a call costs less than what leaves the cache
        return type(self), local(shared).device, shared.dtype, shard_group(shared)

    @classmethod
    def oracle_together(cls, balls: Sequence[Constraint], groups: Sequence[Tensors]) -> Oracle:
        pairs = [(ball, group) for ball, group in zip(balls, groups, strict=True) if isinstance(ball, KSparsePolytope)]
        counts, radii = [b.count(g) for b, g in pairs], [b.radius_of(g) for b, g in pairs]
        return TogetherOracle(groups, counts, radii, is_polytope=not issubclass(cls, KSupportBall))

    def count(self, tensors: Tensors) -> int:
        """K for these tensors."""
        self.check(tensors)
        return count_of(self.k, _numel(tensors))

    def gauge(self, weights: Tensors) -> torch.Tensor:
        total = sum_over_shards([summed(_abs_sum(x) for x in pieces(w)) for w in weights], weights)
        return torch.maximum(_largest(weights), total / self.count(weights))

    def diameter_of_unit_ball(self, weights: Tensors) -> float:
        return 2 * math.sqrt(self.count(weights))


class KSupportBall(KSparsePolytope):
    """The convex hull of all tensors with at most K entries and a Euclidean norm of at most the radius.

    Args:
        k: how many entries a vertex has: a count, or a share as a float in (0, 1].
        radius: see `Constraint`.
        diameter: see `Constraint`.

    Source: Argyriou, Foygel and Srebro, Sparse Prediction with the k-Support Norm, NIPS 2012; Zimmer, Spiegel and
    Pokutta, Compression-aware Training of Neural Networks using Frank-Wolfe, arXiv:2205.11921.
    """

    name = "k_support"

    def oracle(self, directions: Tensors, memory: Sequence[dict[str, Any]] | None = None) -> Oracle:
        return _largest_entries(directions, self.count(directions), self.radius_of(directions), is_polytope=False)

    def gauge(self, weights: Tensors) -> torch.Tensor:
        entries = torch.cat([gathered(w.detach()).abs().flatten().double() for w in weights])
        return k_support_norm(entries, self.count(weights))

    def diameter_of_unit_ball(self, weights: Tensors) -> float:
        return 2.0


def k_support_norm(magnitudes: torch.Tensor, k: int) -> torch.Tensor:
    """The k-support norm of a vector of magnitudes: Euclidean on the largest entries, L1 on the rest.

    Args:
        magnitudes: (n,), none negative.
        k: 1 to n; 1 gives the L1 norm, n the Euclidean norm.

    Source: Argyriou, Foygel and Srebro, NIPS 2012, proposition 2.1.
    """
    ordered = magnitudes.double().sort(descending=True).values
    # tail[r] is the sum of everything from entry k - r on (counted from 1), spread over r + 1 entries.
    tails = ordered.flip(0).cumsum(0).flip(0)[:k].flip(0)
    levels = tails / torch.arange(1, k + 1, device=ordered.device)
    before = torch.cat([ordered[: k - 1].flip(0), ordered.new_full((1,), torch.inf)])
    r = (before > levels).int().argmax()
    squares = torch.cat([ordered.new_zeros(1), ordered.square().cumsum(0)])
    return (squares.index_select(0, (k - 1 - r)[None])[0] + (r + 1) * levels.index_select(0, r[None])[0] ** 2).sqrt()


def _largest_entries(directions: Tensors, k: int, radius: float, is_polytope: bool) -> Oracle:
    """The K largest entries: +-radius each for a polytope, scaled to the radius otherwise.

    Entries that tie with the smallest of them share what is left of the K, so that no position is preferred: this is
    the average of the best vertices.
    """
    if {g.device.type for g in directions} == {"cpu"} and not any(map(is_sharded, directions)):
        cut = cut_on_cpu(directions, k)
        if cut is not None and len({g.dtype for g in directions}) == 1:
            return LargestEntriesOracle(directions, cut, k, radius, is_polytope)
    return TogetherOracle([directions], [k], [radius], is_polytope, is_single=True)


def _excess_over(magnitudes: torch.Tensor, radius: float) -> torch.Tensor:
    """What is taken from every magnitude so that the rest sums to the radius, 0 where it is less already."""
    ordered = magnitudes.double().sort(descending=True).values
    counts = torch.arange(1, ordered.numel() + 1, device=ordered.device)
    levels = (ordered.cumsum(0) - radius) / counts
    last = (ordered > levels).sum() - 1
    return levels.index_select(0, last.clamp(min=0)[None])[0].clamp(min=0)


def _largest(tensors: Tensors) -> torch.Tensor:
    """The largest magnitude of all tensors, on all ranks."""
    return kth_largest_magnitude(tensors, 1).double()


def _power_sum(x: torch.Tensor, scale: torch.Tensor, power: float) -> torch.Tensor:
    return (x / scale.to(x.dtype)).abs_().double().pow_(power).sum()


def _abs_sum(x: torch.Tensor) -> torch.Tensor:
    return x.abs().sum(dtype=torch.float64)


def _numel(tensors: Tensors) -> int:
    return sum(t.numel() for t in tensors)
