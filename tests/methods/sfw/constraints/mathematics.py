"""All regions once more, in float64 numpy: what they act on, their norms by full sorts and decompositions."""

from __future__ import annotations

import math

import numpy as np
import torch

from hf_compress.methods.sfw.constraints import (
    GroupKSupportBall,
    KSparsePolytope,
    KSupportBall,
    LpBall,
    NuclearBall,
    SpectralKSparsePolytope,
    SpectralKSupportBall,
)

RADIUS = 1.5
WITHOUT_K = {
    "l1": LpBall(1, RADIUS),
    "l1.5": LpBall(1.5, RADIUS),
    "l2": LpBall(2, RADIUS),
    "l3": LpBall(3, RADIUS),
    "linf": LpBall(math.inf, RADIUS),
    "nuclear": NuclearBall(RADIUS),
}
WITH_K = {
    "k_sparse": KSparsePolytope,
    "k_support": KSupportBall,
    "group_k_support": GroupKSupportBall,
    "spectral_k_sparse": SpectralKSparsePolytope,
    "spectral_k_support": SpectralKSupportBall,
}
NAMES = [*WITHOUT_K, *WITH_K]


def regions(name, tensors):
    """The region of that name, for k = 1, 2, half and all where it has one."""
    if name in WITHOUT_K:
        return [WITHOUT_K[name]]
    total = len(values(WITH_K[name](1, RADIUS), tensors))
    return [WITH_K[name](k, RADIUS) for k in sorted({1, min(2, total), max(1, total // 2), total})]


def middle(name, tensors):
    """The region of that name with half of everything."""
    return regions(name, tensors)[-2:][0]


def values(region, tensors):
    """The magnitudes that a region compares: of entries, of groups, or singular values."""
    arrays = [np.asarray(t.detach().double()) for t in tensors]
    if region.name == "group_k_support":
        return _norms_of_groups(region, arrays)
    if region.name in ("nuclear", "spectral_k_sparse", "spectral_k_support"):
        return np.concatenate([np.linalg.svd(_matrix(a), compute_uv=False) for a in arrays])
    return np.concatenate([np.abs(a).reshape(-1) for a in arrays])


def gauge(region, tensors):
    x = values(region, tensors)
    if region.name == "lp":
        return np.linalg.norm(x, region.p)
    if region.name == "nuclear":
        return x.sum()
    k = count(region.k, len(x))
    return max(x.max(), x.sum() / k) if region.name.endswith("k_sparse") else k_support_norm(x, k)


def dual(region, tensors):
    x = np.sort(values(region, tensors))[::-1]
    if region.name == "lp":
        q = {1: math.inf, math.inf: 1}.get(region.p) or region.p / (region.p - 1)
        return x[0] * np.linalg.norm(x / x[0], q) if x[0] else 0.0
    if region.name == "nuclear":
        return x[0]
    leading = x[: count(region.k, len(x))]
    return leading.sum() if region.name.endswith("k_sparse") else np.linalg.norm(leading)


def k_support_norm(x, k):
    """sqrt(min sum x_i^2 / t_i), 0 < t_i <= 1, sum t_i = k: t_i = min(1, x_i / level), with the level by bisection."""
    x = np.abs(x)
    if np.count_nonzero(x) <= k:
        return np.linalg.norm(x)
    low, high = 0.0, x.sum()
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if np.minimum(1, x / level).sum() > k else (low, level)
    return math.sqrt((x[x > 0] ** 2 / np.minimum(1, x[x > 0] / high)).sum())


def count(k, total):
    return k if isinstance(k, int) else max(1, math.floor(k * total))


def inner(a, b):
    return sum((x.double() * y.double()).sum().item() for x, y in zip(a, b, strict=True))


def norm(tensors):
    return math.sqrt(inner(tensors, tensors))


def randn(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def scaled_to(region, tensors, size):
    """The same direction with a gauge of `size`."""
    return [t * (size / gauge(region, tensors)) for t in tensors]


def _norms_of_groups(region, arrays):
    axes, blocks = ([n] * len(arrays) if isinstance(n, int) else n for n in (region.axes, region.blocks))
    squares = []
    for array, axis, n in zip(arrays, axes, blocks, strict=True):
        lines = (np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1) ** 2).sum(1)
        layers = np.split(lines, n)
        squares.append(sum(layer.reshape(region.groups or len(layer), -1).sum(1) for layer in layers))
    return np.sqrt(np.concatenate(squares) if region.groups is None else sum(squares))


def _matrix(array):
    return array.reshape(array.shape[0] if array.ndim else 1, -1)
