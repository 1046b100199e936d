"""TPP against removal by L1 norm on CIFAR-10: a ResNet-20 loses 90 or 95 % of the filters inside its blocks.

All runs start from the same trained weights and take 4,000 steps of 64 images in all. TPP regularizes for 3,000 steps
(the short profile: U = 2,000, S = 1,000), removes, and retrains for 1,000. L1 removes the same filters at once and
retrains for all 4,000 steps. Four settings are tried for each arm, with 95 % removed, seed 0, and 5,000 training images
that these runs do not train on: for TPP two learning rates of the regularization (the published 1e-3, and 1e-2) with
two of the retraining each, for L1 four of the retraining. The final runs train on all images, and they alone look at
the test images. Both compute in bfloat16 (autocast), which is what a CPU is fastest with; weights and penalties are
float32.

The images are a lossy JPEG copy of CIFAR-10, so accuracies are not comparable with published ones. Runs are kept in a
folder, so that the script goes on where it was interrupted; several processes share them.

    OMP_NUM_THREADS=1 python recipes/benchmarks/cifar10_tpp.py --data FOLDER --weights resnet20_jpeg.safetensors \\
        --runs FOLDER --output recipes/benchmarks/results/cifar10_tpp.json
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

import numpy as np
import torch
from datasets import load_dataset
from kept import QUIET, all_kept, parser
from machine import facts
from safetensors.torch import load_file
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, set_seed

import hf_compress as hfc

ARMS: dict[str, dict[str, Any]] = {
    "tpp": {"profile": "short"},
    "l1": {"penalty": "none", "grow_steps": 0, "stabilize_steps": 0},
}
STEPS = {"tpp": 1000, "l1": 4000}  # of the retraining
SHARES, SEEDS = (0.9, 0.95), (0, 1)
HELD_OUT = 5000
# What is tried: learning rates of the regularization, where there is one, and of the retraining after it.
TRIED: dict[str, list[tuple[float, list[float]]]] = {
    "tpp": [(1e-3, [0.01, 0.05]), (1e-2, [0.05, 0.1])],
    "l1": [(1e-3, [0.01, 0.05]), (1e-3, [0.1, 0.2])],
}
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 500,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "lr_scheduler_type": "cosine",
    "weight_decay": 5e-4,
    "max_grad_norm": 0.0,
    "bf16": True,
    "trainability_samples": 32,
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--data", type=Path, required=True, help="folder with train-*.parquet and test-*.parquet")
    flags.add_argument("--weights", type=Path, required=True, help="state dict of resnet20_cifar, safetensors")
    options = flags.parse_args()
    measure = functools.partial(run, data=options.data, weights=options.weights)
    tuning = all_kept(options.runs, tuned(), measure)
    runs = all_kept(options.runs, final(chosen(tuning)), measure)
    options.output.write_text(json.dumps(summary(tuning, runs), indent=2) + "\n")
    draw(json.loads(options.output.read_text()), options.output.with_suffix(""))


def setting(
    arm: str, share: float, seed: int, held_out: int, regularize_rate: float, rates: list[float]
) -> dict[str, Any]:
    of_run = {"arm": arm, "share": share, "seed": seed, "held_out": held_out, "rates": rates}
    own = {**ARMS[arm], "max_steps": STEPS[arm], "regularize_learning_rate": regularize_rate}
    return {**of_run, **TRAINING, **own}


def tuned() -> list[dict[str, Any]]:
    """The trials of each arm, without the images that are held out."""
    return [setting(arm, max(SHARES), 0, HELD_OUT, *trial) for arm in ARMS for trial in TRIED[arm]]


def chosen(tuning: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """The learning rates of each arm, of regularization and retraining, that were best on them."""
    best: dict[str, tuple[float, float, float]] = {}
    for row in tuning:
        own = row["settings"]
        found = [(points, own["regularize_learning_rate"], float(rate)) for rate, points in row["by_rate"].items()]
        best[own["arm"]] = max([*found, *([best[own["arm"]]] if own["arm"] in best else [])])
    return {arm: (regularize, rate) for arm, (_, regularize, rate) in best.items()}


def final(rates: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """The runs that are compared."""
    runs = itertools.product(ARMS, SEEDS, SHARES)
    return [setting(arm, share, seed, 0, rates[arm][0], [rates[arm][1]]) for arm, seed, share in runs]


class Images(torch.utils.data.Dataset):
    """Decoded once; a sample is a position, of which the collator makes the batch."""

    def __init__(self, rows: Any, is_augmented: bool) -> None:
        pixels = torch.from_numpy(np.stack([np.asarray(row["image"].convert("RGB")) for row in rows]))
        self.pixels, self.labels = pixels.permute(0, 3, 1, 2).contiguous(), torch.tensor(rows["label"])
        self.is_augmented = is_augmented

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Images, int]:
        return self, i

    def without(self, start: int, stop: int | None) -> Images:
        """Some of the images."""
        part = object.__new__(Images)
        part.pixels, part.labels = self.pixels[start:stop], self.labels[start:stop]
        part.is_augmented = self.is_augmented
        return part


def collate(samples: list[tuple[Images, int]]) -> dict[str, torch.Tensor]:
    """Crops of the padded image and flips, drawn from the global generator, or the images as they are."""
    images, index = samples[0][0], torch.tensor([i for _, i in samples])
    pixels = images.pixels[index].float() / 255
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    if images.is_augmented:
        count = len(index)
        padded = torch.nn.functional.pad(pixels, (4, 4, 4, 4))
        top, left = torch.randint(0, 9, (2, count))
        rows, columns = (at[:, None] + torch.arange(32) for at in (top, left))
        columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
        pixels = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
    return {"pixel_values": pixels.to(memory_format=torch.channels_last), "labels": images.labels[index]}


@functools.cache
def load(data: Path) -> tuple[Images, Images]:
    files = {split: str(data / f"{split}-*.parquet") for split in ("train", "test")}
    rows = load_dataset("parquet", data_files=files)
    return Images(rows["train"], True), Images(rows["test"], False)


def run(settings: dict[str, Any], data: Path, weights: Path) -> dict[str, Any]:
    """Regularize and remove once, then retrain with each learning rate; accuracies in points."""
    train, test = load(data)
    if settings["held_out"]:
        kept = train.without(0, -HELD_OUT)
        train, test = kept, train.without(len(kept), None)
        test.is_augmented = False
    own = {k: v for k, v in settings.items() if k not in ("arm", "share", "held_out", "rates")}
    found: dict[str, Any] = {"by_rate": {}}
    with tempfile.TemporaryDirectory() as folder:
        for rate in settings["rates"]:
            set_seed(settings["seed"])
            saving = {"save_strategy": "steps", "save_steps": 10**6, "learning_rate": rate}
            args = hfc.TPPConfig(
                folder,
                **{**QUIET, **own, **saving},
                patterns=[f"*layer*.conv1=filters:{settings['share']}"],
                eval_on_start=True,
                remove_unused_columns=False,
            )
            trainer = hfc.TPPTrainer(
                model=resnet20(weights),
                args=args,
                train_dataset=train,
                eval_dataset=test,
                data_collator=collate,
                compute_metrics=lambda p: {"points": 100 * float((p.predictions.argmax(-1) == p.label_ids).mean())},
            )
            regularized = sorted(Path(folder).glob("regularized/checkpoint-*"))
            start = time.time()
            trainer.train(resume_from_checkpoint=str(regularized[-1]) if regularized else None)
            found["by_rate"][str(rate)] = round(trainer.evaluate()["eval_points"], 2)
            found.setdefault("seconds", []).append(round(time.time() - start, 1))
            found |= facts_of(trainer) if len(found["by_rate"]) == 1 else {}
    return found


def resnet20(weights: Path) -> Any:
    config = TimmWrapperConfig(architecture="resnet20_cifar", num_labels=10)
    model = TimmWrapperForImageClassification(config)
    model.timm_model.load_state_dict(load_file(weights), strict=False)  # lacks num_batches_tracked
    return model.to(memory_format=torch.channels_last)


def facts_of(trainer: Any) -> dict[str, Any]:
    """Accuracies at the start of each part, and the mean Jacobian singular values; from the log."""
    log = trainer.state.log_history
    starts = [row["eval_points"] for row in log if "eval_points" in row and row["step"] == 0]
    values = {k: round(v, 4) for row in log for k, v in row.items() if k.startswith("trainability")}
    first = next((row["trainability"] for row in log if "trainability" in row), None)
    return {
        "after_removal": round(starts[-1], 2),
        "speed_up": trainer.progress.speed_up,
        "e_folds": next((round(row["e_folds"], 2) for row in log if "e_folds" in row), 0.0),
        "trainability": {"start": first, **values},
    }


def summary(tuning: list[dict[str, Any]], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The result file: what was tried and chosen, means with spread, differences by seed, singular values."""
    by = {(r["settings"]["arm"], r["settings"]["share"], r["settings"]["seed"]): points_of(r) for r in runs}
    mean: dict[str, Any] = {}
    minus: dict[str, Any] = {}
    for share in SHARES:
        points = {arm: [by[arm, share, seed] for seed in SEEDS] for arm in ARMS}
        mean[str(share)] = {
            arm: {"mean": round(statistics.mean(found), 2), "std": round(statistics.stdev(found), 2)}
            for arm, found in points.items()
        }
        minus[str(share)] = [round(a - b, 2) for a, b in zip(points["tpp"], points["l1"], strict=True)]
    seconds = sum(sum(r["seconds"]) for r in (*tuning, *runs))
    return {
        "what": __doc__,
        **facts(),
        "minutes": round(seconds / 60, 1),
        "training": TRAINING,
        "steps": STEPS,
        "chosen": chosen(tuning),
        "mean": mean,
        "tpp_minus_l1": minus,
        "tuning": tuning,
        "runs": runs,
    }


def points_of(run: dict[str, Any]) -> float:
    (points,) = run["by_rate"].values()
    return float(points)


def draw(result: dict[str, Any], stem: Path) -> None:
    """Accuracy of each arm at both shares, a point a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = {"tpp": "#2a6fbb", "l1": "#d1603d"}
    names = {"tpp": "TPP", "l1": "L1, removed at once"}
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, share in zip(figure.subplots(1, len(SHARES)), result["mean"], strict=True):
        for place, arm in enumerate(ARMS):
            own = [r for r in result["runs"] if (r["settings"]["arm"], str(r["settings"]["share"])) == (arm, share)]
            points = [points_of(r) for r in own]
            axes.plot([place] * len(points), points, "o", color=colors[arm], markersize=6)
            axes.hlines(statistics.mean(points), place - 0.25, place + 0.25, color=colors[arm], linewidth=2.5)
        axes.set_xticks(range(len(ARMS)), [names[arm].replace(" ", "\n", 1) for arm in ARMS])
        axes.set_title(f"{100 * float(share):g} % of the filters removed", loc="left", fontsize=11)
        axes.set_ylabel("accuracy, %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    figure.savefig(stem.with_suffix(".png"), dpi=160, metadata={"Software": None})
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
