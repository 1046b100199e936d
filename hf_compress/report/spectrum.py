"""Singular values of layers: how fast they decay.

A layer counts as a matrix of its first dimension by all others. Up to a short side of 4096 its singular values are
the roots of the eigenvalues of its Gram matrix; the ones of larger layers are not computed, only their distribution,
by Lanczos steps from a few random vectors (Ubaru, Chen, Saad, Fast estimation of tr(f(A)) via stochastic Lanczos
quadrature, 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..patterns.base import count_pruned

KEPT_RANKS = (0.25, 0.5, 0.75)
_EXACT64, _EXACT32 = 2048, 4096  # short sides; in float64 a Gram matrix of 4096 would take 134 MB, twice
_STEPS, _PROBES = 48, 4
_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Spectrum:
    """How the singular values s of a layer decay.

    Attributes:
        energy: share of the rank that is kept (0.25: the largest quarter of the s) to the share of the sum of s^2.
        stable_rank: sum of s^2 over the largest s^2.
        effective_rank: exp of the entropy of s / sum of s (Roy and Vetterli, The effective rank, 2007).
        full_rank: the number of singular values.
        method: "gram64" or "gram32" (eigenvalues of the Gram matrix in that precision), or "lanczos", an estimate:
            shares of energy come within 0.03, the stable rank within 5 %, the effective rank of a steep decay within
            20 %.
    """

    energy: dict[str, float]
    stable_rank: float
    effective_rank: float
    full_rank: int
    method: str


def measure_spectrum(weight: torch.Tensor) -> Spectrum | None:
    """The spectrum of a finite layer; None for one that is empty or all zero."""
    matrix = weight.reshape(weight.shape[0], -1) if weight.numel() else weight.reshape(0, 0)
    short = min(matrix.shape)
    if short == 0 or not bool(matrix.any()):
        return None
    if short <= _EXACT32:
        dtype = torch.float64 if short <= _EXACT64 else torch.float32
        squares = torch.linalg.eigvalsh(_gram(matrix, dtype)).double().flip(0).clamp_min(0)
        masses = torch.ones_like(squares)
        method = "gram64" if dtype == torch.float64 else "gram32"
    else:
        squares, masses = _distribution(matrix)
        method = "lanczos"
    energies = squares * masses
    total = energies.sum()
    values = squares.sqrt()
    shares = values / (values * masses).sum()
    entropy = -(masses * torch.special.xlogy(shares, shares)).sum()
    return Spectrum(
        energy={str(kept): _energy_of_rank(kept, short, masses, energies) for kept in KEPT_RANKS},
        stable_rank=float(total / squares[0]),
        effective_rank=float(entropy.exp()),
        full_rank=short,
        method=method,
    )


def _gram(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of the short side, the long side in chunks."""
    long = 0 if matrix.shape[0] > matrix.shape[1] else 1
    short = matrix.shape[1 - long]
    gram = torch.zeros(short, short, dtype=dtype)
    for part in matrix.split(max(1, _ELEMENTS // short), dim=long):
        part = part.to(dtype)
        gram.addmm_(part.T, part) if long == 0 else gram.addmm_(part, part.T)
    return gram


def _distribution(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squares of singular values in descending order, and how many each of them stands for.

    One that the Lanczos steps have found exactly stands for itself; random vectors say how many the others are.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    rows, size = max(1, _ELEMENTS // tall.shape[1]), tall.shape[1]
    squares, weights, errors = _lanczos(lambda v: _product(tall.split(rows), v), size, _STEPS, _PROBES)
    is_found = (errors < 1e-3 * squares) & (size * weights < 20)
    others = torch.where(is_found, 0, weights)
    others *= (1 - is_found.sum(1, keepdim=True) / size) / others.sum(1, keepdim=True).clamp_min(1e-30)
    squares, order = squares.clamp_min(0).flatten().sort(descending=True)
    return squares, torch.where(is_found, 1 / size, others).flatten()[order] * size / _PROBES


def _energy_of_rank(kept: float, full: int, masses: torch.Tensor, energies: torch.Tensor) -> float:
    """Share of the energy in the largest singular values; one that stands for several is cut where it must be."""
    count = full - count_pruned(1 - kept, full)
    before = masses.cumsum(0) - masses
    taken = ((count - before) / masses.clamp_min(1e-30)).clamp(0, 1)
    return float((taken * energies).sum() / energies.sum())


def _product(blocks: Iterable[torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
    """A' A v, the rows of A in blocks."""
    result = torch.zeros_like(vectors)
    for block in blocks:
        block = block.to(vectors.dtype)
        result.addmm_(block.T, block @ vectors)
    return result


def _lanczos(
    product: Callable[[torch.Tensor], torch.Tensor], size: int, steps: int, probes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eigenvalues and weights of Gauss quadrature for a symmetric matrix, from random vectors that are always the same.

    Returns:
        Three float64 tensors (probes, steps): eigenvalues, weights, which add up to 1 for each probe, and how far each
        eigenvalue is at most from one of the matrix.
    """
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(size, probes, generator=generator)
    basis = torch.zeros(steps, size, probes)
    diagonal, beside = torch.zeros(probes, steps, dtype=torch.float64), torch.zeros(probes, steps, dtype=torch.float64)
    norm, largest = vector.norm(dim=0), torch.zeros(probes)
    for k in range(steps):
        # Where nothing is left to find, what rounding leaves must not be taken for a direction.
        basis[k] = torch.where(norm > 1e-5 * largest, vector / norm.clamp_min(1e-30), 0)
        beside[:, k] = torch.where(norm > 1e-5 * largest, norm, 0)
        vector = product(basis[k])
        largest = torch.maximum(largest, vector.norm(dim=0))
        diagonal[:, k] = (vector * basis[k]).sum(0)
        for _ in range(2):  # twice is enough to stay orthogonal
            vector = vector - (basis * (basis * vector).sum(1, keepdim=True)).sum(0)
        norm = vector.norm(dim=0)
    upper = torch.diag_embed(beside[:, 1:], 1)
    values, vectors = torch.linalg.eigh(torch.diag_embed(diagonal) + upper + upper.mT)
    return values, vectors[:, 0, :].square(), (norm.double()[:, None] * vectors[:, -1, :]).abs()
