"""What goes with the outputs of a layer, whatever it is: neurons and heads by names, all others by the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..targets import Groups, Target, kind_of, unwrap
from .coupling import find_coupled_targets
from .dependencies import Dependencies, Line, check_indices, layer_of


class Belonging:
    """What is removed together, in one model.

    Args:
        model: any module; wrappers are looked through. Nothing of it is changed.
        example_inputs: see `Dependencies`; without them only neurons of feed-forward pairs and attention heads are
            known.
    """

    def __init__(self, model: nn.Module, example_inputs: Any = None) -> None:
        self._model = unwrap(model)
        self._targets = find_coupled_targets(self._model, include=["*"])
        self._example_inputs = example_inputs
        self._graph: Dependencies | None = None

    def of(self, path: str, indices: Sequence[int]) -> tuple[Line, ...]:
        """The lines that are removed with outputs of a layer, the layer itself first.

        Args:
            path: name of a layer. Of an attention one of its projections, fused or not; its heads go as a whole.
            indices: of its outputs; of heads all rows.

        Raises:
            ValueError: see `Dependencies.of`; also for a part of a head, or without the inputs that are needed.
        """
        layer = layer_of(self._model, path)
        count = layer.weight.shape[1 - kind_of(layer)[1]]
        chosen = check_indices(path, indices, count)
        for kind in ("neurons", "heads"):
            if groups := self._groups_made(f"{path}.weight", kind):
                return self._coupled(path, kind, groups, chosen)
        if self._example_inputs is None:
            raise ValueError(
                f"what belongs to outputs of {path!r} is seen in a forward pass: give example_inputs, one sample that "
                f"{type(self._model).__name__} runs on"
            )
        if self._graph is None:
            self._graph = Dependencies(self._model, self._example_inputs)
        return self._graph.of(path, chosen)

    def _groups_made(self, name: str, kind: str) -> Groups | None:
        """The neurons or heads that a layer makes; None where it makes none, or reads them."""
        target = self._targets.get(name)
        found = target.groups[kind] if target is not None and target.groups is not None else ""
        if target is None or isinstance(found, str):
            return None
        return next((groups for groups in found if groups.dim == target.output_dim), None)

    def _coupled(self, path: str, kind: str, groups: Groups, chosen: list[int]) -> tuple[Line, ...]:
        root = self._targets[f"{path}.weight"]
        lines, members = [], _members(chosen, root, groups)
        if _expanded(members, root, groups) != chosen:
            raise ValueError(
                f"{path!r} makes {groups.count} {kind} of {_size(root, groups)} rows"
                f"{f' in each of {groups.blocks} blocks' if groups.blocks > 1 else ''}; name all rows of those that "
                "are to be removed"
            )
        for name, target in self._targets.items():
            found = target.groups[kind] if target.groups is not None else ""
            for part in found if isinstance(found, tuple) else ():
                if part.of == groups.of:
                    is_made = part.dim == target.output_dim
                    layer, indices = name.removesuffix(".weight"), tuple(_expanded(members, target, part))
                    is_root = is_made and (kind == "neurons" or layer == path)
                    lines.append(Line(layer, "outputs" if is_made else "inputs", indices, is_root, part.blocks))
        return tuple(sorted(lines, key=lambda line: line.path != path))


def _size(target: Target, groups: Groups) -> int:
    return int(target.parameter.shape[groups.dim]) // (groups.blocks * groups.count)


def _members(indices: list[int], target: Target, groups: Groups) -> list[int]:
    """The groups that have a part in these indices."""
    size = _size(target, groups)
    return sorted({index // size % groups.count for index in indices})


def _expanded(members: list[int], target: Target, groups: Groups) -> list[int]:
    """All indices of these groups, ascending."""
    layout = torch.arange(target.parameter.shape[groups.dim]).view(groups.blocks, groups.count, -1)
    found: list[int] = layout[:, members].flatten().tolist()
    return found
