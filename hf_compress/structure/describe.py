"""Changed shapes as JSON, and a model that gets them back from it. What is read may come from anywhere."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..patterns.low_rank import matrix_shape
from ..targets import find_targets, unwrap
from .factored import factored_layers, new_layer, reasons_to_stay, replace_layer


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What makes the layers of a model differ from those that its config gives it, as JSON.

    Returns:
        Name of a layer to {"kind": "factored", "rank": 12}; empty for a model of plain layers.
    """
    return {name: {"kind": "factored", "rank": layer.rank} for name, layer in factored_layers(model)}


def write_description(model: nn.Module) -> None:
    """Put what `describe` says into the config of a transformers model, from where `save_pretrained` takes it."""
    config: Any = getattr(unwrap(model), "config", None)
    if config is not None and (layers := describe(model)):
        config.quantization_config = {"quant_method": "hf_compress", "layers": layers}


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
    new: dict[str, nn.Module] = {}
    for name, fields in layers.items():
        known = [n for n in (name, name.removeprefix(prefix), prefix + name) if f"{n}.weight" in targets]
        if not known and not is_whole:
            continue
        if not known or known[0] in new:
            raise ValueError(f"{name!r} is {'described twice' if known else 'no layer of this model'}")
        path = known[0]
        if f"{path}.weight" in reasons:
            raise ValueError(f"{name!r} cannot have two factors: {reasons[f'{path}.weight']}")
        full = min(matrix_shape(targets[f"{path}.weight"])[1:])
        new[path] = new_layer(modules[path], _rank(name, fields, full))
    for path, layer in new.items():
        replace_layer(model, path, layer)


def _rank(name: str, fields: Any, full: int) -> int:
    """The rank of a described layer; it bounds what is allocated."""
    if not isinstance(fields, dict) or fields.keys() != {"kind", "rank"} or fields["kind"] != "factored":
        raise ValueError(f'{name!r} is described by {fields!r}; known is {{"kind": "factored", "rank": NUMBER}}')
    rank = fields["rank"]
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank < full:
        raise ValueError(f"{name!r} has a rank of at least 1 and below {full}, got {rank!r}")
    return rank
