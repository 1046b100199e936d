"""Changed shapes as JSON, and a model that gets them back from it. What is read may come from anywhere."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..patterns.low_rank import matrix_shape
from ..targets import Target, find_targets, kind_of, unwrap
from .factored import factored_layers, new_layer, reasons_to_stay, replace_layer
from .marks import forget_marks, removed_layers
from .removal import HEAD_ATTRIBUTES, resize, sizes_of
from .uniform import fit_config


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What makes the layers of a model differ from those that its config gives it, as JSON.

    Returns:
        Name of a module to {"kind": "factored", "rank": 12} or {"kind": "removed", "out_features": 7}; empty for a
        model of plain layers.
    """
    factored = {name: {"kind": "factored", "rank": layer.rank} for name, layer in factored_layers(model)}
    return factored | {name: {"kind": "removed", **sizes} for name, _, sizes in removed_layers(model)}


def write_description(model: nn.Module) -> None:
    """Put what `describe` says into the config of a transformers model, from where `save_pretrained` takes it.

    Where the config has fields for the new widths these are set, and the model is a plain one.
    """
    model = unwrap(model)
    config: Any = getattr(model, "config", None)
    if config is None or not describe(model):
        return
    if not any(factored_layers(model)) and fit_config(model):
        forget_marks(model)
        vars(config).pop("quantization_config", None)
    else:
        config.quantization_config = {"quant_method": "hf_compress", "layers": describe(model)}


def rebuild(model: nn.Module, layers: Any, prefix: str = "", is_whole: bool = True) -> None:
    """Give a model of plain layers those of a description, without values, on the device "meta".

    Args:
        model: as its config makes it.
        layers: what `describe` gave; nothing of it is trusted.
        prefix: of the names in a model that wraps this one, or is wrapped by it: either may have been described.
        is_whole: whether layers that the model lacks are an error; otherwise they belong to a head that it does not
            have.

    Raises:
        ValueError: for anything that `describe` does not give for this model. It is unchanged then.
    """
    if not isinstance(layers, dict):
        raise ValueError(f"a description of layers is an object, got {type(layers).__name__}")
    modules = dict(model.named_modules())
    targets, reasons = find_targets(model, include=["*"]), reasons_to_stay(model)
    absent = {name for name, module in modules.items() if isinstance(module, nn.Identity)}  # a head that is not there
    new: dict[str, nn.Module | dict[str, int]] = {}
    for name, fields in layers.items():
        is_removed = isinstance(fields, dict) and fields.get("kind") == "removed"
        there = modules.keys() - absent if is_removed else {target.removesuffix(".weight") for target in targets}
        known = [n for n in (name, name.removeprefix(prefix), prefix + name) if n in there]
        if not known and not is_whole:
            continue
        if not known or known[0] in new:
            raise ValueError(f"{name!r} is {'described twice' if known else 'no layer of this model'}")
        path = known[0]
        if is_removed:
            new[path] = _sizes(name, modules[path], fields)
        else:
            weight = f"{path}.weight"
            new[path] = _factored(name, modules[path], targets[weight], fields, reasons.get(weight))
    for path, change in new.items():
        if isinstance(change, nn.Module):
            replace_layer(model, path, change)
        else:
            resize(modules[path], change)


def _factored(name: str, layer: nn.Module, target: Target, fields: Any, reason: str | None) -> nn.Module:
    if reason is not None:
        raise ValueError(f"{name!r} cannot have two factors: {reason}")
    return new_layer(layer, _rank(name, fields, min(matrix_shape(target)[1:])))


def _sizes(name: str, module: Any, fields: dict[str, Any]) -> dict[str, int]:
    """The attributes of a described module, each smaller than or equal to what it is; it bounds what is allocated."""
    given = {key: value for key, value in fields.items() if key != "kind"}
    if isinstance(module, _BatchNorm):
        allowed = set(sizes_of(module, "norm", 1))
    elif kind_of(module)[0]:
        allowed = {*sizes_of(module, "outputs", 1), *sizes_of(module, "inputs", 1)}
    else:
        allowed = {n for n in HEAD_ATTRIBUTES if type(vars(module).get(n)) is int}
    if not given or not given.keys() <= allowed:
        raise ValueError(
            f"{name!r}, a {type(module).__name__}, is described by {sorted(given)}; "
            f"known of it {f'are {sorted(allowed)}' if allowed else 'is nothing'}"
        )
    for key, value in given.items():
        most = getattr(module, key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{key} of {name!r} is a number from 1 to {most}, got {value!r}")
    if "groups" in given and len({given.get(key) for key in allowed}) > 1:
        raise ValueError(f"{name!r} has as many groups as channels, got {given}")
    return given


def _rank(name: str, fields: Any, full: int) -> int:
    """The rank of a described layer; it bounds what is allocated."""
    if not isinstance(fields, dict) or fields.keys() != {"kind", "rank"} or fields["kind"] != "factored":
        raise ValueError(f'{name!r} is described by {fields!r}; known is {{"kind": "factored", "rank": NUMBER}}')
    rank = fields["rank"]
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank < full:
        raise ValueError(f"{name!r} has a rank of at least 1 and below {full}, got {rank!r}")
    return rank
