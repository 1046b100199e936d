"""Regions of matrices by their singular values: nuclear ball, spectral K-sparse polytope, spectral K-support ball.

A weight is the matrix of its rows, `weight.flatten(1)`; one of one dimension is a column. Several weights together have
the singular values of all of them. A vertex needs the leading singular vectors alone, so nothing is decomposed whole:

- Exact: the eigenvectors of the Gram matrix of the short side, in float64. Cubic in the short side.
- Warm: power steps from the subspace of the step before, with a few columns in reserve of which Rayleigh-Ritz picks the
  best. They go on until the last one gained less than `_GAIN`: on random matrices that turn by up to 20 degrees a step,
  and on the momentum of real runs, a vertex then had at least 0.98 of the best value (0.999 for most). A subspace that
  finds no rest, or is `_MOST_STEPS` steps old, is computed exactly.

Warm is taken where an optimizer gives memory and the subspace with its reserve is at most half of the short side: there
it was faster at every size. A GPU is waited for in both cases, by torch's eigenvalue solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ....distributed import dealt_like, gathered, local, sharded_like, sum_over_shards
from ....selection import CHUNK
from .base import Constraint, Oracle, Tensors, check_k, count_of
from .chunks import square_sums, wide
from .elementwise import LpBall, k_support_norm
from .elementwise import _excess_over as excess_over

_RESERVE = 8
_GAIN = 0.005
_MOST_POWER_STEPS = 6
_MOST_STEPS = 100

Factors = tuple[torch.Tensor, torch.Tensor]  # (n, K) orthonormal columns, and their products with a matrix, (K, m)


class SpectralOracle(Oracle):
    """A vertex as a product of two thin factors for each weight: (rows on this rank, K) and (K, columns)."""

    def __init__(self, directions: Tensors, factors: list[Factors], dual: torch.Tensor) -> None:
        self.directions, self.factors, self.dual = directions, factors, dual

    def vertex(self, index: int) -> torch.Tensor:
        direction, (left, right) = self.directions[index], self.factors[index]
        part = (left @ right).view(local(direction).shape).to(direction.dtype)
        return sharded_like(part, direction)

    def move_(self, weight: torch.Tensor, index: int, share: torch.Tensor) -> None:
        part, (left, right) = local(weight), self.factors[index]
        if part.device.type != "cpu" or part.dtype != left.dtype or not part.is_contiguous():
            super().move_(weight, index, share)
        elif self.is_valid:
            _matrix(part).addmm_(left, right, beta=1 - float(share), alpha=float(share))

    def squared_distance(self, weights: Tensors) -> torch.Tensor:
        squares = []
        for weight, (left, right) in zip(weights, self.factors, strict=True):
            part = _matrix(local(weight))
            size = max(1, CHUNK // part.shape[1]) if part.device.type == "cpu" else max(1, part.shape[0])
            pieces = zip(part.split(size), left.split(size), strict=True)
            squares.append(square_sums(torch.addmm(wide(w), rows, right, beta=-1) for w, rows in pieces))
        return sum_over_shards(squares, weights)


class SpectralKSparsePolytope(Constraint):
    """The convex hull of all matrices with K singular values of the radius: a nuclear ball of K times the radius, cut.

    For K = 1 it is the nuclear ball, for all K the ball of the spectral norm.

    Args:
        k: how many singular values a vertex has: a count, or a share of all of them (the shorter side of a matrix) as a
            float in (0, 1].
        radius: of a singular value; see `Constraint`.
        diameter: see `Constraint`.

    Source: Zimmer, Spiegel and Pokutta, Compression-aware Training of Neural Networks using Frank-Wolfe,
    arXiv:2205.11921.
    """

    name = "spectral_k_sparse"

    def __init__(self, k: float, radius: float | str | None = None, *, diameter: float | None = None) -> None:
        super().__init__(radius, diameter=diameter)
        self.k = check_k(k)

    @property
    def options(self) -> dict[str, Any]:
        return {"k": self.k}

    def check(self, weights: Tensors) -> None:
        total = _num_values(weights)
        if isinstance(self.k, int) and self.k > total:
            raise ValueError(f"{self} keeps {self.k} singular values, but the matrices that it covers have {total}")

    def oracle(self, directions: Tensors, memory: Sequence[dict[str, Any]] | None = None) -> Oracle:
        found = _leading_factors(directions, self.count(directions), memory)
        polar = [_orthonormal_rows(rows) for _, rows in found]
        factors = [(basis, rows) for (basis, _), (rows, _) in zip(found, polar, strict=True)]
        return _oracle(
            directions, factors, torch.cat([values for _, values in polar]).sum(), self.radius_of(directions)
        )

    def count(self, tensors: Tensors) -> int:
        """K for these tensors."""
        self.check(tensors)
        return count_of(self.k, _num_values(tensors))

    def gauge(self, weights: Tensors) -> torch.Tensor:
        values = _singular_values(weights)
        return torch.maximum(values.max(), values.sum() / self.count(weights))

    def diameter_of_unit_ball(self, weights: Tensors) -> float:
        return 2 * self.count(weights) ** 0.5


class SpectralKSupportBall(SpectralKSparsePolytope):
    """The convex hull of all matrices with a rank of at most K and a Frobenius norm of at most the radius.

    For K = 1 it is the nuclear ball, for all K the L2 ball.

    Args:
        k: the rank of a vertex: a count, or a share of the full rank (the shorter side of a matrix) as a float in
            (0, 1].
        radius: see `Constraint`.
        diameter: see `Constraint`.

    Source: Zimmer, Spiegel and Pokutta, Compression-aware Training of Neural Networks using Frank-Wolfe,
    arXiv:2205.11921.
    """

    name = "spectral_k_support"

    def oracle(self, directions: Tensors, memory: Sequence[dict[str, Any]] | None = None) -> Oracle:
        radius, count = self.radius_of(directions), self.count(directions)
        if count == _num_values(directions):
            return LpBall(2, radius).oracle(directions)
        return _normalized(directions, _leading_factors(directions, count, memory), radius)

    def gauge(self, weights: Tensors) -> torch.Tensor:
        return k_support_norm(_singular_values(weights), self.count(weights))

    def diameter_of_unit_ball(self, weights: Tensors) -> float:
        return 2.0


class NuclearBall(Constraint):
    """{sum of singular values <= radius}; a vertex has rank 1.

    Args:
        radius: see `Constraint`.
        diameter: see `Constraint`.

    Source: Zimmer, Spiegel and Pokutta, Compression-aware Training of Neural Networks using Frank-Wolfe,
    arXiv:2205.11921.
    """

    name = "nuclear"

    def oracle(self, directions: Tensors, memory: Sequence[dict[str, Any]] | None = None) -> Oracle:
        return _normalized(directions, _leading_factors(directions, 1, memory), self.radius_of(directions))

    def gauge(self, weights: Tensors) -> torch.Tensor:
        return _singular_values(weights).sum()

    def diameter_of_unit_ball(self, weights: Tensors) -> float:
        return 2.0

    @torch.no_grad()
    def project_(self, weights: Tensors) -> None:
        parts = [torch.linalg.svd(_matrix(gathered(w)).double(), full_matrices=False) for w in weights]
        excess = excess_over(torch.cat([values for _, values, _ in parts]), self.radius_of(weights))
        for weight, (left, values, right) in zip(weights, parts, strict=True):
            surplus = (left * values.clamp(max=excess) @ right).view(weight.shape)
            local(weight).sub_(local(dealt_like(surplus.to(weight.dtype), weight)))


def _normalized(directions: Tensors, factors: list[Factors], radius: float) -> Oracle:
    """The best approximation of the rank of the factors, scaled to the radius."""
    norms = [torch.linalg.vector_norm(rows, dtype=torch.float64) for _, rows in factors]
    dual = torch.linalg.vector_norm(torch.stack(norms))
    return _oracle(directions, [(basis, rows / dual.to(rows.dtype)) for basis, rows in factors], dual, radius)


def _oracle(directions: Tensors, factors: list[Factors], dual: torch.Tensor, radius: float) -> Oracle:
    found = []
    for direction, (left, right) in zip(directions, factors, strict=True):
        if _is_tall(direction):
            left, right = right.T, left.T
        found.append((local(dealt_like(left * -radius, direction)), right))
    return SpectralOracle(directions, found, dual)


def _leading_factors(directions: Tensors, count: int, memory: Sequence[dict[str, Any]] | None) -> list[Factors]:
    """Short-side singular vectors of the `count` largest singular values of all matrices, and their products."""
    found = []
    for i, direction in enumerate(directions):
        matrix = wide(_matrix(gathered(direction)))
        matrix = matrix.T if _is_tall(direction) else matrix
        found.append(_leading(matrix, min(count, matrix.shape[0]), memory[i] if memory else None))
    if len(found) == 1:
        return found
    values = [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for _, rows in found]
    owners = torch.cat([torch.full_like(v, i, dtype=torch.int64) for i, v in enumerate(values)])
    counts = owners[torch.cat(values).topk(count).indices].bincount(minlength=len(found)).tolist()
    return [(basis[:, :c], rows[:c]) for (basis, rows), c in zip(found, counts, strict=True)]


def _leading(matrix: torch.Tensor, count: int, memory: dict[str, Any] | None) -> Factors:
    """The `count` leading left singular vectors, best first, of a matrix that is no higher than wide, and products."""
    size = count + _RESERVE
    if memory is None or 2 * size > matrix.shape[0]:
        basis = _exact(matrix, count)
        return basis, basis.T @ matrix
    found, age = None, memory.get("age", torch.zeros(())) + 1
    if age < _MOST_STEPS and "basis" in memory and memory["basis"].shape == (matrix.shape[0], size):
        found = _followed(matrix, memory["basis"].to(matrix))
    if found is None:
        basis, age = _exact(matrix, size), torch.zeros(())
        found = basis, basis.T @ matrix
    basis, rows = found
    norm = torch.linalg.vector_norm(rows, dtype=torch.float64)
    if norm.isfinite() and norm > 0:
        memory.update(basis=basis, age=age)
    return basis[:, :count], rows[:count]


def _followed(matrix: torch.Tensor, basis: torch.Tensor) -> Factors | None:
    """Power steps from a basis of before, and Rayleigh-Ritz; None if they find no rest, or what is not finite."""
    rows = basis.T @ matrix
    for step in range(_MOST_POWER_STEPS):
        before = torch.linalg.vector_norm(rows[:-1] if step == 0 else rows, dtype=torch.float64)
        rows = _unit(rows)
        if step == 0:  # what is new may be orthogonal to all that is known: the last one is drawn
            rows[-1] = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
        basis = torch.linalg.qr(_unit(matrix @ rows.T)).Q
        rows = basis.T @ matrix
        norm = torch.linalg.vector_norm(rows, dtype=torch.float64)
        if norm <= before * (1 + _GAIN):
            unit = _unit(rows)
            ritz = torch.linalg.eigh((unit @ unit.T).double()).eigenvectors.flip(1).to(rows.dtype)
            return basis @ ritz, ritz.T @ rows
    return None


def _exact(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` leading left singular vectors; something orthonormal for a matrix that is not finite."""
    gram = _gram(matrix)
    gram.nan_to_num_(0, 0, 0).mul_(gram.diagonal().sum().isfinite())
    into = gram.new_empty(len(gram)), gram  # LAPACK needs room for two more as large
    return torch.linalg.eigh(gram, out=into).eigenvectors[:, -count:].flip(1).to(matrix.dtype)


