"""Compress a model in one shot: find the targets, let the pattern write its values. Nothing is saved here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .patterns import Pattern, parse_pattern
from .targets import find_targets


@dataclass(frozen=True)
class LayerReport:
    """One compressed weight: how many entries it has, and how many of them are not zero."""

    numel: int
    nonzero: int

    @property
    def sparsity(self) -> float:
        """Share of zeros, 0 for an empty weight."""
        return 1 - self.nonzero / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class CompressionReport:
    """What `compress` did.

    Attributes:
        pattern: canonical text.
        layers: name of every target to its `LayerReport`, skipped ones included.
        skipped: name of a target that stayed dense to the reason.
        parameters_removed: parameters that the model no longer has; zeros do not count.
    """

    pattern: str
    layers: dict[str, LayerReport]
    skipped: dict[str, str]
    parameters_removed: int = 0

    @property
    def sparsity(self) -> float:
        """Share of zeros in all targets together, the skipped ones counted."""
        total = sum(layer.numel for layer in self.layers.values())
        return 1 - sum(layer.nonzero for layer in self.layers.values()) / total if total else 0.0


def compress(
    model: nn.Module,
    pattern: str | Pattern,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> CompressionReport:
    """Compress a model in place.

    Args:
        model: any module, a transformers or timm model for instance.
        pattern: such as "unstructured:0.9" or "2:4".
        include: globs on names, see `find_targets`.
        exclude: globs on names, see `find_targets`.

    Raises:
        ValueError: for a wrong pattern or glob, a model without targets, or a NaN weight, which the message names.
            The model is then unchanged.
    """
    pattern = parse_pattern(pattern)
    targets = find_targets(model, include, exclude)
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no weight to compress: Linear, Conv and Conv1D layers are targets, "
            "embeddings, norms, biases and task heads are not"
        )
    pattern.project_(targets)
    return CompressionReport(
        pattern=str(pattern),
        layers={n: LayerReport(t.parameter.numel(), int(torch.count_nonzero(t.parameter))) for n, t in targets.items()},
        skipped={n: reason for n, t in targets.items() if (reason := pattern.skip_reason(t))},
    )
