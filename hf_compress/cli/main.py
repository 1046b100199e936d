"""Subcommands of `hf-compress`, and what a user sees when one fails."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from .. import __version__

_USAGE = f"""\
hf-compress {__version__}: train models so that they can be pruned afterwards in one shot

  hf-compress train RECIPE [--flag value ...]     train, and cut a family of variants
  hf-compress train --method cram --task image-classification [--flag value ...]
  hf-compress compress MODEL --pattern 2:4 [--pattern unstructured:0.8] --output_dir DIR
  hf-compress report MODEL [--html]               what pruning would cost it, layer by layer; of a family, its table
  hf-compress push FOLDER REPO                    publish a family on the Hub, each variant on its revision
  hf-compress recipes                             what there is, what it costs, what it reaches

RECIPE is a name from `hf-compress recipes` or a path to a YAML or JSON file; flags override it.
`hf-compress COMMAND --help` lists the flags.
"""

# Name to module and function; a command's libraries are loaded when it runs.
_COMMANDS = {
    "train": (".train", "train"),
    "compress": (".compress", "compress"),
    "report": (".report", "report"),
    "push": (".push", "push"),
    "recipes": (".recipes", "list_recipes"),
}


def run(argv: Sequence[str]) -> int:
    """Run one command and return its exit code: 0, or 2 for a mistake that the message explains."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in _COMMANDS:
        print(f"hf-compress: no command {argv[0]!r}; there are: {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2
    try:
        module, function = _COMMANDS[argv[0]]
        getattr(importlib.import_module(module, __package__), function)(argv[1:])
    except (ValueError, OSError) as error:
        print(f"hf-compress {argv[0]}: error: {error}", file=sys.stderr)
        return 2
    return 0
