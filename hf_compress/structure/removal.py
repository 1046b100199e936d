"""Outputs that are removed for real: smaller layers, equal to the larger ones with zeros in those places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..calibration import in_eval_mode
from ..targets import kind_of, unwrap
from .belonging import Belonging
from .dependencies import FAILURES, call, is_depthwise
from .factored import reasons_to_stay
from .marks import mark

Lines = dict[tuple[str, str], tuple[int, ...]]  # (layer, part) to the indices that go

# What attention modules call sizes that are proportional to their number of heads.
HEAD_ATTRIBUTES = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "num_key_value_heads",
    "all_head_size",
    "attn_dim",  # timm
    "split_size",  # GPT-2
)
_ROUNDING = 1e-6  # of the largest output, for sums of other zeros
_TOLERANCE = 1e-4  # of the largest output, for one forward pass in the type of the weights


def remove(
    model: nn.Module, plan: Mapping[str, Sequence[int]], example_inputs: Any = None, belonging: Belonging | None = None
) -> int:
    """Remove outputs of layers in place, and all that goes with them.

    In eval mode the result equals the model with these outputs (weights, biases, and the scales and shifts of the norms
    that go with them) set to zero. Parameters that change are new ones: optimizers must be made anew.

    Args:
        model: any module; wrappers are looked through.
        plan: name of a layer to the indices of the outputs that go: filters of a convolution, neurons, or all rows of
            attention heads in one of the projections.
        example_inputs: see `Dependencies`; needed for filters. With it the equality is checked on these inputs.
        belonging: of this model as it is, where there is one already; it saves a forward pass.

    Returns:
        How many parameters are gone.

    Raises:
        ValueError: for an empty plan, outputs that cannot be removed exactly, with the reason, or two entries that
            contradict each other. The model is then unchanged.
    """
    model = unwrap(model)
    lines = merged(model, plan, belonging or Belonging(model, example_inputs))
    reasons = reasons_to_stay(model, is_replaced=False)
    for path, _ in lines:
        if f"{path}.weight" in reasons:
            raise ValueError(f"nothing can be removed from {path!r}: {reasons[f'{path}.weight']}")
    before = sum(p.numel() for p in model.parameters())
    if example_inputs is None:
        _cut(model, lines)
    else:
        with _checked(model, lines, example_inputs):
            _cut(model, lines)
    return before - sum(p.numel() for p in model.parameters())


def merged(model: nn.Module, plan: Mapping[str, Sequence[int]], belonging: Belonging) -> Lines:
    """What all entries of a plan remove, by layer and part.

    Raises:
        ValueError: for an empty plan, or two entries that remove different outputs of one layer.
    """
    if not plan:
        raise ValueError("the plan is empty; name a layer and the indices of outputs to remove")
    found: Lines = {}
    for path, indices in plan.items():
        for line in belonging.of(path, indices):
            known = found.setdefault((line.path, line.part), line.indices)
            if line.part == "outputs" and known != line.indices and not is_depthwise(model.get_submodule(line.path)):
                raise ValueError(
                    f"two entries of the plan, {path!r} for one, remove different outputs of {line.path!r}; "
                    "name one layer of those that go together"
                )
            found[line.path, line.part] = tuple(sorted({*known, *line.indices}))  # joined outputs lie side by side
    return found


@torch.no_grad()
def _cut(model: nn.Module, lines: Lines) -> None:
    heads = _heads(model, lines)
    for (path, part), indices in lines.items():
        module: Any = model.get_submodule(path)
        dim = 0 if part == "norm" else _dim_of(module, part)
        count = module.num_features if part == "norm" else module.weight.shape[dim]
        keep = torch.ones(count, dtype=torch.bool)
        keep[list(indices)] = False
        kept = keep.nonzero().flatten()
        for name, along in _tensors_of(module, part):
            _shrink(module, name, along, kept)
        mark(module, **sizes_of(module, part, len(kept)))
    for module, attributes in heads:
        mark(module, **attributes)


def sizes_of(module: Any, part: str, count: int) -> dict[str, int]:
    """The attributes that say how many outputs, inputs or channels a layer has."""
    if part == "norm":
        return {"num_features": count}
    kind = kind_of(module)[0]
    if kind == "conv":
        if is_depthwise(module):
            return {"in_channels": count, "out_channels": count, "groups": count}
        return {"out_channels" if part == "outputs" else "in_channels": count}
    names = ("nf", "nx") if kind == "conv1d" else ("out_features", "in_features")
    return {names[part == "inputs"]: count}


def resize(module: Any, attributes: Mapping[str, int]) -> None:
    """Give a module the sizes that `removed_layers` tells, with tensors that have no values, on the device "meta".

    Args:
        module: as its config makes it.
        attributes: checked ones.
    """
    parts = {"num_features": "norm", "out_features": "outputs", "out_channels": "outputs", "nf": "outputs"}
    parts |= {"in_features": "inputs", "in_channels": "inputs", "nx": "inputs"}
    for attribute, count in attributes.items():
        if attribute not in parts or (attribute == "in_channels" and "groups" in attributes):
            continue
        for name, dim in _tensors_of(module, parts[attribute]):
            tensor = getattr(module, name)
            shape = [count if d == dim else size for d, size in enumerate(tensor.shape)]
            new: torch.Tensor = torch.empty(shape, dtype=tensor.dtype, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(module, name, nn.Parameter(new, tensor.requires_grad) if is_parameter else new)
    mark(module, **attributes)


def _dim_of(module: nn.Module, part: str) -> int:
    reduction_dim = kind_of(module)[1]
    return reduction_dim if part == "inputs" else 1 - reduction_dim


def _tensors_of(module: Any, part: str) -> list[tuple[str, int]]:
    """The parameters and buffers of a layer that have a dimension to cut, and which."""
    if part == "norm":
        named = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        return [(name, 0) for name, tensor in named if tensor.ndim == 1]
    found = [("weight", _dim_of(module, part))]
    return [*found, ("bias", 0)] if part == "outputs" and module.bias is not None else found


def _shrink(module: nn.Module, name: str, dim: int, kept: torch.Tensor) -> None:
    tensor: Any = getattr(module, name)
    smaller = tensor.detach().index_select(dim, kept.to(tensor.device)).contiguous()
    if isinstance(tensor, nn.Parameter):
        smaller = nn.Parameter(smaller, tensor.requires_grad)
    setattr(module, name, smaller)


def _heads(model: nn.Module, lines: Lines) -> list[tuple[nn.Module, dict[str, int]]]:
    """Attention modules that lose heads, and what their attributes become."""
    found: dict[str, tuple[nn.Module, dict[str, int]]] = {}
    for (path, part), indices in lines.items():
        parent = path.rpartition(".")[0]
        module: Any = model.get_submodule(parent)
        names = [n for n in HEAD_ATTRIBUTES if type(vars(module).get(n)) is int]
        if part != "outputs" or not names or kind_of(model.get_submodule(path))[0] == "conv":
            continue
        layer: Any = model.get_submodule(path)
        count = layer.weight.shape[_dim_of(layer, part)]
        left = count - len(indices)
        changed = {name: vars(module)[name] * left // count for name in names}
        found[parent] = module, changed
    return list(found.values())


def is_unmissed(model: nn.Module, lines: Lines, inputs: Any) -> bool:
    """Whether a model in eval mode gives out the same when nobody reads what the lines remove; it is not changed."""
    with in_eval_mode(model):
        own = _output(model, inputs)
        with _zeros(model, lines, parts=("inputs",)):
            found = _output(model, inputs)
    return bool((found - own).abs().max() <= _ROUNDING * own.abs().max())


@contextmanager
def _checked(model: nn.Module, lines: Lines, inputs: Any) -> Iterator[None]:
    """Compare outputs with zeros and outputs of smaller layers; where they differ, the model gets everything back."""
    changed = {path for path, _ in lines} | {path.rpartition(".")[0] for path, _ in lines}
    own = [model.get_submodule(path) for path in changed]
    before = [{k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()} for module in own]
    roots = ", ".join(dict.fromkeys(repr(path) for path, part in lines if part == "outputs"))
    with in_eval_mode(model), _zeros(model, lines):
        wanted = _output(model, inputs)
    if not wanted.isfinite().all():
        raise ValueError(
            f"outputs of {roots} are not removed: with zeros in their place the output of the model is not finite, so "
            "that nothing can be compared; weights that are not finite come from a training that diverged"
        )
    try:
        yield
        try:
            with in_eval_mode(model):
                found = _output(model, inputs)
        except FAILURES as reason:
            message = f"outputs of {roots} cannot be removed: the model does not run without them ({reason})"
            raise ValueError(message) from reason
        error, scale = float((found - wanted).abs().max()), float(wanted.abs().max())
        if not error <= _TOLERANCE * max(scale, 1e-3):
            raise ValueError(
                f"outputs of {roots} cannot be removed exactly: without them the output of the model differs by "
                f"{error:.2g} (its largest: {scale:.2g}) from that with zeros in their place"
            )
    except BaseException:
        for module, attributes in zip(own, before, strict=True):
            vars(module).clear()
            vars(module).update(attributes)
        raise


@contextmanager
def _zeros(model: nn.Module, lines: Lines, parts: Sequence[str] = ("outputs", "norm")) -> Iterator[None]:
    """What the lines remove of these parts is zero inside; inputs read zeros where outputs are."""
    places = []
    for (path, part), indices in lines.items():
        module: Any = model.get_submodule(path)
        if part in parts:
            for name, dim in _tensors_of(module, part):
                if isinstance(getattr(module, name), nn.Parameter):
                    places.append((getattr(module, name), dim, torch.tensor(indices)))
    with torch.no_grad():
        kept = [parameter.index_select(dim, at.to(parameter.device)) for parameter, dim, at in places]
        for parameter, dim, at in places:
            parameter.index_fill_(dim, at.to(parameter.device), 0)
        try:
            yield
        finally:
            for (parameter, dim, at), values in zip(places, kept, strict=True):
                parameter.index_copy_(dim, at.to(parameter.device), values)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Products in float32, as kernels for other widths may round TF32 differently; the settings come back."""
    cudnn: Any = torch.backends.cudnn
    places: Any = (torch.backends.cuda.matmul, cudnn.conv)
    kept = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, kept, strict=True):
            place.fp32_precision = precision


@torch.no_grad()
def _output(model: nn.Module, inputs: Any) -> torch.Tensor:
    with _without_tf32():
        output: Any = call(model, inputs)
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output.double()
