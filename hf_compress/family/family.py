"""A family as users hold it: read from a folder or from the Hub, and published there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..hub import Publication, fetch_checkpoint, fetch_manifest, is_repo_id, publish
from ..patterns import Pattern
from .join import join
from .manifest import MANIFEST, Manifest, read_manifest, verify_files
from .variant import Variant


@dataclass(frozen=True)
class Family(Manifest):
    """The dense checkpoint, its variants, and what each of them measures.

    Attributes:
        repo_id: of the Hub repository that it was read from, None for a folder. `folder` then holds its manifest, card
            and plots; checkpoints are downloaded when `path_to` is asked for them.
    """

    repo_id: str | None = None

    def path_to(self, variant: str | Pattern | Variant, token: str | bool | None = None) -> Path:
        """The folder of a variant, which `from_pretrained` takes.

        Args:
            variant: such as "2:4", "nm-2of4", or `family.dense`.
            token: for a private repository, the one of `hf auth login` by default.

        Raises:
            KeyError: if there is no such variant.
            ValueError: if the files on the Hub are not those of the manifest.
        """
        chosen = variant if isinstance(variant, Variant) else self[variant]
        if self.repo_id is None:
            return self.folder / chosen.path
        return fetch_checkpoint(self, chosen, self.repo_id, token)

    def add(self, other: str | Path | Family) -> Family:
        """Add the variants of another family to the folder of this one, such as that of a training with TPP.

        Args:
            other: a family of the same dense model, its folder, or the output folder of the run that made it. Its
                dense checkpoint stays where it is, and its recipe goes into ours under "trained".

        Returns:
            This family, which has them now.

        Raises:
            ValueError: for a family without variants, of another task or another size of its dense model, or one with
                a variant that this one has; for files that differ from their hash, and for families on the Hub.
        """
        found = other if isinstance(other, Family) else load_family(Path(other))
        for family in (self, found):
            if family.repo_id is not None:
                raise ValueError(f"{family.repo_id} lies on the Hub; families join in folders: download it first")
        now = load_family(join(read_manifest(self.folder), found))
        vars(self).update(vars(now))  # it is what lies in its folder
        return self

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        overwrite: bool = False,
        own_repositories: bool = False,
    ) -> Publication:
        """Publish the family: each variant on a revision of its own, the dense checkpoint, manifest and card on main.

        Files that the Hub has already are not sent, and a revision of which all files are there gets no commit. Main
        comes last, so that its manifest never names what is not there; a push that was cut off is completed by the
        next one. Faults that pass (errors of the server, lost connections, another push to the same repository) are
        waited out, up to five tries. Nothing is deleted but weights and plots of an older family on the same revision,
        which stay in its history.

        Args:
            repo_id: "name", "user/name" or "organisation/name"; made if it is not there.
            private: of a new repository; own repositories and the collection are as private as that of the family.
            token: with write access, the one of `hf auth login` by default.
            commit_message: of every commit.
            create_pr: leave main as it is and open a pull request with what is new there. Revisions of variants are
                written at once, since the Hub takes pull requests to main alone.
            overwrite: also a repository with weights that are no family.
            own_repositories: put each variant on main of a repository "{repo_id}-{revision}" instead of a revision,
                and all of them into a collection. `load_family` and `path_to` find them there.

        Returns:
            Where it is, and the commit of each revision (None where nothing had changed).

        Raises:
            ValueError: if a file differs from its hash, the repository holds something else than a family or is public
                while `private` is asked for, or this family was itself read from the Hub.
            OSError: if the Hub refuses or cannot be reached.
        """
        if self.repo_id is not None:
            raise ValueError(f"this family lies on the Hub already, in {self.repo_id}; duplicate that repository there")
        verify_files(self.folder, self.files)
        return publish(
            self,
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
            overwrite=overwrite,
            own_repositories=own_repositories,
        )


def _family_in(folder: Path) -> Path:
    """A trainer leaves its family in a folder of its output."""
    inside = folder / "_family"
    return inside if not (folder / MANIFEST).is_file() and (inside / MANIFEST).is_file() else folder


def is_family(name: str | Path, revision: str | None = None) -> bool:
    """Whether a folder, or a repository on the Hub, holds the manifest of a family; no other file is asked for.

    Args:
        name: the folder of a family, or the id of a repository.
        revision: of the repository.
    """
    folder = Path(name)
    if folder.exists() or not is_repo_id(str(name)):
        return (folder / MANIFEST).is_file()
    from transformers.utils import cached_file

    faults = ("gated_repo", "missing_entries", "connection_errors")
    lenient: dict[str, Any] = {f"_raise_exceptions_for_{fault}": False for fault in faults}
    try:
        return cached_file(str(name), MANIFEST, revision=revision, **lenient) is not None
    except (OSError, ValueError):  # no such repository or revision, which whoever reads it says
        return False


def load_family(name: str | Path, revision: str | None = None, token: str | bool | None = None) -> Family:
    """Read a family from its folder, where every file is verified, or from the Hub.

    Args:
        name: a folder, or the id of a repository.
        revision: of the repository: a tag or a commit, the newest by default.
        token: for a private repository, the one of `hf auth login` by default.

    Raises:
        ValueError: if there is no manifest, it cannot be understood, or a file is missing or differs from its hash.
        OSError: if the Hub refuses or cannot be reached.
    """
    folder = _family_in(Path(name))
    if not folder.is_dir() and is_repo_id(str(name)):
        manifest = fetch_manifest(str(name), revision, token)
        return Family(**vars(manifest), repo_id=str(name))
    manifest = read_manifest(folder)
    verify_files(folder, manifest.files)
    return Family(**vars(manifest))
