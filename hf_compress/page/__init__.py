"""One HTML page of a family, or of the report of a checkpoint, that needs no network and also is a static Space."""

from __future__ import annotations

from .checkpoint_page import render_checkpoint
from .family_page import render_family
from .space import save_page

__all__ = ["render_checkpoint", "render_family", "save_page"]
