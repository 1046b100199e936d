"""Matrices of low rank: the smallest singular values are gone. A convolution counts as its filters, one a row.

Source: best approximation by a truncated singular value decomposition, Eckart and Young, Psychometrika 1 (1936).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar

import torch

from ..distributed import dealt_like, gathered
from ..targets import Target
from .base import Pattern, Weights, check_share, checked, format_share, parse_share, revision_share

_FORMS = (
    '"low_rank:SHARE" with a share removed in [0, 1), such as low_rank:0.75, or low_rank:0.1:energy, '
    "or low_rank:0.5:parameters"
)
_OF = ("rank", "energy", "parameters")


@dataclass(frozen=True)
class LowRank(Pattern):
    """Every matrix is replaced by its best approximation of rank R, one for each layer.

    The matrix of a weight is (out, in), that of a convolution (out, in * kernel), for each of its groups its own.
    A layer of which two factors of rank R would not have fewer entries than the matrix stays dense and is reported.

    Attributes:
        share: removed, in [0, 1).
        of: what it is a share of; R is at least 1 always.
            "rank": R = floor((1 - share) * n) in a layer with n = min(rows, columns).
            "energy": the smallest R with a squared error of at most that share of the squared Frobenius norm of the
            layer. It judges the weights that it meets, so that it removes more when it is applied again.
            "parameters": of the entries of all targets together, factors counted. Singular values go in the order of
            s^2 for each entry that they cost; a large share may not be reached.
            The last two look at numbers, and so wait for the device.

    Source: share of the rank, the same in all layers, Zimmer et al., arXiv:2205.11921.
    """

    forms: ClassVar[str] = _FORMS
    share: float
    of: str = "rank"

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", check_share(self.share, _FORMS))
        if self.of not in _OF:
            raise ValueError(f"a rank is cut by {', '.join(_OF)}, got {self.of!r}; allowed: {_FORMS}")

    def __str__(self) -> str:
        return f"low_rank:{format_share(self.share)}" + ("" if self.of == "rank" else f":{self.of}")

    @classmethod
    def parse(cls, text: str) -> LowRank | None:
        name, *rest = text.split(":")
        if name != "low_rank" or "+" in text:
            return None
        if len(rest) not in (1, 2):
            raise ValueError(f"{text!r} is no pattern; allowed: {_FORMS}")
        return cls(parse_share(rest[0], _FORMS), *rest[1:])

    @property
    def revision(self) -> str:
        return f"low-rank-{revision_share(self.share)}" + ("" if self.of == "rank" else f"-{self.of}")

    def ranks(self, weights: Weights) -> dict[str, int]:
        """The rank that every weight keeps, without those that stay dense.

        Raises:
            ValueError: as `project_`.
        """
        return self._ranks(_finite(weights))

    def skip_reason(self, target: Target) -> str | None:
        """Why it stays dense whatever its values are; `skipped` knows all reasons."""
        blocks, rows, columns = matrix_shape(target)
        if not blocks * rows * columns:
            return "it is no matrix, or empty"
        rank = self._rank_of(target) if self.of == "rank" else 1
        return _growth(target, rank)

    def skipped(self, weights: Weights) -> dict[str, str]:
        targets = _finite(weights)
        ranks = self._ranks(targets)
        dense = {name: target for name, target in targets.items() if name not in ranks}
        return {n: self.skip_reason(t) or str(_growth(t, min(matrix_shape(t)[1:]))) for n, t in dense.items()}

    def select(self, weights: Mapping[str, Target]) -> dict[str, torch.Tensor]:
        raise TypeError(f"{self} cuts ranks and has no masks; project_ writes the values")

    def project_(self, weights: Weights) -> None:
        super().project_(_finite(weights))

    def compress_(self, weights: Mapping[str, Target]) -> dict[str, torch.Tensor]:
        for name, rank in self._ranks(weights).items():
            truncate_(weights[name], rank)
        return {}

    def _rank_of(self, target: Target) -> int:
        return max(1, math.floor((1 - Decimal(repr(self.share))) * min(matrix_shape(target)[1:])))

    def _ranks(self, weights: Mapping[str, Target]) -> dict[str, int]:
        matrices = {name: target for name, target in weights.items() if not self.skip_reason(target)}
        if self.of == "rank":
            return {name: self._rank_of(target) for name, target in matrices.items()}
        squares = {name: _squared_spectrum(target) for name, target in matrices.items()}
        if self.of == "energy":
            ranks = {name: _rank_of_energy(values, self.share) for name, values in squares.items()}
        else:
            ranks = _ranks_of_budget(weights, squares, self.share)
        return {name: rank for name, rank in ranks.items() if not _growth(weights[name], rank)}


@torch.no_grad()
def truncate_(target: Target, rank: int) -> None:
    """Write the best approximation of this rank in place."""
    left, right = factors(target, rank)
    weight, rows = target.parameter, (left @ right).flatten(0, 1)
    values = rows.T if target.kind == "conv1d" else rows
    weight.copy_(dealt_like(values.reshape(weight.shape).to(weight.dtype), weight))


@torch.no_grad()
def factors(target: Target, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two factors of the best approximation of this rank, which share its singular values evenly.

    Returns:
        (groups, rows, rank) and (groups, rank, columns) in float64; their product approximates the matrices.

    Raises:
        ValueError: if a weight is not finite.
    """
    matrix = _matrices(target)
    is_wide = matrix.shape[-2] <= matrix.shape[-1]
    short = matrix if is_wide else matrix.mT
    basis = _spectrum(short, target.parameter.dtype)[1][..., :rank]
    other = basis.mT @ short
    root = torch.linalg.vector_norm(other, dim=-1, keepdim=True).sqrt()
    basis, other = basis * root.mT, other / torch.where(root > 0, root, 1)
    return (basis, other) if is_wide else (other.mT, basis.mT)