def _gram(matrix: torch.Tensor) -> torch.Tensor:
    """The products of all rows with each other in float64; on a CPU without a copy of the whole matrix."""
    columns = min(max(1, CHUNK // len(matrix)), matrix.shape[1]) if matrix.device.type == "cpu" else matrix.shape[1]
    room = torch.empty(len(matrix), columns, dtype=torch.float64, device=matrix.device)
    gram = room.new_zeros(len(matrix), len(matrix))
    for part in matrix.split(columns, dim=1):
        wide_part = room[:, : part.shape[1]].copy_(part)
        gram.addmm_(wide_part, wide_part.T)
    return gram


def _orthonormal_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that are orthogonal but for rounding, normalized, and their lengths, in float64.

    The largest come first, so that the noise of the smallest cannot disturb them.
    """
    basis, triangle = torch.linalg.qr(rows.T)
    lengths = triangle.diagonal()
    return (basis * lengths.sign()).T, lengths.abs().double()


def _unit(tensor: torch.Tensor) -> torch.Tensor:
    """Scaled to a largest magnitude of 1, so that squares neither overflow nor vanish."""
    largest = tensor.abs().max()
    return tensor / torch.where(largest > 0, largest, 1)


def _singular_values(weights: Tensors) -> torch.Tensor:
    return torch.cat([torch.linalg.svdvals(_matrix(gathered(w.detach())).double()) for w in weights])


def _num_values(tensors: Tensors) -> int:
    return sum(min(*_shape(t)) for t in tensors)


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(-1, 1)


def _is_tall(tensor: torch.Tensor) -> bool:
    rows, columns = _shape(tensor)
    return rows > columns


def _shape(tensor: torch.Tensor) -> tuple[int, int]:
    rows = tensor.shape[0] if tensor.ndim else 1
    return rows, tensor.numel() // rows
