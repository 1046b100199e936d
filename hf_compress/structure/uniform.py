"""Widths that a stock config has a field for: after them a smaller model is a plain one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .marks import removed_layers

_WIDTHS = ("intermediate_size", "hidden_dim", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim")


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
    made = ("out_features", "nf")
    counts = sorted({sizes[name] for _, _, sizes in removed_layers(model) for name in made if name in sizes})
    fields = [name for name in _WIDTHS if hasattr(config, name)]
    widths: list[dict[str, Any]] = [{}]
    for count in counts:
        widths += [{name: count} for name in fields]
        widths += [dict.fromkeys(fields, count)] if len(fields) > 1 else []
        widths += _ratios(model, count)
    for changes in itertools.product(widths, [{}, *_head_counts(config, counts)]):
        if any(changes):
            yield changes[0] | changes[1]


def _head_counts(config: Any, counts: list[int]) -> Iterator[dict[str, Any]]:
    """Numbers of heads whose keys or queries are as wide as some layer is now."""
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(width, int):
        return
    keys = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or width // heads
    for count in counts:
        left, rest = divmod(count, size)
        if not rest and 0 < left < keys:
            of_keys = {"num_key_value_heads": left} if hasattr(config, "num_key_value_heads") else {}
            yield {"num_attention_heads": left * heads // keys, **of_keys, "head_dim": size}


def _ratios(model: Any, count: int) -> list[dict[str, Any]]:
    """timm's vision transformers have a ratio for the width of neurons."""
    width = getattr(getattr(model, "timm_model", None), "embed_dim", None)
    if not isinstance(width, int) or int(width * (count / width)) != count:
        return []
    return [{"model_args": {**(model.config.model_args or {}), "mlp_ratio": count / width}}]


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
