"""A page in a folder, which is a static Space when it is uploaded as it is."""

from __future__ import annotations

from pathlib import Path

import yaml

from ..family.manifest import Manifest
from ..report import CheckpointReport
from .checkpoint_page import checkpoint_title, render_checkpoint
from .document import PAGE
from .family_page import family_title, render_family

_CARD = "README.md"


def save_page(subject: Manifest | CheckpointReport, folder: Path, revision: str | None = None) -> Path:
    """Write index.html, and beside it the README.md of a static Space where there is none.

    Args:
        subject: a family, or the report of a checkpoint.
        folder: made if it is not there.
        revision: of a checkpoint on the Hub.

    Returns:
        The path of the page.

    Raises:
        ValueError: as `render_family`.
    """
    if isinstance(subject, Manifest):
        title, page = family_title(subject), render_family(subject)
    else:
        title, page = checkpoint_title(subject), render_checkpoint(subject, revision)
    folder.mkdir(parents=True, exist_ok=True)
    path, card = folder / PAGE, folder / _CARD
    path.write_text(page, encoding="utf-8", newline="\n")  # its policy has hashes of the scripts, byte for byte
    if not card.exists():
        about = yaml.safe_dump({"title": title, "sdk": "static", "pinned": False}, sort_keys=False)
        card.write_text(f"---\n{about}---\n\nMade with `hf-compress report --html`.\n", encoding="utf-8")
    return path
