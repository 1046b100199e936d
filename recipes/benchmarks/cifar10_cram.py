"""CrAM against SGD and SAM on CIFAR-10: accuracy after one-shot pruning of a ResNet-20, paired by seed.

All arms start from the same trained weights and see one epoch of the same batches with the same optimizer, learning
rate and weight decay. Nothing is tuned: the learning rate and weight decay are those that the start weights were
trained with, rho is the published one of each method (SAM: 0.05; CrAM on ResNet-20 with patterns up to 95 %: 0.15). The
test images are looked at once, by the finished runs. SAM costs what CrAM costs, two gradients a step; SGD costs half.
CrAM+ sums the two as published, at the same learning rate, so that its steps are longer: no arm separates that. All
variants have batch norms recalibrated on 1,000 training images. "start" is the model before this epoch.

The images are a lossy JPEG copy of CIFAR-10, so accuracies are not comparable with published ones. The script goes on
where it was interrupted: runs that are in the output are kept.

    OMP_NUM_THREADS=1 python recipes/benchmarks/cifar10_cram.py --data FOLDER --weights resnet20_jpeg.safetensors \\
        --output recipes/benchmarks/results/cifar10_cram.json
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from kept import QUIET
from safetensors.torch import load_file
from transformers import set_seed

import hf_compress as hfc
from hf_compress.tasks.image_classification import DEFAULT_FLAGS, ImageClassificationArguments, prepare

SHARES = (0.5, 0.7, 0.8, 0.9, 0.95)
UNSTRUCTURED = [f"unstructured:{share}" for share in SHARES]
N_M = ["2:4", "4:8"]
PATTERNS = [*UNSTRUCTURED, *N_M]
ARMS: dict[str, dict[str, Any]] = {
    "sgd": {"rho": 0.0, "patterns": []},  # CrAM with nothing to be aware of is the wrapped SGD, bit for bit
    "sam": {"rho": 0.05, "patterns": [], "plus": False, "normalize": True},
    "cram_multi": {"rho": 0.15, "patterns": UNSTRUCTURED},
    "cram_nm": {"rho": 0.15, "patterns": N_M},
}
TRAINING: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 500,
    "optim": "sgd",
    "optim_args": "momentum=0.9,nesterov=True",
    "learning_rate": 0.05,
    "lr_scheduler_type": "linear",
    "warmup_steps": 20,
    "weight_decay": 1e-4,
    "max_grad_norm": 0.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train-*.parquet and test-*.parquet")
    parser.add_argument("--weights", type=Path, required=True, help="state dict of resnet20_cifar, safetensors")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--train_samples", type=int, help="so many training images for all arms, for a trial")
    parser.add_argument("--max_steps", type=int, default=-1, help="for a trial")
    parser.add_argument("--plot", action="store_true", help="only draw the plot of an existing output")
    options = parser.parse_args()
    if not options.plot:
        measure(options)
    draw(json.loads(options.output.read_text()), options.output.with_suffix(""))


def measure(options: argparse.Namespace) -> None:
    """All runs that the output lacks; it is written after each."""
    settings = {
        "arms": ARMS,
        "training": TRAINING,
        "augmentation": "crop_flip",
        "calibration_samples": 1000,
        "train_samples": options.train_samples or 50_000,
        "max_steps": options.max_steps,
        "precision": "bfloat16 autocast" if options.bf16 else "float32",
        "start_weights_sha256": hashlib.sha256(options.weights.read_bytes()).hexdigest(),
    }
    result: dict[str, Any] = {"settings": settings, "runs": {arm: [] for arm in ("start", *ARMS)}}
    if options.output.is_file():
        result = json.loads(options.output.read_text())
        if result["settings"] != settings:
            raise SystemExit(f"{options.output} holds runs with other settings; choose another --output")
    runs = result["runs"]
    for seed in range(options.seeds):
        for arm in ("start", *ARMS) if seed == 0 else ARMS:
            if all(row["seed"] != seed for row in runs[arm]):
                runs[arm].append({"seed": seed, **run(arm, seed, options)})
                print(arm, runs[arm][-1], flush=True)
                options.output.write_text(json.dumps(summary(settings, runs), indent=2) + "\n")


def run(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once ("start": not at all) and cut all variants; accuracies in points."""
    set_seed(seed)
    data = {"dataset_name": str(options.data), "max_train_samples": options.train_samples}
    task = ImageClassificationArguments(**data, architecture="resnet20_cifar", augmentation="crop_flip")
    parts = prepare(task)
    parts["model"].timm_model.load_state_dict(load_file(options.weights), strict=False)  # lacks num_batches_tracked
    parts["eval_dataset"] = list(parts["eval_dataset"])  # decoded once for all variants
    flags = {**TRAINING, **QUIET, **DEFAULT_FLAGS, **ARMS.get(arm, ARMS["sgd"])}
    with tempfile.TemporaryDirectory() as folder:
        args = hfc.CrAMConfig(folder, seed=seed, bf16=options.bf16, max_steps=options.max_steps, **flags)
        trainer = hfc.CrAMTrainer(args=args, **parts)
        start = time.time()
        if arm != "start":
            trainer.train()
        trained = time.time()
        family = trainer.build_family(PATTERNS)
        seconds = {"train": round(trained - start, 1), "family": round(time.time() - trained, 1)}
        checkpoints = {"dense": family.dense, **{str(v.pattern): v for v in family.variants}}
        points = {name: round(100 * (v.metrics["accuracy"] or 0), 3) for name, v in checkpoints.items()}
        zeros = {name: round(v.sparsity, 4) for name, v in checkpoints.items()}
    return {"accuracy": points, "share_of_zeros": zeros, "seconds": seconds}


