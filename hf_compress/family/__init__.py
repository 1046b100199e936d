"""A family: the dense checkpoint, the variants cut from it, and what each of them measures.

Names are loaded when they are first used: the room `hub` takes the manifest from here, and is itself what a family is
published with.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_ROOM_OF = {
    "Family": "family",
    "Variant": "variant",
    "build_family": "build",
    "is_family": "family",
    "load_family": "family",
    "save_coded": "coded",
}

__all__ = ["Family", "Variant", "build_family", "is_family", "load_family", "save_coded"]

if TYPE_CHECKING:
    from .build import build_family as build_family
    from .coded import save_coded as save_coded
    from .family import Family as Family
    from .family import is_family as is_family
    from .family import load_family as load_family
    from .variant import Variant as Variant


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ROOM_OF[name]}", __name__), name)
