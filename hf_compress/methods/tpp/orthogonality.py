"""Kernel orthogonality, a baseline of TPP: all filters of a layer become orthonormal, whichever of them will go."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ...targets import unwrap
from .penalty import as_weight, exact, gradient_of, rows_of


class KernelOrthogonality:
    """weight * |W W^T - I|^2 of the filters W (N, D) of some layers; with W^T W where they are more than D.

    Args:
        model: any module; wrappers are looked through.
        paths: names of layers.
        weight: of the penalty.

    Source: Xie, Xiong and Pu, All You Need is Beyond a Good Init, CVPR 2017, arXiv:1703.01827, equation 6.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str], weight: float = 0.1) -> None:
        self._model, self._paths, self.weight = unwrap(model), list(paths), weight

    @torch.no_grad()
    def add_gradients(self, strength: float | torch.Tensor) -> None:
        """Add the gradient of the penalty, 4 weight (W W^T W - W), times the strength, to `.grad`."""
        self._add_scaled(strength, gradient_of)

    @torch.no_grad()
    def decay_(self, strength: float | torch.Tensor, rate: float) -> None:
        """Step down the penalty by itself, see `TrainabilityPenalty.decay_`."""
        self._add_scaled(strength, lambda parameter: parameter, -rate)

    @torch.no_grad()
    def values(self) -> dict[str, torch.Tensor]:
        """The penalty at strength 1, summed over layers: "orthogonality", 0-dim."""
        terms = []
        for path in self._paths:
            matrix = exact(rows_of(self._model.get_submodule(path)))
            gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
            gram.diagonal().sub_(1)
            terms.append(self.weight * gram.square().sum())
        return {"orthogonality": torch.stack(terms).sum()}

    def _add_scaled(
        self, strength: float | torch.Tensor, place: Callable[[torch.Tensor], torch.Tensor], scale: float = 1.0
    ) -> None:
        for path in self._paths:
            layer: Any = self._model.get_submodule(path)
            if layer.weight.requires_grad:
                matrix = exact(rows_of(layer))
                is_wide = matrix.shape[0] <= matrix.shape[1]
                product = (matrix @ matrix.T) @ matrix if is_wide else matrix @ (matrix.T @ matrix)
                update = product.sub_(matrix).mul_(4 * self.weight * strength)
                place(layer.weight).add_(as_weight(update, layer).to(layer.weight.dtype), alpha=scale)
