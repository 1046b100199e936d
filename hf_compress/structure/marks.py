"""Modules whose sizes are not those that the config of their model gives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..targets import unwrap

_MARK = "_removed_attributes"  # of a module that has changed: its attributes that did


def mark(module: nn.Module, **attributes: int) -> None:
    """Set attributes of a module, and remember that they are not those of its config."""
    changed = vars(module).setdefault(_MARK, {})
    for name, value in attributes.items():
        setattr(module, name, value)
        changed[name] = value


def is_marked(module: nn.Module) -> bool:
    """Whether a module has lost outputs or inputs."""
    return _MARK in vars(module)


def removed_layers(model: nn.Module) -> Iterator[tuple[str, Any, dict[str, int]]]:
    """Name, module and changed attributes of all that are marked."""
    for name, module in unwrap(model).named_modules():
        if is_marked(module):
            yield name, module, vars(module)[_MARK]


def forget_marks(model: nn.Module) -> None:
    """For a model whose config says it all."""
    for _, module, _ in list(removed_layers(model)):
        delattr(module, _MARK)
