"""Outputs that change nothing: nobody reads them, or they are the same zero for every input."""

from __future__ import annotations

from collections.abc import Sequence
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
    for name, target in find_targets(model, include=["*"]).items():
        path = name.rpartition(".")[0]
        if path in covered or name in stay:
            continue
        try:
            lines = [merged(model, {path: [i]}, belonging) for i in range(target.parameter.shape[target.output_dim])]
        except ValueError:
            continue  # its outputs belong to something else, such as a sum or a head
        if any(f"{layer}.weight" in stay for layer, _ in lines[0]):
            continue
        covered |= {layer for layer, part in lines[0] if part == "outputs"}
        unread = [i for i, line in enumerate(lines) if _is_unread(model, line)]
        silent = [i for i, line in enumerate(lines) if i not in unread and _is_empty(model, line)]
        if gone := _checked(model, path, unread, silent, lines, example_inputs):
            plan[path] = gone
    return plan, merged(model, plan, belonging) if plan else {}


def _checked(
    model: nn.Module, path: str, unread: list[int], silent: list[int], lines: Sequence[Lines], inputs: Any
) -> list[int]:
    """Those of the outputs without which the model gives out the same; one stays."""
    if silent and not is_unmissed(model, _joined([lines[i] for i in silent]), inputs):
        silent = [i for i in silent if is_unmissed(model, lines[i], inputs)]
    gone = sorted({*unread, *silent})
    return gone[1:] if len(gone) == len(lines) else gone


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
