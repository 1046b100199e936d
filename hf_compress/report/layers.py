"""Which tensors of a checkpoint are weights that a pattern may touch, without loading the model.

The model is built without memory for its weights (torch's meta device) from its config, and the names on disk become
names in the model as they do in `from_pretrained`. Where nobody knows the architecture, names and shapes decide.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..loading.timm_classes import timm_class
from ..targets import Target, find_targets
from .checkpoint import Checkpoint, one_line

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Layer:
    """A target of a checkpoint.

    Attributes:
        name: of the parameter in the model.
        stored: the tensors on disk that it is made of.
        dtype: of them, in the words of safetensors.
        target: with a parameter on the meta device.
        read: gives the weight, contiguous.
    """

    name: str
    stored: tuple[str, ...]
    dtype: str
    target: Target
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Layers:
    """The targets of a checkpoint.

    Attributes:
        found: in the order of the model.
        model: without memory for its weights.
        architecture: the class that the model was built of, None where names and shapes decided.
        notes: what a user must know about the choice.
    """

    found: list[Layer]
    model: nn.Module
    architecture: str | None
    notes: list[str]


def find_layers(
    checkpoint: Checkpoint, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> Layers:
    """The targets of a checkpoint, those of `find_targets` for the loaded model.

    Raises:
        ValueError: if a glob matches nothing, or no weight can be read.
    """
    notes: list[str] = []
    model, problem = build_model(checkpoint)
    sources = _sources(checkpoint, model) if model is not None else {}
    if model is not None and not any(alias in sources for aliases in _names(model).values() for alias in aliases):
        model, problem = None, f"no weight of {type(model).__name__} is in it"
    architecture = None if model is None else type(model).__name__
    if model is None:
        notes.append(f"names and shapes decided which weights are targets: {problem}")
        model = _model_of_shapes(checkpoint)
        sources = {name: _Source((name,)) for name in checkpoint.tensors}
    names = _names(model)
    found, absent = [], []
    for name, target in find_targets(model, include, exclude).items():
        alias = next((alias for alias in names[id(target.parameter)] if alias in sources), None)
        problem = _unreadable(checkpoint, sources[alias], target) if alias else "it is not in the checkpoint"
        if alias is None or problem:
            absent.append((name, problem))
        else:
            stored = sources[alias].names
            read = _reader(checkpoint, sources[alias], alias, model)
            found.append(Layer(name, stored, checkpoint.tensors[stored[0]].dtype, target, read))
    if absent:
        notes.append(f"{len(absent)} targets are left out, first {absent[0][0]}: {absent[0][1]}")
    if not found:
        raise ValueError(f"{checkpoint.source} has no weight to compress" + "".join(f"; {note}" for note in notes))
    return Layers(found, model, architecture, notes)


def build_model(checkpoint: Checkpoint) -> tuple[Any, str]:
    """The model of a checkpoint on the meta device, or None and why there is none. No code of a checkpoint is run."""
    import transformers

    if not checkpoint.config:
        return None, "it has no config.json that can be read"
    try:
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.source, revision=checkpoint.revision, trust_remote_code=False
        )
        architecture = (config.architectures or [None])[0]
        if isinstance(config, transformers.TimmWrapperConfig):
            architecture = timm_class(config.to_dict())
            config.model_args = {k: v for k, v in (config.model_args or {}).items() if k != "num_classes"}
        with torch.device("meta"):
            if architecture is None:
                return transformers.AutoModel.from_config(config), ""
            model_class = getattr(transformers, architecture, None)
            if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
                return None, f"this transformers has no model {architecture}"
            return model_class(config), ""
    except Exception as error:  # whatever a strange config makes of a model's code
        return None, f"its model cannot be built: {one_line(error)[:200]}"


@dataclass(frozen=True)
class _Source:
    """Where a weight comes from: one tensor, or several that a converter of transformers makes it of."""

    names: tuple[str, ...]
    converter: Any = None
    first: str = ""  # the weight that the converter names its results after
    patterns: tuple[str, ...] = ()


def _sources(checkpoint: Checkpoint, model: Any) -> dict[str, _Source]:
    """Names of parameters of the model to the tensors on disk, with the renaming that `from_pretrained` does."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    sources: dict[str, _Source] = {}
    converted: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        live, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if live not in state and name in state:
            live, pattern = rename_source_key(name, [], [], prefix, state)
        if live in state and pattern is None:
            sources.setdefault(live, _Source((name,)))
        elif live in state and pattern is not None:
            converted.setdefault(live, []).append((name, pattern))
    for first, parts in converted.items():
        names, patterns = zip(*parts, strict=True)
        converter = next(c for c in converters if patterns[0] in c.source_patterns)
        source = _Source(names, converter, first, patterns)
        shapes = [torch.empty(checkpoint.tensors[name].shape, device="meta") for name in names]
        try:
            made = _convert(source, shapes, model)
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError):
            continue  # its weights are then reported as absent
        sources |= dict.fromkeys(made, source)
    return sources


