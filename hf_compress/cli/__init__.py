"""The command line: parsing and printing only."""

from __future__ import annotations

from .run import run

__all__ = ["run"]
