"""Send a family to the Hub: only what has changed, in one commit for each revision, main last."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from ..family.manifest import MANIFEST, Manifest, sha256
from ..loading.statistics import STATISTICS
from .card import render_card, render_recipe, render_variant_card
from .download import CARD, PLOTS, RECIPE

_OF_THE_HUB = ".gitattributes"  # says which files are large; the Hub writes it
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")


@dataclass(frozen=True)
class Publication:
    """A family on the Hub.

    Attributes:
        repo_id: with the user's name.
        url: of its page.
        commits: of each revision, None where nothing had changed; main last.
    """

    repo_id: str
    url: str
    commits: dict[str, str | None]


def publish(
    manifest: Manifest,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> Publication:
    """Publish a family from its folder; `Family.push_to_hub` says how."""
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    _check_ours(api, repo.repo_id)
    commits: dict[str, str | None] = {}
    for variant in manifest.variants:
        folder = manifest.folder / variant.path
        wanted: dict[str, Path | bytes] = {name: folder / name for name in manifest.files_of(variant)}
        wanted[CARD] = render_variant_card(manifest, variant, repo.repo_id).encode()
        message = commit_message or f"{variant.pattern}, made with hf_compress"
        commits[variant.revision] = _sync(api, repo.repo_id, variant.revision, wanted, message, lambda _: True)
    wanted = _files_of_main(manifest, repo.repo_id)
    message = commit_message or f"Family of {1 + len(manifest.variants)} checkpoints, made with hf_compress"
    # What others put on main stays; weights of an older family would be loaded beside the new ones.
    commits["main"] = _sync(api, repo.repo_id, "main", wanted, message, _is_weights_or_plot)
    return Publication(repo.repo_id, repo.url, commits)


def _files_of_main(manifest: Manifest, repo_id: str) -> dict[str, Path | bytes]:
    dense = manifest.folder / manifest.dense.path
    wanted: dict[str, Path | bytes] = {name: dense / name for name in manifest.files_of(manifest.dense)}
    beside = (name for name in manifest.files if name.startswith(f"{PLOTS}/") or name == STATISTICS)
    wanted |= {name: manifest.folder / name for name in beside}
    wanted[MANIFEST] = manifest.folder / MANIFEST
    wanted[CARD] = render_card(manifest, repo_id).encode()
    if manifest.recipe:
        wanted[RECIPE] = render_recipe(manifest).encode()
    return wanted


def _check_ours(api: HfApi, repo_id: str) -> None:
    """A repository with weights but without manifest is somebody's model, not an older family."""
    names = api.list_repo_files(repo_id)
    if MANIFEST not in names and any(name.endswith(_WEIGHTS) for name in names):
        raise ValueError(
            f"{repo_id} holds weights but no {MANIFEST}, so it is no family; nothing was sent: choose another name"
        )


def _sync(
    api: HfApi,
    repo_id: str,
    revision: str,
    wanted: Mapping[str, Path | bytes],
    message: str,
    is_stale: Callable[[str], bool],
) -> str | None:
    """Make a revision hold the wanted files, without others that are stale, in one commit; None if it does already."""
    try:
        head = api.model_info(repo_id, revision=revision).sha
    except RevisionNotFoundError:
        # The first commit of a repository is empty, so that nothing of main is on the branch, not even in its history.
        first = api.list_repo_commits(repo_id)[-1].commit_id
        api.create_branch(repo_id, branch=revision, revision=first, exist_ok=True)
        head = first
    tree = api.list_repo_tree(repo_id, recursive=True, revision=head)
    there = {file.path: file for file in tree if isinstance(file, RepoFile)}
    changed = [name for name, content in wanted.items() if name not in there or not _is_equal(there[name], content)]
    stale = [name for name in there if name not in wanted and name != _OF_THE_HUB and is_stale(name)]
    if not changed and not stale:
        return None
    operations = [CommitOperationAdd(name, wanted[name]) for name in changed]
    deletions = [CommitOperationDelete(name) for name in stale]
    commit = api.create_commit(
        repo_id, [*operations, *deletions], commit_message=message, revision=revision, parent_commit=head
    )
    return commit.oid


def _is_weights_or_plot(name: str) -> bool:
    return name.endswith((*_WEIGHTS, ".index.json")) or name.startswith(f"{PLOTS}/")


def _is_equal(remote: RepoFile, content: Path | bytes) -> bool:
    """Whether the Hub has this content; git names a blob by the SHA-1 of its length and bytes."""
    if remote.lfs is not None:
        digest = sha256(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
        return bool(remote.lfs.sha256 == digest)
    size = content.stat().st_size if isinstance(content, Path) else len(content)
    if remote.size != size:
        return False
    data = content.read_bytes() if isinstance(content, Path) else content
    return bool(remote.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())
