"""Outputs that change nothing: nobody reads them, or they are the same zero for every input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..targets import find_targets, kind_of, unwrap
from .belonging import Belonging
from .factored import reasons_to_stay
from .removal import Lines, is_unmissed, merged


def needless_outputs(
    model: nn.Module, example_inputs: Any, belonging: Belonging | None = None
) -> tuple[dict[str, list[int]], Lines]:
    """The filters and neurons that `remove` can take away without changing what the model gives out, in eval mode.

    These are outputs whose every reader multiplies them by zero, and outputs of empty rows that are still zero behind
    batch norm and activation. Where a batch norm makes something else of an empty row, that is the same for every
    input: one forward pass tells whether it matters.

    Args:
        model: any module; wrappers are looked through. It is not changed.
        example_inputs: see `Dependencies`.
        belonging: of this model as it is, where there is one already.

    Returns:
        A plan for `remove`, and all that it removes, by layer and part; both empty where every output is needed. At
        least one output of every layer stays.
    """
    model = unwrap(model)
    belonging = belonging or Belonging(model, example_inputs)
    stay = reasons_to_stay(model, is_replaced=False)
    plan: dict[str, list[int]] = {}
    covered: set[str] = set()
    for name in find_targets(model, include=["*"]):
        path = name.rpartition(".")[0]
        if path in covered or name in stay:
            continue
        try:
            first = merged(model, {path: [0]}, belonging)
            lines = {i: merged(model, {path: [i]}, belonging) for i in _candidates(model, path, first)}
        except ValueError:
            continue  # its outputs belong to something else, such as a sum or a head
        if any(f"{layer}.weight" in stay for layer, _ in first):
            continue
        covered |= {layer for layer, part in first if part == "outputs"}
        unread = [i for i, line in lines.items() if _is_unread(model, line)]
        silent = [i for i, line in lines.items() if i not in unread and _is_empty(model, line)]
        if gone := _checked(model, path, unread, silent, lines, example_inputs):
            plan[path] = gone
    return plan, merged(model, plan, belonging) if plan else {}


def _candidates(model: nn.Module, path: str, first: Lines) -> list[int]:
    """Outputs of empty rows, and those of empty columns of a layer that reads them; the others are not looked at.

    Args:
        model: that they are outputs of.
        path: of the layer that makes them.
        first: what belongs to the first of them.
    """
    module: Any = model.get_submodule(path)
    outputs = module.weight.shape[1 - kind_of(module)[1]]
    found = set(_empty_slices(module, 1 - kind_of(module)[1]))
    for layer in (layer for layer, part in first if part == "inputs"):
        reader: Any = model.get_submodule(layer)
        dim = kind_of(reader)[1]
        each = reader.weight.shape[dim] // outputs  # more than 1 behind a map that was flattened
        found |= {column // max(each, 1) for column in _empty_slices(reader, dim)}
    return sorted(i for i in found if i < outputs)


def _empty_slices(module: Any, dim: int) -> list[int]:
    """Positions along a dimension of a weight where all of it is zero."""
    filled = (module.weight.detach() != 0).movedim(dim, 0).flatten(1).any(1)
    found: list[int] = (~filled).nonzero().flatten().tolist()
    return found


def _checked(
    model: nn.Module, path: str, unread: list[int], silent: list[int], lines: Mapping[int, Lines], inputs: Any
) -> list[int]:
    """Those of the outputs without which the model gives out the same; one stays."""
    if silent and not is_unmissed(model, _joined([lines[i] for i in silent]), inputs):
        silent = [i for i in silent if is_unmissed(model, lines[i], inputs)]
    gone = sorted({*unread, *silent})
    module: Any = model.get_submodule(path)
    return gone[1:] if len(gone) == module.weight.shape[1 - kind_of(module)[1]] else gone


def _joined(lines: Sequence[Lines]) -> Lines:
    found: dict[tuple[str, str], set[int]] = {}
    for each in lines:
        for key, indices in each.items():
            found.setdefault(key, set()).update(indices)
    return {key: tuple(sorted(indices)) for key, indices in found.items()}


def _is_unread(model: nn.Module, lines: Lines) -> bool:
    read = [(path, indices) for (path, part), indices in lines.items() if part == "inputs"]
    return all(not _part(model, path, "inputs", indices).any() for path, indices in read)


def _is_empty(model: nn.Module, lines: Lines) -> bool:
    """Whether nothing but batch norms adds to these outputs."""
    for (path, part), indices in lines.items():
        module: Any = model.get_submodule(path)
        if part == "inputs" or isinstance(module, _BatchNorm):
            continue
        bias = getattr(module, "bias", None)
        if _part(model, path, "outputs", indices).any() or (bias is not None and bias[list(indices)].any()):
            return False
    return True


def _part(model: nn.Module, path: str, part: str, indices: Sequence[int]) -> torch.Tensor:
    module: Any = model.get_submodule(path)
    reduction_dim = kind_of(module)[1]
    dim = reduction_dim if part == "inputs" else 1 - reduction_dim
    weight: torch.Tensor = module.weight.detach()
    return weight.index_select(dim, torch.tensor(list(indices), device=weight.device))
