"""Cards of families that packaged recipes make: model_cards/NAME with card, manifest and picture.

Those of the digits need nothing. For images, a ResNet-20 that was trained on CIFAR-10 is trained on with CrAM, for
texts a MiniLM is fine-tuned in question answering; recipes whose data and weights are not given are left out.

    OMP_NUM_THREADS=1 python recipes/benchmarks/model_cards.py --output model_cards --place cifar10=FOLDER \\
        --place resnet20_jpeg=FILE --place qa=FOLDER --place minilm_l6=FOLDER
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from everything import lacking
from evidence_runs import image_model

import hf_compress as hfc
from hf_compress.hub import render_card

RECIPES = {
    "digits_cram": "",
    "digits_sfw": "",
    "digits_tpp": "",
    "digits_lilnetx": "",
    "cifar10_resnet20_cram_tune": "--dataset_name {cifar10} --image_column image --model_name_or_path {resnet20_jpeg} "
    "--dataloader_num_workers 0",
    "minilm_squad_cram": "--train_file {qa}/train.parquet --eval_file {qa}/validation.parquet --max_train_samples 4000 "
    "--model_name_or_path {minilm_l6} --bf16 true",
}
DATA = {  # what a manifest does not know, as the first of the limits
    "cifar10_resnet20_cram_tune": "The data are a lossy JPEG copy of CIFAR-10: numbers are comparable with each other, "
    "not with published ones. The training began with a trained ResNet-20.",
    "minilm_squad_cram": "The training saw 4,000 questions of the form of SQuAD, in bfloat16: numbers are comparable "
    "with each other, not with published ones.",
}
LIMITS = "## Limits\n\n"
HERE = Path(__file__).parent
OWNER = "hf-compress"  # of the repositories that the snippets name


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output", type=Path, required=True, help="folder of the cards")
    flags.add_argument("--recipe", nargs="+", default=list(RECIPES), help="to run; all by default")
    flags.add_argument("--place", action="append", default=[], help="NAME=PATH of data or weights")
    options = flags.parse_args()
    places = dict(place.split("=", 1) for place in options.place)
    with tempfile.TemporaryDirectory() as folder:
        if "resnet20_jpeg" in places:
            places["resnet20_jpeg"] = str(as_checkpoint(places, Path(folder) / "resnet20"))
        for recipe in options.recipe:
            if lacks := lacking(RECIPES[recipe], places):
                print(f"{recipe} left out, of which {', '.join(lacks)} is not given", flush=True)
            else:
                make(recipe, RECIPES[recipe].format(**places).split(), options.output / recipe, Path(folder) / recipe)


def make(recipe: str, flags: list[str], card: Path, folder: Path) -> None:
    """Runs a recipe, and keeps what stands on the page of its repository."""
    here = [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    command = [sys.executable, "-m", "hf_compress", "train", recipe, "--output_dir", str(folder), *flags, *here]
    subprocess.run(command, check=True)
    family = hfc.load_family(folder / "_family")
    shutil.rmtree(card, ignore_errors=True)
    (card / "plots").mkdir(parents=True)
    text = render_card(family, f"{OWNER}/{recipe.replace('_', '-')}")
    known = f"{LIMITS}- {DATA[recipe]}\n" if recipe in DATA else LIMITS
    (card / "README.md").write_text(text.replace(LIMITS, known))
    for name in ("family.json", "plots/sparsity.png"):
        shutil.copyfile(family.folder / name, card / name)


def as_checkpoint(places: dict[str, str], folder: Path) -> Path:
    """The start weights of the plan of CIFAR-10 as a folder that `from_pretrained` takes."""
    plan = yaml.safe_load((HERE / "plans" / "cifar10_resnet20.yaml").read_text())
    image_model(plan["task"], places).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
