"""Regions whose vertex is, entry by entry, a function of the direction: Lp balls, K-sparse polytope, K-support ball.

Sharded directions need no gathering: thresholds and norms are all that ranks exchange.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ....distributed import gathered, local, sharded_like, sum_over_shards
from ....selection import kth_largest_magnitude
from .base import Constraint, Oracle, Tensors, check_k, count_of
from .chunks import chunks, pieces, square_sum, squared_norm, summed, wide

# From a part of the direction, in float32 or float64, to the same part of the vertex, in memory of its own.
Rule = Callable[[torch.Tensor], torch.Tensor]


class ElementwiseOracle(Oracle):
    """A vertex that is written chunk by chunk, so that nothing of the size of a weight is kept."""

    def __init__(self, directions: Tensors, dual: torch.Tensor, rule: Rule) -> None:
        self.directions, self.dual, self.rule = directions, dual, rule

    def vertex(self, index: int) -> torch.Tensor:
        direction = self.directions[index]
        return sharded_like(self.rule(wide(local(direction))).to(direction.dtype), direction)

    def move_(self, weight: torch.Tensor, index: int, share: torch.Tensor) -> None:
        part, direction = local(weight), local(self.directions[index])
        if part.device.type != "cpu" or not (part.is_contiguous() and direction.is_contiguous()):
            super().move_(weight, index, share)
        elif self.is_valid:
            share = share.to(part.dtype)
            for piece, along in zip(chunks(part), chunks(direction), strict=True):
                piece.lerp_(self.rule(wide(along)).to(part.dtype), share)

    def inner(self, weights: Tensors) -> torch.Tensor:
        products = []
        for weight, direction in zip(weights, self.directions, strict=True):
            pieces = zip(chunks(local(weight)), chunks(local(direction)), strict=True)
            products.append(summed((wide(g).double() * w).sum() for w, g in pieces))
        return sum_over_shards(products, weights)

    def squared_distance(self, weights: Tensors) -> torch.Tensor:
        squares = []
        for weight, direction in zip(weights, self.directions, strict=True):
            pieces = zip(chunks(local(weight)), chunks(local(direction)), strict=True)
            squares.append(summed(square_sum(self.rule(wide(g)).sub_(w)) for w, g in pieces))
        return sum_over_shards(squares, weights)


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
            return ElementwiseOracle(directions, dual, lambda g: g.sign().mul_(-radius))
        if self.p == 2:
            norm = sum_over_shards([squared_norm(g) for g in directions], directions).sqrt()
            return ElementwiseOracle(directions, norm, lambda g: (g / norm.to(g.dtype)).mul_(-radius))
        # Powers of entries over the largest one neither overflow nor vanish.
        largest, q = _largest(directions), self.p / (self.p - 1)
        powers = [summed(_power_sum(x, largest, q) for x in pieces(g)) for g in directions]
        norm = sum_over_shards(powers, directions).pow(1 / q)

        def rule(g: torch.Tensor) -> torch.Tensor:
            unit = g / largest.to(g.dtype)
            return unit.abs().pow_(q - 1).copysign_(g).mul_((-radius / norm.pow(q - 1)).to(g.dtype))

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
    threshold = kth_largest_magnitude(directions, k).double()
    if all(local(g).device.type == "cpu" for g in directions):
        oracle = _untied_entries(directions, k, threshold, radius, is_polytope)
        if oracle is not None:
            return oracle
    stats = sum_over_shards([summed(_stats(x, threshold) for x in pieces(g)) for g in directions], directions)
    num_above, num_tied, total, squares = stats
    missing = k - num_above
    dual = total + missing * threshold if is_polytope else (squares + missing * threshold**2).sqrt()
    weight_of_ties = missing / num_tied

    def rule(g: torch.Tensor) -> torch.Tensor:
        level = threshold.to(g.dtype)
        magnitude = g.abs()
        weights = (magnitude > level).to(g.dtype)
        weights += (magnitude == level) * weight_of_ties.to(g.dtype)
        return weights.mul_(g.sign() if is_polytope else g / dual.to(g.dtype)).mul_(-radius)

    return ElementwiseOracle(directions, dual, rule)


def _untied_entries(
    directions: Tensors, k: int, threshold: torch.Tensor, radius: float, is_polytope: bool
) -> Oracle | None:
    """`_largest_entries` where precisely K entries reach the threshold, as they do unless some tie; None otherwise.

    Shrinking an entry hard keeps it where it is above a limit: here the number just below the threshold.
    """
    dtypes = {wide(local(g)).dtype for g in directions}
    if len(dtypes) > 1:
        return None
    limit = torch.nextafter(threshold.to(dtypes.pop()), torch.zeros(())).item()

    def stats(g: torch.Tensor) -> torch.Tensor:
        kept = torch.nn.functional.hardshrink(g, limit)
        size = kept.abs().sum(dtype=torch.float64) if is_polytope else square_sum(kept)
        return torch.stack([torch.count_nonzero(kept).double(), size])

    count, size = sum_over_shards([summed(map(stats, pieces(g))) for g in directions], directions)
    if count != k:
        return None
    if is_polytope:
        return ElementwiseOracle(
            directions, size, lambda g: torch.nn.functional.hardshrink(g, limit).sign_().mul_(-radius)
        )
    dual = size.sqrt()  # a radius over a small one would be more than a float32 can hold
    return ElementwiseOracle(
        directions, dual, lambda g: torch.nn.functional.hardshrink(g, limit).div_(dual.item()).mul_(-radius)
    )


def _stats(g: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """How many entries lie above and at the threshold, and the sum and the squares of those above."""
    magnitude, level = g.abs(), threshold.to(g.dtype)
    above = torch.where(magnitude > level, magnitude, 0)
    tied = (magnitude == level).sum(dtype=torch.float64)
    return torch.stack([(above > 0).sum(dtype=torch.float64), tied, above.sum(dtype=torch.float64), square_sum(above)])


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
