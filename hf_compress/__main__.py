"""`python -m hf_compress` and the `hf-compress` command."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    # Idle OpenMP threads that spin steal the cores from the ones that work; it has to be said before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from .cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
