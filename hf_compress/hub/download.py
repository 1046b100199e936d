"""Families that lie on the Hub: the manifest first, checkpoints when they are asked for."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from ..family.manifest import MANIFEST, Manifest, read_manifest, verify_files
from ..family.variant import Variant
from ..loading.statistics import STATISTICS

PLOTS = "plots"
RECIPE = "recipe.yaml"
CARD = "README.md"
_HISTORY = 100  # commits of a revision that are looked through


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


def own_repository(repo_id: str, variant: Variant) -> str:
    """The repository of a variant that has one of its own, beside that of its family."""
    return f"{repo_id}-{variant.revision}"


def fetch_checkpoint(manifest: Manifest, variant: Variant, repo_id: str, token: str | bool | None = None) -> Path:
    """Download the files of a checkpoint, and verify them.

    Where a later push has changed the revision since the manifest was read, the files come from its history.

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
        return _fetch(repo_id, revision, files, token)
    except RevisionNotFoundError as error:
        try:
            return _fetch(own_repository(repo_id, variant), "main", files, token)
        except RepositoryNotFoundError:
            raise ValueError(
                f"{repo_id} has no revision {revision}, which its manifest names; push it again"
            ) from error


def _fetch(repo_id: str, revision: str, files: dict[str, str], token: str | bool | None) -> Path:
    """The files of a revision, or of the last of its earlier commits that has them."""
    names = [glob.escape(name) for name in files]

    def verified(commit: str) -> Path:
        folder = Path(snapshot_download(repo_id, revision=commit, token=token, allow_patterns=names))
        verify_files(folder, files)
        return folder

    try:
        return verified(revision)
    except ValueError:
        for commit in _commits_with(repo_id, revision, files, token):
            with suppress(ValueError):
                return verified(commit)
        raise


def _commits_with(repo_id: str, revision: str, files: dict[str, str], token: str | bool | None) -> Iterator[str]:
    """Earlier commits whose large files are those wanted; nothing where the Hub cannot be asked."""
    api = HfApi(token=token)
    try:
        for commit in api.list_repo_commits(repo_id, revision=revision)[1:_HISTORY]:
            tree = api.list_repo_tree(repo_id, recursive=True, revision=commit.commit_id)
            there = {f.path: f for f in tree if isinstance(f, RepoFile)}
            large = {name: f.lfs.sha256 for name, f in there.items() if f.lfs is not None}
            if files.keys() <= there.keys() and all(files[n] == h for n, h in large.items() if n in files):
                yield commit.commit_id
    except (OSError, OfflineModeIsEnabled):
        return