def summary(settings: dict[str, Any], runs: dict[str, Any]) -> dict[str, Any]:
    """The result file: what was run, means with spread, differences by seed."""
    methods = {arm: rows for arm, rows in runs.items() if rows and arm in ("cram_multi", "cram_nm")}
    minus = {arm: {b: paired(rows, runs[b]) for b in ("sgd", "sam") if runs[b]} for arm, rows in methods.items()}
    judged = {"cram_multi": UNSTRUCTURED[1:], "cram_nm": N_M}
    ahead = {
        pattern: {b: all(d > 0 for d in differences[pattern]["by_seed"]) for b, differences in minus[arm].items()}
        for arm in minus
        for pattern in judged[arm]
    }
    flags = " --bf16" if settings["precision"] != "float32" else ""
    if settings["train_samples"] != 50_000:
        flags += f" --train_samples {settings['train_samples']}"
    return {
        "what": __doc__,
        "command": "OMP_NUM_THREADS=1 python recipes/benchmarks/cifar10_cram.py --data CIFAR10 --weights "
        f"resnet20_jpeg.safetensors --output recipes/benchmarks/results/cifar10_cram.json{flags}",
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
        "versions": {p: importlib.metadata.version(p) for p in ("hf_compress", "torch", "transformers", "timm")},
        "minutes": round(sum(sum(row["seconds"].values()) for rows in runs.values() for row in rows) / 60, 1),
        "settings": settings,
        "runs": runs,
        "mean": {arm: {p: mean(rows, p) for p in ("dense", *PATTERNS)} for arm, rows in runs.items() if rows},
        "minus": minus,
        "ahead": ahead,  # at every seed
    }


def mean(rows: list[dict[str, Any]], pattern: str) -> dict[str, float]:
    values = [row["accuracy"][pattern] for row in rows]
    return {"mean": round(statistics.mean(values), 3), "min": min(values), "max": max(values)}


def paired(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Differences in points by seed, for every pattern."""
    by_seed = {row["seed"]: row["accuracy"] for row in theirs}
    found = {}
    for pattern in ("dense", *PATTERNS):
        both = [row for row in ours if row["seed"] in by_seed]
        differences = [round(row["accuracy"][pattern] - by_seed[row["seed"]][pattern], 3) for row in both]
        found[pattern] = {"difference": round(statistics.mean(differences), 3), "by_seed": differences}
    return found


LOOKS = {  # color, marker, name
    "sgd": ("#8a8a8a", "s", "SGD"),
    "sam": ("#2a9d6f", "^", "SAM"),
    "cram_multi": ("#2a6fbb", "o", "CrAM+, unstructured 50 to 95 %"),
    "cram_nm": ("#d1603d", "D", "CrAM+, 2:4 and 4:8"),
}


def draw(result: dict[str, Any], stem: Path) -> None:
    """Mean accuracy over sparsity, and at N:M; bars from the lowest to the highest seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    curves, marks = figure.subplots(1, 2, sharey=True, width_ratios=(3.2, 1))
    for i, (arm, (color, marker, name)) in enumerate(LOOKS.items()):
        for axes, patterns, x, line in (
            (curves, ["dense", *UNSTRUCTURED], [0, *(100 * s for s in SHARES)], "-"),
            (marks, N_M, [k + 0.16 * (i - 1.5) for k in range(len(N_M))], "none"),
        ):
            values = [result["mean"][arm][p] for p in patterns]
            y = [v["mean"] for v in values]
            spread = [[v["mean"] - v["min"] for v in values], [v["max"] - v["mean"] for v in values]]
            axes.errorbar(x, y, spread, color=color, marker=marker, markersize=5, linestyle=line, capsize=3, label=name)
    curves.set_xlabel("zeros in the compressed weights, %")
    curves.set_ylabel("test accuracy, %")
    curves.legend(frameon=False, loc="lower left")
    marks.set_xticks(range(len(N_M)), N_M)
    marks.set_xlim(-0.6, len(N_M) - 0.4)
    marks.set_xlabel("N:M")
    seeds = len(result["runs"]["cram_multi"])
    figure.suptitle(
        f"ResNet-20 on CIFAR-10 (JPEG copy), cut in one shot after one epoch; mean and range of {seeds} seeds",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    for axes in (curves, marks):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.savefig(stem.with_suffix(".png"), dpi=160, metadata={"Software": None})
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
