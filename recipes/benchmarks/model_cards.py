"""Cards of families that the packaged digits recipes make: model_cards/NAME with card, manifest and picture.

OMP_NUM_THREADS=1 python recipes/benchmarks/model_cards.py --output model_cards
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import hf_compress as hfc
from hf_compress.hub import render_card

RECIPES = ("digits_cram", "digits_sfw", "digits_tpp", "digits_lilnetx")
OWNER = "hf-compress"  # of the repositories that the snippets name


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output", type=Path, required=True, help="folder of the cards")
    flags.add_argument("--recipe", nargs="+", default=RECIPES, help="to run; all by default")
    options = flags.parse_args()
    for recipe in options.recipe:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "hf_compress", "train", recipe, "--output_dir", folder]
            subprocess.run(command, check=True)
            family = hfc.load_family(Path(folder) / "_family")
            card = options.output / recipe
            shutil.rmtree(card, ignore_errors=True)
            (card / "plots").mkdir(parents=True)
            (card / "README.md").write_text(render_card(family, f"{OWNER}/{recipe.replace('_', '-')}"))
            for name in ("family.json", "plots/sparsity.png"):
                shutil.copyfile(family.folder / name, card / name)


if __name__ == "__main__":
    main()
