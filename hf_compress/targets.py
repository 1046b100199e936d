"""Which weights of a model a pattern may touch, and along which axis they reduce."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Groups:
    """The slices of a weight that belong to neurons, heads or filters, which it may share with other weights.

    Dimension `dim` is laid out as (blocks, count, size): group i is the i-th slice of each block.

    Attributes:
        of: name of the groups; weights that share them have the same one.
        dim: dimension of the weight along which they lie.
        count: how many there are.
        blocks: more than 1 where several layers lie in one weight, such as query, key and value.
    """

    of: str
    dim: int
    count: int
    blocks: int = 1


@dataclass(frozen=True)
class Target:
    """A weight that may be compressed.

    Attributes:
        parameter: the weight. Linear (out, in), ConvNd (out, in / groups, *kernel), Hugging Face Conv1D (in, out).
        reduction_dim: the dimension that the layer sums over, where groups of an N:M pattern lie.
        kind: "linear", "conv" or "conv1d" (Hugging Face Conv1D, as in GPT-2).
        bias: of the same layer, one entry for each output; None where there is none.
        conv_groups: of a convolution; so many blocks of its outputs see inputs of their own.
        groups: "neurons" and "heads" to the groups that the weight has a part in, or to the reason why it has none;
            None where nobody has looked, see `structure.find_coupled_targets`.
    """

    parameter: torch.Tensor
    reduction_dim: int
    kind: str
    bias: torch.Tensor | None = None
    conv_groups: int = 1
    groups: Mapping[str, tuple[Groups, ...] | str] | None = None

    @property
    def output_dim(self) -> int:
        """The dimension in which the outputs of the layer lie."""
        return 1 if self.reduction_dim == 0 and self.parameter.ndim > 1 else 0


def find_targets(
    model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> dict[str, Target]:
    """The weights of Linear, ConvNd and Hugging Face Conv1D layers, in the order of the model.

    Left out: weights tied to an embedding, and the task head unless the model is a convolutional net. A weight that
    is used twice is found once, under its first name.

    Args:
        model: any module; wrappers (DistributedDataParallel, torch.compile) are looked through.
        include: globs on names such as "encoder.*.weight". When given, they replace the default choice: a head that
            they match is a target.
        exclude: globs on names; what they match is never a target.

    Returns:
        Name of the parameter to `Target`.

    Raises:
        ValueError: if a glob matches no weight that could be a target.
    """
    model = unwrap(model)
    candidates = dict(_candidates(model))
    for option, globs in (("include", include), ("exclude", exclude)):
        for glob in [globs] if isinstance(globs, str) else globs or ():
            if not any(_matches(name, [glob]) for name in candidates):
                raise ValueError(
                    f"{option}={glob!r} matches no weight of a Linear, Conv or Conv1D layer; "
                    f"there are: {', '.join(list(candidates)[:8])}{', ...' if len(candidates) > 8 else ''}"
                )
    if include is None:
        head = set() if _is_convolutional_net(model) else _head_parameters(model)
        chosen = {n: t for n, t in candidates.items() if id(t.parameter) not in head}
    else:
        chosen = {n: t for n, t in candidates.items() if _matches(n, include)}
    return {n: t for n, t in chosen.items() if exclude is None or not _matches(n, exclude)}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def refuse_adapters(model: nn.Module, method: str) -> None:
    """ValueError for a model with adapters of PEFT, which are trained in place of the weights that are compressed."""
    # Only a process that has imported PEFT can hold one, and this room must not import it.
    adapter: Any = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", ())
    name = next((name for name, module in model.named_modules() if isinstance(module, adapter)), None)
    if name is not None:
        raise ValueError(
            f"{name} has adapters of PEFT, which {method} would compress in place of the weights that they are "
            "added to; merge them (merge_and_unload), or prune first and train with SparsityLock, then merge_lora"
        )


def refuse_half_precision(model: nn.Module, method: str) -> None:
    """ValueError for trained weights of two bytes, in which small steps are lost."""
    dtype = next((p.dtype for p in model.parameters() if p.requires_grad and p.dtype.itemsize < 4), None)
    if dtype is not None:
        raise ValueError(
            f"weights are {dtype}, which rounds the small steps of {method} away; load the model with "
            "dtype=torch.float32, and set bf16=True for mixed precision"
        )


def _candidates(model: nn.Module) -> Iterator[tuple[str, Target]]:
    seen = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    for name, module in model.named_modules():
        kind, reduction_dim = kind_of(module)
        if not kind:
            continue
        weight = module._parameters.get("weight")  # a parametrized weight is no parameter of its module
        if weight is None or id(weight) in seen or not weight.is_floating_point():
            continue
        seen.add(id(weight))
        bias, conv_groups = module._parameters.get("bias"), module.groups if kind == "conv" else 1
        target = Target(weight, reduction_dim, kind, bias, conv_groups)
        yield (f"{name}.weight" if name else "weight"), target


def kind_of(module: nn.Module) -> tuple[str, int]:
    """What a `Target` of a layer has for `kind` and `reduction_dim`; "" for what is no target."""
    if isinstance(module, nn.Linear):
        return "linear", 1
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "conv", 1
    # Only a process that has imported transformers can hold such a layer, and this room must not import it.
    conv1d: Any = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())
    return ("conv1d", 0) if isinstance(module, conv1d) else ("", 0)


def _matches(name: str, globs: str | Sequence[str]) -> bool:
    names = (name, name.removesuffix(".weight"))
    return any(fnmatch.fnmatchcase(n, g) for g in ([globs] if isinstance(globs, str) else globs) for n in names)


def _is_convolutional_net(model: nn.Module) -> bool:
    """More than one convolution (a patch embedding is one), and no attention."""
    names = {type(m).__name__.lower() for m in model.modules()}
    convolutions = sum(isinstance(m, (nn.Conv2d, nn.Conv3d)) for m in model.modules())
    return convolutions > 1 and not any("attention" in name or "attn" in name for name in names)


# Names of task heads where a model has no separate backbone, as in T5ForQuestionAnswering and timm's distilled nets.
_HEADS = ("classifier", "score", "qa_outputs", "lm_head", "head", "head_dist", "aux_head", "classification_head")


def _head_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters behind the backbone: of transformers models, and of timm's."""
    inner: Any = getattr(model, "timm_model", model)  # TimmWrapperForImageClassification
    base = getattr(model, "base_model", None)
    heads: list[Any] = []
    if callable(getattr(inner, "get_classifier", None)):
        classifier = inner.get_classifier()
        heads += [*(classifier if isinstance(classifier, tuple) else (classifier,)), getattr(inner, "aux_head", None)]
    elif isinstance(base, nn.Module) and base is not model:
        inside = {id(p) for p in base.parameters()}
        return {id(p) for p in model.parameters()} - inside | _output_embeddings(model)
    elif hasattr(model, "config"):
        heads += [getattr(model, name, None) for name in _HEADS]
    modules = [head for head in heads if isinstance(head, nn.Module)]
    return {id(p) for head in modules for p in head.parameters()} | _output_embeddings(model)


def _output_embeddings(model: Any) -> set[int]:
    find = getattr(model, "get_output_embeddings", None)
    output = find() if callable(find) else None
    return {id(p) for p in output.parameters()} if isinstance(output, nn.Module) else set()