def _convert(source: _Source, tensors: list[torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    converter = copy.deepcopy(source.converter)
    for name, pattern, tensor in zip(source.names, source.patterns, tensors, strict=True):
        converter.add_tensor(source.first, name, pattern, tensor)
    made = converter.convert(source.first, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _reader(checkpoint: Checkpoint, source: _Source, name: str, model: Any) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        tensors = [_decoded(checkpoint, stored) for stored in source.names]
        return (_convert(source, tensors, model)[name] if source.converter else tensors[0]).contiguous()

    return read


def _decoded(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor as it is, or codes times scales where it is stored in integers."""
    tensor = checkpoint.read(name)
    return tensor if tensor.is_floating_point() else tensor * checkpoint.read(f"{name}_scale")


def _unreadable(checkpoint: Checkpoint, source: _Source, target: Target) -> str:
    """Why a weight cannot be measured, empty if it can."""
    for name in source.names:
        stored = checkpoint.tensors[name]
        scales = checkpoint.tensors.get(f"{name}_scale")
        if stored.dtype not in _FLOATS and not (stored.dtype == "I8" and scales and scales.dtype in _FLOATS):
            return f"it is stored as {stored.dtype}"
        if source.converter is None and stored.shape != tuple(target.parameter.shape):
            return f"it is stored in the shape {list(stored.shape)}, the model has {list(target.parameter.shape)}"
    return ""


def _names(model: nn.Module) -> dict[int, list[str]]:
    """Ids of parameters to all their names: of tied weights one is stored, under any of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _model_of_shapes(checkpoint: Checkpoint) -> nn.Module:
    """A tree of layers with the names and shapes of all tensors `*.weight` of two and more dimensions.

    Two dimensions are taken for a Linear layer, more for a convolution, and what is named like an embedding for one.
    """
    from transformers.core_model_loading import dot_natural_key

    root = nn.Module()
    root.config = None  # type: ignore[assignment]  # heads are then recognized by their names
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        shape = checkpoint.tensors[name].shape
        *path, leaf = name.split(".")
        if leaf != "weight" or not path or not 2 <= len(shape) <= 5:
            continue
        module = root
        for part in path[:-1]:
            module = module._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
        layer = _layer_of_shape(".".join(path), shape)
        if path[-1] in module._modules:
            layer._modules.update(module._modules[path[-1]]._modules)  # type: ignore[union-attr]
        module._modules[path[-1]] = layer
    return root


def _layer_of_shape(path: str, shape: tuple[int, ...]) -> nn.Module:
    words = ("embed", "wte", "wpe", "shared", "relative_attention_bias")
    layer: nn.Module
    if len(shape) > 2:
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 3](1, 1, 1, bias=False, device="meta")
    elif any(word in path.lower() for word in words):
        layer = nn.Embedding(1, 1, device="meta")
    else:
        layer = nn.Linear(1, 1, bias=False, device="meta")
    if len(shape) > 2 and shape[1] == 1:
        layer.groups = shape[0]  # depthwise
    layer.weight = nn.Parameter(torch.empty(shape, device="meta"))
    return layer