def _spectrum(short: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared singular values, the largest first, and left singular vectors of (groups, short side, long side)."""
    try:
        if dtype == torch.float64:
            vectors, values, _ = torch.linalg.svd(short, full_matrices=False)
            return values.square(), vectors
        values, vectors = torch.linalg.eigh(short @ short.mT)  # in float64 exact enough for weights in float32
    except torch.linalg.LinAlgError as error:
        raise ValueError("a weight is not finite, so that it has no singular values") from error
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def _finite(weights: Weights) -> dict[str, Target]:
    targets = checked(weights)
    for name, target in targets.items():
        if not torch.isfinite(gathered(target.parameter.detach())).all():
            raise ValueError(f"weight {name!r} is not finite, so that it has no singular values")
    return targets


def _matrices(target: Target) -> torch.Tensor:
    """(groups, rows, columns) in float64."""
    weight = gathered(target.parameter.detach()).double()
    weight = weight.T if target.kind == "conv1d" else weight
    return weight.reshape(matrix_shape(target))


def matrix_shape(target: Target) -> tuple[int, int, int]:
    """How many matrices a weight is, and the rows and columns of each."""
    shape = target.parameter.shape
    if len(shape) < 2:
        return 0, 0, 0
    if target.kind == "conv1d":
        return 1, shape[1], shape[0]
    return target.conv_groups, shape[0] // target.conv_groups, math.prod(shape[1:])


def _growth(target: Target, rank: int) -> str | None:
    blocks, rows, columns = matrix_shape(target)
    factored, dense = blocks * rank * (rows + columns), blocks * rows * columns
    if factored < dense:
        return None
    return f"two factors of rank {rank} have {factored} entries, and it has {dense}"


def _squared_spectrum(target: Target) -> list[float]:
    """Squared singular values, the largest first; those of groups with the same place are added."""
    matrix = _matrices(target)
    short = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    found: list[float] = _spectrum(short, target.parameter.dtype)[0].sum(0).tolist()
    return found


def _rank_of_energy(squares: list[float], share: float) -> int:
    allowed, removed = share * math.fsum(squares), 0.0
    for rank in range(len(squares), 1, -1):
        removed += squares[rank - 1]
        if removed > allowed:
            return rank
    return 1


def _ranks_of_budget(weights: Mapping[str, Target], squares: Mapping[str, list[float]], share: float) -> dict[str, int]:
    """One singular value after the other, the most energy for an entry first, while the budget lasts."""
    sizes = {name: math.prod(target.parameter.shape) for name, target in weights.items()}
    costs = {name: matrix_shape(weights[name])[0] * sum(matrix_shape(weights[name])[1:]) for name in squares}
    ranks = dict.fromkeys(squares, 1)
    budget = math.floor((1 - Decimal(repr(share))) * sum(sizes.values()))
    spent = sum(costs.get(name, size) for name, size in sizes.items())
    offers = [(value / costs[name], name) for name, values in squares.items() for value in values[1:]]
    for _, name in sorted(offers, key=lambda offer: -offer[0]):
        price = min(costs[name], sizes[name] - ranks[name] * costs[name])  # a matrix costs no more than it is
        spent += max(0, price)
        if spent > budget:
            break
        ranks[name] += 1
    return ranks
