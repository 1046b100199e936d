"""SFW against SGD with weight decay on CIFAR-10: a ResNet-20 cut in one shot, without retraining, paired by seed.

All runs start from the same trained weights and see one epoch of the 50,000 images, 782 steps. Every arm gets the same
tuning budget: four settings, one seed, 400 steps, judged by the mean accuracy of the dense net and its cuts on 5,000
training images that tuning does not train on. The settings chosen then train on all images with every seed, and only
those runs look at the test images. SGD is tuned anew for every group of patterns. Beside, for the K-sparse polytope:
rescaling by the diameter instead of by the gradient, tuned too, and SFW-Init before the setting that was chosen. All
have batch norms recalibrated on 1,000 training images.

The images are a lossy JPEG copy of CIFAR-10, so accuracies are not comparable with published ones. Runs are kept in a
folder, so that the script goes on where it was interrupted; several processes share them.

    OMP_NUM_THREADS=1 python recipes/benchmarks/cifar10_sfw.py --data FOLDER --weights resnet20_jpeg.safetensors \\
        --runs FOLDER --output recipes/benchmarks/results/cifar10_sfw.json
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from kept import QUIET, all_kept, parser
from machine import facts
from safetensors.torch import load_file
from transformers import set_seed

from hf_compress.methods.registry import METHODS
from hf_compress.tasks.image_classification import DEFAULT_FLAGS, ImageClassificationArguments, prepare

GOALS = {
    "sparse": ["unstructured:0.8", "unstructured:0.9", "unstructured:0.95"],
    "filters": ["filters:0.5"],
    "rank": ["low_rank:0.5", "low_rank:0.75"],
}
REGIONS = {  # name to goal and region
    "k_sparse": ("sparse", {"constraint": "k_sparse", "k": "0.1"}),
    "group": ("filters", {"constraint": "group_k_support", "k": "0.3"}),
    "spectral": ("rank", {"constraint": "spectral_k_support", "k": "0.2"}),
}
SGD = {"rho": 0.0, "patterns": [], "optim": "sgd", "optim_args": "momentum=0.9"}  # CrAM with nothing to be aware of
RADII, RATES = ("weights:0.5", "weights:1"), (0.03, 0.1)
RATES_BY_DIAMETER = (0.1, 0.3)
TRAINING: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 500,
    "lr_scheduler_type": "linear",
    "warmup_steps": 10,
    "max_grad_norm": 0.0,
}
TUNING = {"steps": 400, "held_out": 5000, "seed": 0}
SEEDS = (0, 1)


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--data", type=Path, required=True, help="folder with train-*.parquet and test-*.parquet")
    flags.add_argument("--weights", type=Path, required=True, help="state dict of resnet20_cifar, safetensors")
    options = flags.parse_args()
    measure = functools.partial(run, data=options.data, weights=options.weights)
    tuning = all_kept(options.runs, [s for arm in grids().values() for s in arm], measure)
    arms = chosen(tuning)
    runs = [{**s, "seed": seed, "steps": -1, "held_out": 0} for seed in SEEDS for s in arms.values()]
    final = all_kept(options.runs, runs, measure)
    rows = {arm: [final[i + len(arms) * s] for s in range(len(SEEDS))] for i, arm in enumerate(arms)}
    options.output.write_text(json.dumps(summary(tuning, arms, rows), indent=2) + "\n")


def grids() -> dict[str, list[dict[str, Any]]]:
    """The four settings of every arm."""
    found: dict[str, list[dict[str, Any]]] = {}
    arms = [(name, name, "gradient", RATES) for name in REGIONS]
    for arm, name, rescale, rates in (*arms, ("k_sparse_by_diameter", "k_sparse", "diameter", RATES_BY_DIAMETER)):
        goal, region = REGIONS[name]
        found[arm] = [
            {"method": "sfw", "goal": goal, **region, "radius": radius, "learning_rate": rate, "rescale": rescale}
            for radius, rate in itertools.product(RADII, rates)
        ]
    found["sgd"] = [
        {"method": "cram", "goal": "all", **SGD, "learning_rate": rate, "weight_decay": decay}
        for rate, decay in itertools.product((0.02, 0.1), (5e-4, 5e-3))
    ]
    return {arm: [{**s, **TUNING} for s in settings] for arm, settings in found.items()}


def patterns_of(goal: str) -> list[str]:
    return [p for name, patterns in GOALS.items() for p in patterns if goal in (name, "all")]


def chosen(tuning: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The best setting of every arm, SGD's for every goal."""
    rows = dict(zip(grids(), (tuning[i : i + 4] for i in range(0, len(tuning), 4)), strict=True))

    def best(arm: str, goal: str) -> dict[str, Any]:
        judged_by = ["dense", *patterns_of(goal)]
        row = max(rows[arm], key=lambda r: statistics.mean(r["accuracy"][p] for p in judged_by))
        return dict(row["settings"])  # SGD cuts for all goals, so that equal settings are one run

    arms = {f"sgd_for_{goal}": best("sgd", goal) for goal in GOALS}
    for name, (goal, _) in REGIONS.items():
        arms[name] = best(name, goal)
    arms["k_sparse_by_diameter"] = best("k_sparse_by_diameter", "sparse")
    arms["k_sparse_with_init"] = {**arms["k_sparse"], "sfw_init_steps": 40}
    return arms


