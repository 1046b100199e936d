"""Compress a model in one shot: find the targets, let the pattern write its values or shapes. Nothing is saved here."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import structure
from .patterns import LowRank, Pattern, parse_pattern
from .patterns.base import checked
from .patterns.groups import Grouped
from .patterns.low_rank import truncate_
from .structure import Belonging, factor, factored_layers, find_coupled_targets, reasons_to_stay, write_description
from .targets import Target, find_targets, unwrap


@dataclass(frozen=True)
class LayerReport:
    """One compressed weight: how many entries it has (two factors together), and how many of them are not zero."""

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
    remove: bool = False,
    multiple_of: int = 1,
    example_inputs: Any = None,
) -> CompressionReport:
    """Compress a model in place.

    Args:
        model: any module, a transformers or timm model for instance.
        pattern: such as "unstructured:0.9", "2:4", "neurons:0.5" or "low_rank:0.75".
        include: globs on names, see `find_targets`.
        exclude: globs on names, see `find_targets`.
        remove: let shapes shrink. Layers of low rank become two layers; filters, neurons and heads are cut out, with
            the norms behind them. A transformers model that is saved then loads through `from_pretrained`, after
            `import hf_compress` unless its config can say the new widths. Layers that cannot shrink keep their shape,
            with the same values as without `remove`, and are reported as skipped. Parameters are new ones then.
        multiple_of: with `remove`, so many filters or neurons or a multiple stay, rounded up; heads are not rounded.
        example_inputs: with `remove`, a sample to run the model on, which shows what goes with filters, and checks the
            result; by default images of its own size, or token ids, for models of transformers and timm.

    Raises:
        ValueError: for a wrong pattern or glob, a model without targets or without what the pattern removes (filters,
            neurons, heads), `remove` with a pattern that removes nothing whole, or a NaN weight, which the message
            names. The model is then unchanged.
    """
    pattern = parse_pattern(pattern)
    if not isinstance(model, nn.Module):
        how = "load it with from_pretrained, or run `hf-compress compress` on its path"
        raise ValueError(f"a model is compressed, got {model!r:.80}: {how}")
    if remove and not isinstance(pattern, (LowRank, Grouped)):
        raise ValueError(
            "remove=True changes shapes, which low_rank:SHARE, filters:SHARE, neurons:SHARE and heads:SHARE can; "
            f"{pattern} writes zeros or rounds: drop it"
        )
    if type(multiple_of) is not int or multiple_of < 1:
        raise ValueError(f"multiple_of is a whole number of at least 1, got {multiple_of!r}")
    targets = find_coupled_targets(model, include, exclude)
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no weight to compress: Linear, Conv and Conv1D layers are targets, "
            "embeddings, norms, biases and task heads are not"
        )
    skipped = pattern.skipped(targets)
    before = sum(p.numel() for p in model.parameters())
    weights = {name: [target.parameter] for name, target in targets.items()}
    if isinstance(pattern, LowRank) and remove:
        ranks = pattern.ranks(targets)
        stay = _factor(model, ranks, targets)
        skipped |= stay
        layers = dict(factored_layers(model))
        for name in ranks.keys() - stay.keys():
            layer = layers[name.rpartition(".")[0]]
            weights[name] = [layer.weight, layer.factor.weight]
    elif isinstance(pattern, Grouped) and remove:
        multiple = 1 if pattern.name == "heads" else multiple_of
        skipped |= _remove(model, pattern, targets, multiple, example_inputs)
        weights = {name: [unwrap(model).get_parameter(name)] for name in targets}
    else:
        pattern.project_(targets)
    return CompressionReport(
        pattern=str(pattern),
        layers={name: _report(parts) for name, parts in weights.items()},
        skipped=skipped,
        parameters_removed=before - sum(p.numel() for p in model.parameters()),
    )


def _factor(model: nn.Module, ranks: dict[str, int], targets: dict[str, Target]) -> dict[str, str]:
    """Replace layers by two factors; why some are not, which get the same values in their shape."""
    reasons = reasons_to_stay(model) | merged_on_disk(unwrap(model), ranks)
    stay = {name: f"it keeps its shape: {reasons[name]}" for name in ranks if name in reasons}
    for name in stay:
        truncate_(targets[name], ranks[name])
    factor(model, {name: rank for name, rank in ranks.items() if name not in stay})
    write_description(model)
    return stay


@torch.no_grad()
def _remove(
    model: nn.Module, pattern: Grouped, targets: dict[str, Target], multiple_of: int, example_inputs: Any
) -> dict[str, str]:
    """Cut groups out; why some weights keep their shape, which get zeros there."""
    example_inputs = structure.example_inputs(model) if example_inputs is None else example_inputs
    kept = pattern.kept(checked(targets), multiple_of)
    on_disk = merged_on_disk(unwrap(model), targets)
    belonging = Belonging(model, example_inputs)
    plan, stay = structure.plan_removal(model, targets, kept, belonging, on_disk)
    if plan:
        structure.remove(model, plan, example_inputs, belonging)
    now = find_targets(model, include=["*"])  # the inputs of those that stay may have shrunk
    pattern.write_({name: now[name] for name in stay}, {name: kept[name] for name in stay})
    write_description(model)
    return {name: f"it keeps its shape: {reason}" for name, reason in stay.items()}


def merged_on_disk(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Weights of which a checkpoint of transformers has several in one tensor, which takes equal shapes."""
    if not hasattr(model, "save_pretrained") or "transformers.modeling_utils" not in sys.modules:
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions = getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model, add_legacy=False)
    merging = [c.reverse_transform() for c in conversions if getattr(c, "operations", None)]
    merged = [name for name in names if any(c.rename_source_key(name)[1] for c in merging)]
    return dict.fromkeys(merged, "on disk it lies in one tensor with others")


def _report(weights: list[torch.Tensor]) -> LayerReport:
    return LayerReport(sum(w.numel() for w in weights), sum(int(torch.count_nonzero(w)) for w in weights))
