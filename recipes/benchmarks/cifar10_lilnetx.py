"""Accuracy over file size on CIFAR-10: LilNetX, plain weights in int8 with zstd, and pruned ones, entropy-coded.

All runs start from the same trained ResNet-20 and take one epoch of SGD (782 steps of 64 images, learning rate 0.01,
cosine). "sgd" is saved in int8, coded and as tensors behind zstd -19, and pruned in one shot (batch norms recalibrated)
with the rest in int8, coded. "gradual" is pruned on the cubic schedule while it trains. "lilnetx" has a run for each
point of its curve. No arm was tuned; all compute in bfloat16 (autocast). In all files batch norms are folded and what
is no weight has 16 bits. Sizes are those of all files that `from_pretrained` needs; accuracies are of that load, in a
process of its own, on all test images.

The images are a lossy JPEG copy of CIFAR-10, so accuracies are not comparable with published ones. Runs are kept in a
folder, so that the script goes on where it was interrupted; several processes share them.

    OMP_NUM_THREADS=1 python recipes/benchmarks/cifar10_lilnetx.py --data FOLDER --weights resnet20_jpeg.safetensors \\
        --runs FOLDER --output recipes/benchmarks/results/cifar10_lilnetx.json
"""

from __future__ import annotations

import copy
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import zstandard
from cifar10_tpp import collate, load, resnet20
from kept import QUIET, all_kept, parser
from machine import facts
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

import hf_compress as hfc
from hf_compress.calibration import fold_batch_norm_
from hf_compress.family.coded import round_rest_, save_coded
from hf_compress.family.footprint import disk_bytes
from hf_compress.patterns.quantized import quantize

TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 64,
    "num_train_epochs": 1,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 0.01,
    "lr_scheduler_type": "cosine",
    "weight_decay": 5e-4,
    "max_grad_norm": 0.0,
    "bf16": True,
    "remove_unused_columns": False,
}
ONE_SHOT = ["int8", *(f"unstructured:{share}+int8" for share in (0.5, 0.7, 0.8, 0.9))]
GRADUAL = (0.8,)
POINTS = ((3.0, 5.0), (2.0, 5.0), (1.5, 10.0))  # steps_per_std and rate_weight
SEEDS = (0, 1)


def main() -> None:
    if sys.argv[1:2] == ["--evaluate"]:
        print(json.dumps(evaluated(sys.argv[3:], Path(sys.argv[2]))))
        return
    flags = parser(__doc__)
    flags.add_argument("--data", type=Path, required=True, help="folder with train-*.parquet and test-*.parquet")
    flags.add_argument("--weights", type=Path, required=True, help="state dict of resnet20_cifar, safetensors")
    options = flags.parse_args()
    measure = functools.partial(run, data=options.data, weights=options.weights)
    runs = all_kept(options.runs, settings(), measure)
    options.output.write_text(json.dumps(summary(runs), indent=2) + "\n")
    draw(json.loads(options.output.read_text()), options.output.with_suffix(""))


def settings() -> list[dict[str, Any]]:
    arms: list[dict[str, Any]] = [{"arm": "sgd"}]
    arms += [{"arm": "lilnetx", "steps_per_std": steps, "rate_weight": rate} for steps, rate in POINTS]
    arms += [{"arm": "gradual", "share": share} for share in GRADUAL]
    return [{**arm, "seed": seed, **TRAINING} for seed in SEEDS for arm in arms]