def run(settings: dict[str, Any], data: Path, weights: Path) -> dict[str, Any]:
    """Train once and cut the variants of the goal; accuracies in points."""
    seed, held_out, steps = settings["seed"], settings["held_out"], settings["steps"]
    set_seed(seed)
    task = {"dataset_name": str(data), "architecture": "resnet20_cifar", "augmentation": "crop_flip"}
    parts = prepare(ImageClassificationArguments(**task))
    parts["model"].timm_model.load_state_dict(load_file(weights), strict=False)  # lacks num_batches_tracked
    parts["model"].to(memory_format=torch.channels_last)
    if held_out:
        split = parts["train_dataset"].train_test_split(test_size=held_out, seed=seed, stratify_by_column="label")
        plain = parts["eval_dataset"].format["format_kwargs"]["transform"]
        parts |= {"train_dataset": split["train"], "eval_dataset": split["test"].with_transform(plain)}
    parts["eval_dataset"] = list(parts["eval_dataset"])  # decoded once for all variants
    own = {k: v for k, v in settings.items() if k not in ("method", "goal", "held_out", "steps")}
    method = METHODS[settings["method"]]
    with tempfile.TemporaryDirectory() as folder:
        args = method.config_class(output_dir=folder, max_steps=steps, **{**TRAINING, **QUIET, **DEFAULT_FLAGS, **own})
        trainer: Any = method.trainer_class(args=args, **parts)
        start = time.time()
        trainer.train()
        trained = time.time()
        family = trainer.build_family(patterns_of(settings["goal"]))
        seconds = {"train": round(trained - start, 1), "family": round(time.time() - trained, 1)}
        points = {str(v.pattern or "dense"): round(100 * v.metrics["accuracy"], 3) for v in family.checkpoints}
    return {"accuracy": points, "seconds": seconds}


def summary(
    tuning: list[dict[str, Any]], arms: dict[str, dict[str, Any]], rows: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """The result file: what was tried and chosen, means with spread, paired differences to SGD."""
    minus = {}
    for arm, settings in arms.items():
        if not arm.startswith("sgd"):
            goal = settings["goal"]
            minus[arm] = {p: by_seed(rows[arm], rows[f"sgd_for_{goal}"], p) for p in ("dense", *GOALS[goal])}
    seconds = [sum(row["seconds"].values()) for row in [*tuning, *itertools.chain(*rows.values())]]
    return {
        "what": __doc__,
        **facts(),
        "minutes": round(sum(seconds) / 60, 1),
        "training": TRAINING,
        "tuning": tuning,
        "chosen": arms,
        "runs": rows,
        "mean": {arm: {p: mean(found, p) for p in found[0]["accuracy"]} for arm, found in rows.items()},
        "minus_sgd": minus,
    }


def by_seed(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], pattern: str) -> dict[str, Any]:
    """The difference of accuracies at every seed, beside the mean and its standard error."""
    values = [round(a["accuracy"][pattern] - b["accuracy"][pattern], 3) for a, b in zip(ours, theirs, strict=True)]
    return {**paired(ours, theirs, pattern), "by_seed": values}


def mean(rows: list[dict[str, Any]], pattern: str) -> dict[str, float]:
    """Mean and standard deviation over seeds."""
    values = [row["accuracy"][pattern] for row in rows]
    return {"mean": round(statistics.mean(values), 3), "std": round(statistics.stdev(values), 3)}


def paired(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], pattern: str) -> dict[str, float]:
    """The mean difference over seeds, and its standard error."""
    differences = [a["accuracy"][pattern] - b["accuracy"][pattern] for a, b in zip(ours, theirs, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return {"difference": round(statistics.mean(differences), 3), "standard_error": round(error, 3)}


if __name__ == "__main__":
    main()
