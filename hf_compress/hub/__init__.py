"""Families on the Hub: the dense checkpoint on main, each variant on a revision of its own. Knows no trainer."""

from __future__ import annotations

from .card import render_card
from .download import fetch_checkpoint, fetch_manifest, is_repo_id
from .publish import Publication, publish

__all__ = ["Publication", "fetch_checkpoint", "fetch_manifest", "is_repo_id", "publish", "render_card"]
