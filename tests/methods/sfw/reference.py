"""A second SFW, written from the formulas with numpy in float64: full sorts, full decompositions, dense vertices."""

from __future__ import annotations

import math

import numpy as np


def top(values, k):
    """The values with all but the k largest set to zero; no ties in random data."""
    kept = np.zeros_like(values)
    order = np.argsort(-values)[:k]
    kept[order] = values[order]
    return kept


def vertex(region, g, **a):
    """The LMO of one tensor."""
    r, flat = a["radius"], g.reshape(-1)
    if region == "lp":
        p = a["p"]
        if p == 1:
            v = np.sign(flat) * (np.abs(flat) == np.abs(flat).max())
        elif p == math.inf:
            v = np.sign(flat)
        else:
            q = p / (p - 1)
            v = np.sign(flat) * np.abs(flat) ** (q - 1) / (np.abs(flat) ** q).sum() ** ((q - 1) / q)
        return (-r * v).reshape(g.shape)
    if region in ("k_sparse", "k_support"):
        t = np.sign(flat) * top(np.abs(flat), a["k"])
        v = np.sign(t) if region == "k_sparse" else t / np.linalg.norm(t)
        return (-r * v).reshape(g.shape)
    if region == "group_k_support":
        norms = np.linalg.norm(g.reshape(len(g), -1), axis=1)
        t = g * (top(norms, a["k"]) > 0).reshape(-1, *[1] * (g.ndim - 1))
        return -r * t / np.linalg.norm(t)
    u, s, vt = np.linalg.svd(g.reshape(len(g), -1), full_matrices=False)
    k = a.get("k", 1)
    weights = np.ones(k) if region in ("nuclear", "spectral_k_sparse") else s[:k] / np.linalg.norm(s[:k])
    return (-r * (u[:, :k] * weights) @ vt[:k]).reshape(g.shape)


def diameter(region, n, **a):
    r, k = a["radius"], a.get("k", 1)
    if region in ("k_sparse", "spectral_k_sparse"):
        return 2 * r * math.sqrt(k)
    if region == "lp" and a["p"] > 2:
        return 2 * r * n ** (0.5 - 1 / a["p"])
    return 2 * r


def train(weight, gradients, region, lr, momentum, dampening, rescale, **a):
    """Weights after every step, for gradients that depend on the weights."""
    w, buffer, history = np.array(weight, dtype=np.float64), None, []
    for gradient in gradients:
        g = gradient(w)
        is_first = buffer is None or momentum == 0
        buffer = g.copy() if is_first else momentum * buffer + (1 - dampening) * g
        v = vertex(region, buffer, **a)
        size, full = np.linalg.norm(buffer), diameter(region, w.size, **a)
        factor = {
            "none": 1.0,
            "diameter": 1 / full,
            "gradient": size / np.linalg.norm(w - v),
            "fast_gradient": size / (full / 2),
        }[rescale]
        share = min(max(factor * lr, 0.0), 1.0)
        w = (1 - share) * w + share * v
        history.append(w.copy())
    return history
