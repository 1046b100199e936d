"""CrAM against SGD on the digits: accuracy after one-shot pruning, five seeds, paired.

Both methods get the same tuning budget: four settings each, one seed, judged on a validation split of the training
data. The test split (30 %, by class, another one for every seed) is only looked at by the final runs. SGD also runs
with twice the epochs, which cost what CrAM's two gradients cost. All variants have recalibrated batch norms.

    OMP_NUM_THREADS=1 python recipes/benchmarks/digits_cram.py --output recipes/benchmarks/results/digits_cram.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from transformers import set_seed

import hf_compress as hfc
from hf_compress.tasks.image_classification import DEFAULT_FLAGS, ImageClassificationArguments, prepare

RECIPE = Path(__file__).parents[1] / "image-classification" / "digits_cram.yaml"
PATTERNS = ["unstructured:0.5", "unstructured:0.7", "unstructured:0.8", "unstructured:0.9", "unstructured:0.95", "2:4"]
JUDGED_BY = ("dense", "unstructured:0.9", "unstructured:0.95")
GRID = {
    "sgd": [{"learning_rate": lr, "weight_decay": wd} for lr, wd in itertools.product((0.05, 0.1), (5e-4, 2e-3))],
    "cram": [{"learning_rate": lr, "rho": rho} for lr, rho in itertools.product((0.05, 0.1), (0.05, 0.1))],
}
OFF = {"rho": 0.0, "patterns": []}  # CrAM with nothing to be aware of is the wrapped SGD, bit for bit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    start = time.time()
    tuning = {name: [{**s, **run(name, s, 0, options.epochs, tuning=True)} for s in GRID[name]] for name in GRID}
    best = {}
    for name, rows in tuning.items():
        row = max(rows, key=lambda r: statistics.mean(r["accuracy"][p] for p in JUDGED_BY))
        best[name] = {k: row[k] for k in GRID[name][0]}
    arms = {"sgd": ("sgd", 1), "sgd_equal_compute": ("sgd", 2), "cram": ("cram", 1)}
    runs: dict[str, list[Any]] = {name: [] for name in arms}
    for seed in range(options.seeds):
        for arm, (name, factor) in arms.items():
            runs[arm].append({"seed": seed, **run(name, best[name], seed, factor * options.epochs)})
            print(arm, runs[arm][-1], flush=True)
    result = {
        "what": __doc__,
        "command": "OMP_NUM_THREADS=1 python " + " ".join(sys.argv),
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "versions": {p: importlib.metadata.version(p) for p in ("hf_compress", "torch", "transformers")},
        "minutes": round((time.time() - start) / 60, 1),
        "epochs": options.epochs,
        "tuning": tuning,
        "chosen": best,
        "runs": runs,
        "mean": {arm: {p: mean(rows, p) for p in rows[0]["accuracy"]} for arm, rows in runs.items()},
        "cram_minus": {arm: {p: paired(runs["cram"], runs[arm], p) for p in ("dense", *PATTERNS)} for arm in arms},
    }
    del result["cram_minus"]["cram"]
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: result[k] for k in ("chosen", "mean", "cram_minus", "minutes")}, indent=2))


def run(name: str, setting: dict[str, float], seed: int, epochs: int, tuning: bool = False) -> dict[str, Any]:
    """Train once and cut all variants; accuracies in points."""
    recipe = yaml.safe_load(RECIPE.read_text())
    task_fields, flags = {}, {}
    for key, value in recipe.items():
        if key in ImageClassificationArguments.__dataclass_fields__:
            task_fields[key] = value
        elif key in hfc.CrAMConfig.__dataclass_fields__:
            flags[key] = float(value) if key == "weight_decay" else value
    flags |= {
        **DEFAULT_FLAGS,
        "num_train_epochs": epochs,
        "seed": seed,
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
    }
    set_seed(seed)
    parts = prepare(ImageClassificationArguments(**task_fields, data_seed_split=seed))
    if tuning:
        split = parts["train_dataset"].train_test_split(test_size=0.3, seed=seed, stratify_by_column="label")
        parts |= {"train_dataset": split["train"], "eval_dataset": split["test"]}
    with tempfile.TemporaryDirectory() as folder:
        method = OFF if name == "sgd" else {}
        args = hfc.CrAMConfig(**{**flags, **method, **setting, "output_dir": folder})
        trainer = hfc.CrAMTrainer(args=args, **parts)
        start = time.time()
        trainer.train()
        seconds = time.time() - start
        family = trainer.build_family(PATTERNS)
        checkpoints = {"dense": family.dense, **{str(v.pattern): v for v in family.variants}}
        points = {name: round(100 * v.metrics["accuracy"], 3) for name, v in checkpoints.items()}
    return {"accuracy": points, "seconds": round(seconds, 1)}


def mean(rows: list[dict[str, Any]], pattern: str) -> dict[str, float]:
    values = [row["accuracy"][pattern] for row in rows]
    return {"mean": round(statistics.mean(values), 3), "std": round(statistics.stdev(values), 3)}


def paired(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], pattern: str) -> dict[str, float]:
    differences = [a["accuracy"][pattern] - b["accuracy"][pattern] for a, b in zip(ours, theirs, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return {"difference": round(statistics.mean(differences), 3), "standard_error": round(error, 3)}


if __name__ == "__main__":
    main()
