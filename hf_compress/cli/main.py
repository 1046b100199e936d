"""Subcommands of `hf-compress`, and what a user sees when one fails."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .. import __version__

_USAGE = f"""\
hf-compress {__version__}: train models so that they can be pruned afterwards in one shot

  hf-compress train RECIPE [--flag value ...]     train, and cut a family of variants
  hf-compress train --method cram --task image-classification [--flag value ...]
  hf-compress compress MODEL --pattern 2:4 [--pattern unstructured:0.8] --output_dir DIR
  hf-compress recipes                             what there is, what it costs, what it reaches

RECIPE is a name from `hf-compress recipes` or a path to a YAML or JSON file; flags override it.
`hf-compress COMMAND --help` lists the flags.
"""


def run(argv: Sequence[str]) -> int:
    """Run one command and return its exit code: 0, or 2 for a mistake that the message explains."""
    commands = ("train", "compress", "recipes")
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in commands:
        print(f"hf-compress: no command {argv[0]!r}; there are: {', '.join(commands)}", file=sys.stderr)
        return 2
    try:
        if argv[0] == "train":
            from .train import train

            train(argv[1:])
        elif argv[0] == "compress":
            from .compress import compress

            compress(argv[1:])
        else:
            from .recipes import list_recipes

            list_recipes(argv[1:])
    except (ValueError, OSError) as error:
        print(f"hf-compress {argv[0]}: error: {error}", file=sys.stderr)
        return 2
    return 0
