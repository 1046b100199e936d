"""The command line: parsing and printing only."""

from __future__ import annotations

from .main import run

__all__ = ["run"]
