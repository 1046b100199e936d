"""`hf-compress push`: a family in a folder becomes a repository on the Hub."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..family import load_family


def push(argv: Sequence[str]) -> None:
    """Publish a family, and print where it is and what was sent."""
    parser = argparse.ArgumentParser(
        prog="hf-compress push",
        description="Publish a family: the dense checkpoint, manifest and card on main, each variant on its revision. "
        "What is there already is not sent again. The token is that of `hf auth login`, or HF_TOKEN.",
    )
    parser.add_argument("family", help="folder of a family, such as out/digits_cram/_family")
    parser.add_argument("repo", help='"name" or "user/name"; made if it is not there')
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--message", help="of every commit")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of writing to main")
    parser.add_argument("--overwrite", action="store_true", help="also a repository with weights that are no family")
    parser.add_argument(
        "--own_repositories",
        action="store_true",
        help="a repository REPO-REVISION for each variant, and a collection of all, instead of revisions",
    )
    args = parser.parse_args(argv)
    family = load_family(args.family)
    publication = family.push_to_hub(
        args.repo,
        private=args.private or None,
        commit_message=args.message,
        create_pr=args.create_pr,
        overwrite=args.overwrite,
        own_repositories=args.own_repositories,
    )
    for revision, commit in publication.commits.items():
        print(f"{revision:24}  {commit[:12] if commit else 'unchanged'}")
    for url in (publication.collection, publication.pull_request, publication.url):
        if url:
            print(url)
