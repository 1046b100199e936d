"""Layers whose matrix is stored as a product of two, and how a model gets them.

The second factor keeps the name of the weight, with a shape that the weight can never have: whoever does not know
these layers is stopped by it, and never goes on with random weights.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..distributed import is_sharded
from ..patterns.low_rank import factors
from ..targets import find_targets, unwrap
from .marks import is_marked


class _Factored:
    """Goes before a layer of torch, which then reads what the layer `factor` makes of the input."""

    factor: nn.Module

    @property
    def rank(self) -> int:
        """Of each matrix, which a convolution has one of for each of its groups."""
        weight: torch.Tensor = self.factor.weight  # type: ignore[assignment]
        return weight.shape[0] // int(getattr(self, "groups", 1))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(self.factor(input))  # type: ignore[misc]


class FactoredLinear(_Factored, nn.Linear):
    """weight (out, rank) times factor.weight (rank, in), and a bias.

    Args:
        layer: a Linear or Hugging Face Conv1D in whose place it comes; its parameters are not taken over, and these
            here have no values, on the device "meta".
        rank: at least 1.
    """

    def __init__(self, layer: Any, rank: int) -> None:
        outputs, inputs = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
        options: dict[str, Any] = {"device": "meta", "dtype": layer.weight.dtype}
        nn.Linear.__init__(self, rank, outputs, layer.bias is not None, **options)
        self.in_features = inputs  # of the layer as others see it
        self.factor = nn.Linear(inputs, rank, False, **options)


class _FactoredConv(_Factored):
    def __init__(self, layer: Any, rank: int) -> None:
        kind: Any = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(layer, kind))
        options: dict[str, Any] = {"device": "meta", "dtype": layer.weight.dtype}
        inner, groups = layer.groups * rank, layer.groups
        kind.__init__(self, inner, layer.out_channels, 1, groups=groups, bias=layer.bias is not None, **options)
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        same = {name: getattr(layer, name) for name in names}
        self.factor = kind(layer.in_channels, inner, bias=False, **same, **options)


class FactoredConv1d(_FactoredConv, nn.Conv1d):
    """weight (out, rank, 1) behind factor, a convolution that keeps stride, padding, dilation and groups.

    Args:
        layer: a convolution in whose place it comes, see `FactoredLinear`.
        rank: of each group, at least 1.
    """


class FactoredConv2d(_FactoredConv, nn.Conv2d):
    """weight (out, rank, 1, 1) behind factor, see `FactoredConv1d`."""


class FactoredConv3d(_FactoredConv, nn.Conv3d):
    """weight (out, rank, 1, 1, 1) behind factor, see `FactoredConv1d`."""


def reasons_to_stay(model: nn.Module, is_replaced: bool = True) -> dict[str, str]:
    """Why layers cannot be replaced, for the names of their weights; the others can.

    Args:
        model: any module; wrappers are looked through.
        is_replaced: False where the layer stays and only its sizes change.
    """
    model = unwrap(model)
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    modules, reasons = dict(model.named_modules()), {}
    for name, target in find_targets(model, include=["*"]).items():
        path = name.rpartition(".")[0]
        reason = _reason_to_stay(modules[path], modules[path.rpartition(".")[0]], is_replaced)
        if uses[id(target.parameter)] > 1:
            reason = "several layers share it"
        if is_sharded(target.parameter):
            reason = "its rows are dealt to several processes"
        if reason is None and is_replaced and not path:
            reason = "it is the model itself"
        if reason is not None:
            reasons[name] = reason
    return reasons


def new_layer(layer: nn.Module, rank: int) -> nn.Module:
    """The layer in two factors that comes in the place of another, without values."""
    classes = {nn.Conv1d: FactoredConv1d, nn.Conv2d: FactoredConv2d, nn.Conv3d: FactoredConv3d}
    kind: Any = next((ours for theirs, ours in classes.items() if isinstance(layer, theirs)), FactoredLinear)
    new: nn.Module = kind(layer, rank).train(layer.training)
    return new


def factor(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Replace layers in place by two factors of the best approximation of their weights; biases are taken over.

    Args:
        model: any module; wrappers are looked through.
        ranks: name of a weight to the rank that it keeps; none of `reasons_to_stay`.
    """
    model = unwrap(model)
    targets = find_targets(model, include=["*"])
    for name, rank in ranks.items():
        target, path = targets[name], name.rpartition(".")[0]
        layer: Any = model.get_submodule(path)
        new: Any = new_layer(layer, rank)
        for place, values in zip((new, new.factor), factors(target, rank), strict=True):
            values = values.to(target.parameter.dtype).reshape(place.weight.shape).contiguous()
            place.weight = nn.Parameter(values, target.parameter.requires_grad)
        if layer.bias is not None:
            new.bias = layer.bias
        replace_layer(model, path, new)


def replace_layer(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put a layer into the place of another."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def factored_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers in two factors and their names."""
    return ((name, module) for name, module in unwrap(model).named_modules() if isinstance(module, _Factored))


def _reason_to_stay(layer: Any, parent: nn.Module, is_replaced: bool) -> str | None:
    conv1d: Any = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", nn.Linear)
    plain = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, conv1d)}
    if isinstance(layer, _Factored) or isinstance(parent, _Factored):
        return "it is a factor already"
    if is_replaced and is_marked(layer):
        return "it has lost outputs or inputs already"
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return f"{type(parent).__name__} does not call the layer, but reads its weight"
    if not is_replaced:
        return None
    if type(layer).forward not in plain or "forward" in vars(layer):
        return f"{type(layer).__name__} is more than its matrix"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "the layer has hooks"
    return None
