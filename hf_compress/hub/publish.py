"""Send a family to the Hub: only what has changed, in one commit for each revision, main last."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from ..family.manifest import MANIFEST, Manifest, sha256
from ..family.variant import Variant
from ..loading.statistics import STATISTICS
from .card import render_card, render_recipe, render_variant_card
from .download import CARD, PLOTS, RECIPE, own_repository
from .retry import Retry

_OF_THE_HUB = ".gitattributes"  # says which files are large; the Hub writes it
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")
_TITLE = 59  # characters of a collection's title at most


@dataclass(frozen=True)
class Publication:
    """A family on the Hub.

    Attributes:
        repo_id: with the user's name.
        url: of its page.
        commits: of each revision, None where nothing had changed; main last.
        pull_request: url of the one that holds what is new on main, None where main was written to.
        collection: url of the collection of own repositories, None without these.
    """

    repo_id: str
    url: str
    commits: dict[str, str | None]
    pull_request: str | None = None
    collection: str | None = None


def publish(
    manifest: Manifest,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    own_repositories: bool = False,
) -> Publication:
    """Publish a family from its folder; `Family.push_to_hub` says how."""
    api, retry = HfApi(token=token), Retry()
    _check_secrets(manifest, token)
    repo = retry(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    push = _Push(manifest, api, repo.repo_id, retry, commit_message, private, create_pr, overwrite, own_repositories)
    push.inherit_privacy()
    push.check_ours(repo.repo_id, lambda: MANIFEST in api.list_repo_files(repo.repo_id))
    commits = push.all_revisions()
    if retry.met_another_push:  # its variants may stand where ours are named
        again = push.all_revisions()
        commits = {revision: again[revision] or commit for revision, commit in commits.items()}
    collection = push.collect() if own_repositories else None
    return Publication(repo.repo_id, repo.url, commits, push.pull_request, collection)


@dataclass
class _Push:
    """What is the same for all revisions."""

    manifest: Manifest
    api: HfApi
    repo_id: str
    retry: Retry
    message: str | None
    private: bool | None
    create_pr: bool
    overwrite: bool
    own_repositories: bool
    pull_request: str | None = field(default=None, init=False)

    def all_revisions(self) -> dict[str, str | None]:
        """Variants first: the manifest on main names only what is there."""
        commits = {v.revision: self._variant(v) for v in self.manifest.variants}
        if self.pull_request is not None:  # it holds what is new on main
            return {**commits, "main": None}
        message = self.message or f"Family of {1 + len(self.manifest.variants)} checkpoints, made with hf_compress"
        wanted = self._files_of_main()
        # What others put on main stays; weights of an older family would be loaded beside the new ones.
        commits["main"] = self._sync(self.repo_id, "main", wanted, message, _is_weights_or_plot, self.create_pr)
        return commits

    def _variant(self, variant: Variant) -> str | None:
        folder = self.manifest.folder / variant.path
        wanted: dict[str, Path | bytes] = {name: folder / name for name in self.manifest.files_of(variant)}
        wanted[CARD] = render_variant_card(self.manifest, variant, self.repo_id, self.own_repositories).encode()
        message = self.message or f"{variant.pattern}, made with hf_compress"
        if not self.own_repositories:
            return self._sync(self.repo_id, variant.revision, wanted, message, lambda _: True)
        own = own_repository(self.repo_id, variant)
        self.retry(lambda: self.api.create_repo(own, private=self.private, exist_ok=True))
        self.check_ours(own, lambda: self._has_our_card(own))
        return self._sync(own, "main", wanted, message, _is_weights_or_plot)

    def _files_of_main(self) -> dict[str, Path | bytes]:
        manifest = self.manifest
        dense = manifest.folder / manifest.dense.path
        wanted: dict[str, Path | bytes] = {name: dense / name for name in manifest.files_of(manifest.dense)}
        beside = (name for name in manifest.files if name.startswith(f"{PLOTS}/") or name == STATISTICS)
        wanted |= {name: manifest.folder / name for name in beside}
        wanted[MANIFEST] = manifest.folder / MANIFEST
        wanted[CARD] = render_card(manifest, self.repo_id, self.own_repositories).encode()
        if manifest.recipe:
            wanted[RECIPE] = render_recipe(manifest).encode()
        return wanted

    def inherit_privacy(self) -> None:
        """Own repositories and the collection are private where the family's repository is.

        Raises:
            ValueError: for a repository that is there and public, where a private one is asked for or inherited.
        """
        is_private = self._is_private(self.repo_id)
        public = [self.repo_id] if self.private and not is_private else []
        if self.own_repositories and (self.private or is_private):
            own = (own_repository(self.repo_id, variant) for variant in self.manifest.variants)
            public += [name for name in own if self._is_private(name) is False]
        if public:
            raise ValueError(
                f"{', '.join(public)} is public on the Hub, while the family is to be private; nothing was sent: make "
                "it private in its settings there, or choose another name"
            )
        self.private = is_private

    def _is_private(self, repo_id: str) -> bool | None:
        """None for a repository that is not there yet."""
        try:
            return bool(self.retry(lambda: self.api.model_info(repo_id)).private)
        except RepositoryNotFoundError:
            return None

    def check_ours(self, repo_id: str, is_ours: Callable[[], bool]) -> None:
        """ValueError for a repository with weights that is somebody's model, unless it may be overwritten."""
        if self.overwrite:
            return
        names = self.retry(lambda: self.api.list_repo_files(repo_id))
        if any(name.endswith(_WEIGHTS) for name in names) and not self.retry(is_ours):
            what = f"no {MANIFEST}, so it is no family" if repo_id == self.repo_id else "was not made with hf_compress"
            raise ValueError(
                f"{repo_id} holds weights but {what}; nothing was sent to it: choose another name, or pass "
                "overwrite=True (--overwrite), which replaces its weights and keeps them in the history"
            )

    def _has_our_card(self, repo_id: str) -> bool:
        try:
            path = self.api.hf_hub_download(repo_id, CARD)
        except EntryNotFoundError:
            return False
        return "hf_compress" in (ModelCard.load(path).data.tags or [])

    def _sync(
        self,
        repo_id: str,
        revision: str,
        wanted: Mapping[str, Path | bytes],
        message: str,
        is_stale: Callable[[str], bool],
        create_pr: bool = False,
    ) -> str | None:
        """Make a revision hold the wanted files, without others that are stale, in one commit; None if it does.

        A try reads the revision anew: a commit that was made although its answer was lost is found there.
        """
        heads: list[str] = []

        def once() -> str | None:
            head = self._head(repo_id, revision)
            heads.append(head)
            tree = self.api.list_repo_tree(repo_id, recursive=True, revision=head)
            there = {file.path: file for file in tree if isinstance(file, RepoFile)}
            changed = [n for n, content in wanted.items() if n not in there or not _is_equal(there[n], content)]
            stale = [name for name in there if name not in wanted and name != _OF_THE_HUB and is_stale(name)]
            if not changed and not stale:
                return head if head != heads[0] else None
            operations = [CommitOperationAdd(name, wanted[name]) for name in changed]
            deletions = [CommitOperationDelete(name) for name in stale]
            commit = self.api.create_commit(
                repo_id,
                [*operations, *deletions],
                commit_message=message,
                revision=revision,
                parent_commit=head,
                create_pr=create_pr,
            )
            self.pull_request = commit.pr_url if create_pr else self.pull_request
            return commit.oid

        return self.retry(once)

    def _head(self, repo_id: str, revision: str) -> str:
        """The commit that a revision is at; a revision that is new begins without any file."""
        try:
            return str(self.api.model_info(repo_id, revision=revision).sha)
        except RevisionNotFoundError:
            # The first commit of a repository is empty, so that nothing of main is on the branch or in its history.
            first = self.api.list_repo_commits(repo_id)[-1].commit_id
            self.api.create_branch(repo_id, branch=revision, revision=first, exist_ok=True)
            return str(self.api.model_info(repo_id, revision=revision).sha)

    def collect(self) -> str:
        """A collection of the family and its variants' repositories; its url."""
        owner, name = self.repo_id.split("/")
        title, private = name[:_TITLE], bool(self.private)
        made = self.retry(lambda: self.api.create_collection(title, namespace=owner, private=private, exists_ok=True))
        for item in (self.repo_id, *(own_repository(self.repo_id, v) for v in self.manifest.variants)):
            add = functools.partial(self.api.add_collection_item, made.slug, item, "model", exists_ok=True)
            self.retry(add)
        return str(made.url)


def _check_secrets(manifest: Manifest, token: str | bool | None) -> None:
    """ValueError where a token would be published."""
    text = json.dumps([manifest.recipe, manifest.base_model, manifest.versions])
    own = token if isinstance(token, str) else get_token()
    if (own and own in text) or re.search(r"\bhf_[A-Za-z0-9]{30,}", text):
        raise ValueError("the recipe of this family holds a token of the Hub; nothing was sent: build it without")


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