def run(settings: dict[str, Any], data: Path, weights: Path) -> dict[str, Any]:
    """Train once; size and accuracy of every file that is made of it."""
    train, _ = load(data)
    own = {k: v for k, v in settings.items() if k not in ("arm", "share", "steps_per_std", "rate_weight")}
    set_seed(settings["seed"])
    start = time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = {"model": resnet20(weights), "train_dataset": train, "data_collator": collate}
        if settings["arm"] == "lilnetx":
            latents = {k: settings[k] for k in ("steps_per_std", "rate_weight")}
            trainer: Any = hfc.LilNetXTrainer(args=hfc.LilNetXConfig(name, **QUIET, **own, **latents), **parts)
        else:
            share = settings.get("share")
            pruning = [hfc.GradualPruning(f"unstructured:{share}", begin=0.0, end=0.7)] if share else []
            trainer = Trainer(args=TrainingArguments(name, **QUIET, **own), callbacks=pruning, **parts)
        trainer.train()
        seconds = round(time.time() - start, 1)
        made = {"lilnetx": lilnetx_files, "gradual": gradual_files, "sgd": one_shot_files}[settings["arm"]]
        sizes = made(trainer, folder, settings)
        script = [sys.executable, __file__, "--evaluate", str(data), *(str(folder / key) for key in sizes)]
        points = json.loads(subprocess.run(script, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    files = {key: {"bytes": size, "points": points[key]} for key, size in sizes.items()}
    return {"files": files, "seconds": seconds}


def lilnetx_files(trainer: Any, folder: Path, settings: dict[str, Any]) -> dict[str, int]:
    model = copy.deepcopy(trainer.model).eval()
    fold_batch_norm_(model)
    round_rest_(model)
    save_coded(model, folder / "lilnetx", example_inputs={"pixel_values": torch.randn(2, 3, 32, 32)})
    return {"lilnetx": disk_bytes(folder / "lilnetx")[0]}


def gradual_files(trainer: Any, folder: Path, settings: dict[str, Any]) -> dict[str, int]:
    model = copy.deepcopy(trainer.model)
    return {"gradual": coded_size(model, "int8", folder / "gradual")}


def one_shot_files(trainer: Any, folder: Path, settings: dict[str, Any]) -> dict[str, int]:
    sizes = {"zstd": zstd_size(copy.deepcopy(trainer.model), folder / "zstd")}
    batches = trainer.get_train_dataloader()
    for pattern in ONE_SHOT:
        model = copy.deepcopy(trainer.model)
        hfc.compress(model, pattern)
        if pattern != "int8":
            hfc.recalibrate_batch_norm(model, batches, 1000)
        sizes[pattern] = coded_size(model, pattern, folder / pattern)
    return sizes


def coded_size(model: Any, pattern: str, folder: Path) -> int:
    hfc.compress(model, "int8")
    fold_batch_norm_(model)
    round_rest_(model)
    save_coded(model, folder, pattern)
    return disk_bytes(folder)[0]


def zstd_size(model: Any, folder: Path) -> int:
    """Codes, scales and the rest as tensors, every file behind zstd -19; beside it what such a file is read as."""
    hfc.compress(model, "int8")
    fold_batch_norm_(model)
    round_rest_(model)
    model.save_pretrained(folder)  # the rounded values
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    for name, target in hfc.find_targets(model).items():
        codes, scales = quantize(target, 8)
        state[name], state[f"{name}_scale"] = codes.to(torch.int8), scales.flatten()
    with tempfile.TemporaryDirectory() as name:
        save_file({n: t.contiguous() for n, t in state.items()}, Path(name) / "model.safetensors")
        files = [Path(name) / "model.safetensors", folder / "config.json"]
        return sum(len(zstandard.ZstdCompressor(19).compress(file.read_bytes())) for file in files)


@torch.no_grad()
def evaluated(folders: list[str], data: Path) -> dict[str, float]:
    """Accuracies of checkpoints as they are loaded here."""
    _, test = load(data)
    found = {}
    for folder in folders:
        model: Any = (
            AutoModelForImageClassification.from_pretrained(folder).eval().to(memory_format=torch.channels_last)
        )
        right = 0
        for start in range(0, len(test), 500):
            batch = collate([(test, i) for i in range(start, start + 500)])
            right += int((model(batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).sum())
        found[Path(folder).name] = round(100 * right / len(test), 2)
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The result file: all runs, and means over seeds of every kind of file."""
    rows: dict[str, list[Any]] = {}
    for one in runs:
        own = one["settings"]
        for key, file in one["files"].items():
            at = (
                f"{own['steps_per_std']:g} steps, rate {own['rate_weight']:g}" if key == "lilnetx" else own.get("share")
            )
            rows.setdefault(f"{key}: {at}" if at else key, []).append(file)
    mean = {
        name: {
            "kilobytes": round(statistics.mean(f["bytes"] for f in files) / 1000, 1),
            "points": round(statistics.mean(f["points"] for f in files), 2),
            "by_seed": [f["points"] for f in files],
        }
        for name, files in rows.items()
    }
    seconds = sum(one["seconds"] for one in runs)
    return {
        "what": __doc__,
        **facts(),
        "minutes": round(seconds / 60, 1),
        "training": TRAINING,
        "mean": mean,
        "runs": runs,
    }


LOOKS = {  # prefix of a name, color, marker
    "LilNetX": ("lilnetx", "#2a6fbb", "o"),
    "pruned while training, int8, coded": ("gradual", "#2a9d6f", "^"),
    "pruned in one shot, int8, coded": ("unstructured", "#8a8a8a", "s"),
    "int8, coded": ("int8", "#d1603d", "D"),
    "int8 and zstd -19": ("zstd", "#1a1a1a", "v"),
}


def draw(result: dict[str, Any], stem: Path) -> None:
    """Accuracy over the size of all files; bars from the lowest to the highest seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, (prefix, color, marker) in LOOKS.items():
        rows = sorted((r for n, r in result["mean"].items() if n.startswith(prefix)), key=lambda r: r["kilobytes"])
        x, y = [r["kilobytes"] for r in rows], [r["points"] for r in rows]
        spread = [[r["points"] - min(r["by_seed"]) for r in rows], [max(r["by_seed"]) - r["points"] for r in rows]]
        axes.errorbar(x, y, spread, color=color, marker=marker, markersize=5, capsize=3, label=label)
    axes.set_xlabel("size of all files, kB")
    axes.set_ylabel("accuracy, %")
    axes.set_xlim(left=0)
    axes.set_title("ResNet-20 on CIFAR-10, one epoch: mean and range of two seeds", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    figure.savefig(stem.with_suffix(".png"), dpi=160, metadata={"Software": None})
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
