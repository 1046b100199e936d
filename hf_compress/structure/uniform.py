"""Widths that a stock config has a field for: after them a smaller model is a plain one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .removal import removed_layers

_WIDTHS = ("intermediate_size", "hidden_dim", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads")


def fit_config(model: Any) -> bool:
    """Set the fields of a transformers config so that it makes the model as it is; False, if none do.

    What the fields make is compared with the model, module by module, without memory for values.
    """
    for changes in _candidates(model):
        config = copy.deepcopy(model.config)
        vars(config).pop("quantization_config", None)
        for name, value in changes.items():
            setattr(config, name, value)
        if _makes(config, model):
            for name, value in changes.items():
                setattr(model.config, name, value)
            return True
    return False


def _candidates(model: Any) -> Iterator[dict[str, Any]]:
    """Fields that might say what has changed: the width of neurons, the number of heads, or both."""
    config = model.config
    sizes: dict[str, set[int]] = {}
    for _, module, attributes in removed_layers(model):
        for name, value in attributes.items():
            is_head = not isinstance(module, (nn.Linear, nn.modules.batchnorm._BatchNorm))
            if name in ("out_features", "nf") or (is_head and name in _HEADS):
                sizes.setdefault(name, set()).add(value)
    heads = {name: min(sizes[name]) for name in _HEADS if len(sizes.get(name, ())) == 1 and hasattr(config, name)}
    heads |= {"head_dim": _head_dim(model)} if heads else {}
    widths = [n for n in _WIDTHS if hasattr(config, n)]
    counts = sorted({*sizes.get("out_features", ()), *sizes.get("nf", ())})
    for count in counts:
        for changed in (
            *({name: count} for name in widths),
            *([dict.fromkeys(widths, count)] if len(widths) > 1 else ()),
        ):
            yield changed
            yield {**changed, **heads}
        if isinstance(getattr(config, "model_args", None), dict) or hasattr(config, "architecture"):
            yield from _ratios(model, count)
    if heads:
        yield heads


def _ratios(model: Any, count: int) -> Iterator[dict[str, Any]]:
    """timm's vision transformers have a ratio for the width of neurons."""
    width = getattr(getattr(model, "timm_model", None), "embed_dim", None)
    if isinstance(width, int) and int(width * (count / width)) == count:
        yield {"model_args": {**(model.config.model_args or {}), "mlp_ratio": count / width}}


def _head_dim(model: nn.Module) -> int:
    for _, module, attributes in removed_layers(model):
        size = getattr(module, "head_dim", getattr(module, "attention_head_size", None))
        if isinstance(size, int) and any(name in _HEADS for name in attributes):
            return size
    return 0


def _makes(config: Any, model: nn.Module) -> bool:
    try:
        with torch.device("meta"):
            made: nn.Module = type(model)(config)
    except Exception:  # whatever a config of these widths runs into, it is not the config of this model
        return False
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in made.state_dict().items()}:
        return False
    modules = dict(made.named_modules())
    return all(
        getattr(modules.get(name), attribute, None) == value
        for name, _, attributes in removed_layers(model)
        for attribute, value in attributes.items()
    )
