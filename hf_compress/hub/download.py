"""Families that lie on the Hub: the manifest first, checkpoints when they are asked for."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ..family.manifest import MANIFEST, Manifest, read_manifest, verify_files
from ..family.variant import Variant
from ..loading.statistics import STATISTICS

PLOTS = "plots"
RECIPE = "recipe.yaml"
CARD = "README.md"


def is_repo_id(name: str) -> bool:
    """Whether a name could be that of a repository: "name" or "user/name"."""
    return re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name, re.ASCII) is not None


def fetch_manifest(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> Manifest:
    """Download manifest, card, recipe and plots of a family; its folder is the cache of huggingface_hub.

    Raises:
        ValueError: if there is no such repository or revision, or it holds no family.
        OSError: if the Hub refuses or cannot be reached.
    """
    try:
        folder = Path(
            snapshot_download(
                repo_id, revision=revision, token=token, allow_patterns=[MANIFEST, CARD, RECIPE, f"{PLOTS}/*"]
            )
        )
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{repo_id} is neither a folder nor a repository on the Hub that you may read; for a private one log in "
            "with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo_id} has no revision {revision}") from error
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{repo_id} holds no {MANIFEST}, so it is no family; load it with from_pretrained")
    manifest = read_manifest(folder)
    verify_files(folder, {name: digest for name, digest in manifest.files.items() if name.startswith(f"{PLOTS}/")})
    return manifest


def fetch_checkpoint(manifest: Manifest, variant: Variant, repo_id: str, token: str | bool | None = None) -> Path:
    """Download the files of a checkpoint, and verify them.

    Raises:
        ValueError: if the revision is missing, or its files are not those of the manifest.
        OSError: if the Hub refuses or cannot be reached.
    """
    files = manifest.files_of(variant)
    if variant.pattern is None and STATISTICS in manifest.files:  # on main it stands beside the checkpoint
        files[STATISTICS] = manifest.files[STATISTICS]
    # The dense checkpoint stands beside the manifest, in the commit that the manifest was read from.
    revision = manifest.folder.name if variant.pattern is None else variant.revision
    try:
        names = [glob.escape(name) for name in files]
        folder = snapshot_download(repo_id, revision=revision, token=token, allow_patterns=names)
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo_id} has no revision {revision}, which its manifest names; push it again") from error
    verify_files(Path(folder), files)
    return Path(folder)
