"""What makes latents small and slices empty: their squares, and the norms of slices, both before rounding."""

from __future__ import annotations

import torch
from torch import nn

from .parametrization import Layer, latent_layers

ORDERS = {"l1": 1.0, "l2": 2.0, "linf": float("inf")}


def l2_prior(model: nn.Module) -> torch.Tensor:
    """The sum of squares of all latents in units of their gains, without 1/2.

    Args:
        model: that `reparametrize` has changed.
    """
    return sum_of([layer.scaled.square().sum() for layer in latent_layers(model)])


def slice_prior(model: nn.Module, order: str = "l2") -> torch.Tensor:
    """The sum of the norms of all slices of convolutions and blocks of Linear layers, in units of their gains.

    Left out are slices of one entry, whose norm favours no structure, and depthwise convolutions, which would lose
    channels. The gradient of an empty slice is zero; of entries that are equally large "linf" moves all.

    Args:
        model: that `reparametrize` has changed.
        order: "l1", "l2" or "linf".

    Raises:
        ValueError: for another order.
    """
    if order not in ORDERS:
        raise ValueError(f"order is one of {', '.join(ORDERS)}, got {order!r}")
    norms = [layer_slice_prior(layer, order) for layer in latent_layers(model) if layer.decoded.block]
    return sum_of(norms)


def layer_slice_prior(layer: Layer, order: str) -> torch.Tensor:
    """See `slice_prior`, for one layer that has blocks."""
    rows = layer.decoded.cut(layer.latent).reshape(layer.slices, -1)
    return torch.linalg.vector_norm(blocks(layer, rows), ORDERS[order], dim=1).sum() / layer.decoded.gain


def blocks(layer: Layer, rows: torch.Tensor) -> torch.Tensor:
    """Values of a layer, (slices, row), as (blocks, entries of a block)."""
    outputs = layer.decoded.block
    if outputs <= 1:
        return rows
    row = rows.shape[1]
    columns = layer.latent.shape[0 if layer.decoded.is_transposed else 1] // row
    return rows.reshape(-1, outputs, columns, row).transpose(1, 2).reshape(-1, outputs * row)


@torch.no_grad()
def slice_sparsity(model: nn.Module) -> float:
    """The share of slices, or blocks, that are empty after rounding; 0 where no layer has any."""
    empty, total = [], 0
    for layer in latent_layers(model):
        if layer.decoded.block:
            found = blocks(layer, layer.scaled.round())
            empty.append((found == 0).all(1).sum())
            total += found.shape[0]
    return sum_of(empty).item() / total if total else 0.0


def sum_of(terms: list[torch.Tensor]) -> torch.Tensor:
    """The sum of scalars; 0 for none."""
    return torch.stack(terms).sum() if terms else torch.zeros(())
