"""A family: the dense checkpoint, the variants cut from it, and what each of them measures."""

from __future__ import annotations

from .build import build_family
from .manifest import Family, load_family
from .variant import Variant

__all__ = ["Family", "Variant", "build_family", "load_family"]
