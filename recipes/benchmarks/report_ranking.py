"""Does the data-free ranking of `hf-compress report` agree with measured losses of accuracy?

One layer at a time is pruned: to 80 or 90 % of its own weights, or to what a threshold over all layers leaves of it at
80 or 90 %. What the net then loses on test images (accuracy, and cross entropy, which is less noisy) is compared with
scores that need no data, by Spearman's rank correlation. The score of the report was chosen among these on ResNet-20;
ResNet-32 chose nothing. "halves" is the correlation of the loss on every other image with the loss on the
rest: no score can be expected to agree better. Batch norms keep their statistics.

The images are a lossy JPEG copy of CIFAR-10. ResNet-20 was fine-tuned on them, the other was not.

    OMP_NUM_THREADS=1 python recipes/benchmarks/report_ranking.py --data CIFAR10 --weights RESNETS \\
        --output recipes/benchmarks/results/report_ranking.json
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from datasets import load_dataset
from safetensors.torch import load_file
from scipy.stats import spearmanr

import hf_compress as hfc
from hf_compress.report import LayerNumbers, inspect_checkpoint

NETS = {"resnet20_jpeg": "resnet20_cifar", "resnet32": "resnet32_cifar"}
CHOSEN_ON = "resnet20_jpeg"
CONDITIONS = ("unstructured:0.8:layer", "unstructured:0.9:layer", "unstructured:0.8", "unstructured:0.9")
SCORE = "sensitivity: removed / sqrt(inputs)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with test-*.parquet")
    parser.add_argument("--weights", type=Path, required=True, help=f"folder with {', '.join(NETS)} as safetensors")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000, help="the first so many test images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pixels, labels = test_images(options.data, options.images)
    start, nets = time.time(), {}
    for name, architecture in NETS.items():
        nets[name] = study(options.weights / f"{name}.safetensors", architecture, pixels, labels)
        print(name, nets[name]["mean"], f"{time.time() - start:.0f} s", flush=True)
    result = {
        "what": __doc__,
        "command": "OMP_NUM_THREADS=1 python recipes/benchmarks/report_ranking.py --data CIFAR10 --weights RESNETS "
        f"--output recipes/benchmarks/results/report_ranking.json --images {options.images}",
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "versions": {p: importlib.metadata.version(p) for p in ("hf_compress", "torch", "timm")},
        "minutes": round((time.time() - start) / 60, 1),
        "score_of_the_report": SCORE,
        "chosen_on": CHOSEN_ON,
        "nets": nets,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")


def test_images(folder: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalized pixels (count, 3, 32, 32) and labels; the test split is shuffled."""
    images = load_dataset("parquet", data_files={"test": str(folder / "test-*.parquet")})["test"].select(range(count))
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images["image"]]))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2), torch.tensor(images["label"])


def study(weights: Path, architecture: str, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Measured losses and scores of every layer of one net, and how they agree."""
    model = timm.create_model(architecture).eval()
    model.load_state_dict(load_file(weights), strict=False)  # lacks num_batches_tracked
    report = inspect_checkpoint(str(weights), CONDITIONS)
    layers = list(enumerate(report.layers))
    weights_of = {name: target.parameter.detach().double() for name, target in hfc.find_targets(model).items()}
    masks = {condition: hfc.parse_pattern(condition).masks(hfc.find_targets(model)) for condition in CONDITIONS}
    dense, losses = measure(model, masks, pixels, labels)
    conditions = {}
    for condition in CONDITIONS:
        rows = losses[condition]
        scores = [candidates(i, n, condition, weights_of[n.name], masks[condition][n.name]) for i, n in layers]
        columns = {score: [row[score] for row in scores] for score in scores[0]}
        accuracy, entropy = ([rows[n.name][kind] for n in report.layers] for kind in ("accuracy", "entropy"))
        conditions[condition] = {
            "loss": {n.name: rows[n.name] for n in report.layers},
            "halves": [rank(*zip(*(rows[n.name][f"{k}_halves"] for n in report.layers), strict=True)) for k in KINDS],
            "spearman": {s: [rank(column, accuracy), rank(column, entropy)] for s, column in columns.items()},
        }
    scores_of = {s: [conditions[c]["spearman"][s][0] for c in CONDITIONS] for s in columns}
    return {
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "dense": dense,
        "conditions": conditions,
        "mean": {s: round(statistics.mean(values), 3) for s, values in scores_of.items()},
    }


KINDS = ("accuracy", "entropy")


def candidates(
    position: int, layer: LayerNumbers, condition: str, weight: torch.Tensor, mask: torch.Tensor
) -> dict[str, float]:
    """Scores that need no data: the report's, and others that were considered."""
    numbers, spectrum = layer.patterns[condition], layer.spectrum
    rows, removed = weight.flatten(1), weight.masked_fill(mask, 0).flatten(1)
    norm, strongest = float(removed.norm()), float(torch.linalg.matrix_norm(removed, 2))
    return {
        SCORE: numbers.sensitivity,
        "removed": norm,
        "removed / sqrt(outputs)": norm / len(rows) ** 0.5,
        "removed, largest singular value": strongest,
        "removed, largest singular value / that of the weight": strongest / float(torch.linalg.matrix_norm(rows, 2)),
        "removed, sum of magnitudes": float(removed.abs().sum()),
        "energy lost": 1 - numbers.energy,
        "energy lost / sqrt(inputs)": (1 - numbers.energy) / weight.shape[1] ** 0.5,
        "energy lost, mean over outputs": float((removed.square().sum(1) / rows.square().sum(1)).mean()),
        "share removed": numbers.sparsity,
        "number of weights": layer.numel,
        "early in the net": -position,
        "small stable rank": -spectrum.stable_rank,
        "small effective rank, of the full one": -spectrum.effective_rank / spectrum.full_rank,
    }


@torch.no_grad()
def measure(
    model: Any, masks: dict[str, dict[str, torch.Tensor]], pixels: torch.Tensor, labels: torch.Tensor
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """What pruning each layer alone costs. Layers before it are computed once for all its conditions."""
    stages: list[Callable[[torch.Tensor], torch.Tensor]] = [lambda x: F.relu(model.bn1(model.conv1(x)))]
    stages += [*model.layer1, *model.layer2, *model.layer3, model.forward_head]
    owners = ["conv1.", *(f"layer{s}.{b}." for s in (1, 2, 3) for b in range(len(model.layer1))), "linear."]
    targets = hfc.find_targets(model)
    batches = [batch.contiguous(memory_format=torch.channels_last) for batch in pixels.split(250)]
    dense = judge(run(stages, batches), labels)
    losses: dict[str, dict[str, Any]] = {condition: {} for condition in masks}
    for i, (stage, owner) in enumerate(zip(stages, owners, strict=True)):
        for name in (name for name in targets if name.startswith(owner)):
            weight = targets[name].parameter
            before = weight.clone()
            for condition, mask in masks.items():
                weight.mul_(mask[name])
                losses[condition][name] = difference(judge(run(stages[i:], batches), labels), dense)
                weight.copy_(before)
        batches = [stage(batch) for batch in batches]
    return {kind: round(float(dense[kind].mean()), 4) for kind in KINDS}, losses


def run(stages: list[Callable[[torch.Tensor], torch.Tensor]], batches: list[torch.Tensor]) -> torch.Tensor:
    outputs = []
    for batch in batches:
        for stage in stages:
            batch = stage(batch)
        outputs.append(batch)
    return torch.cat(outputs)


def judge(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every image: right or wrong in points, cross entropy."""
    right = 100 * (logits.argmax(1) == labels).double()
    return {"accuracy": right, "entropy": F.cross_entropy(logits.double(), labels, reduction="none")}


def difference(pruned: dict[str, torch.Tensor], dense: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Points of accuracy that are lost and cross entropy that is gained, also on the even and the odd images alone."""
    found: dict[str, Any] = {}
    for kind, sign in (("accuracy", 1), ("entropy", -1)):
        loss = sign * (dense[kind] - pruned[kind])
        found[kind] = round(float(loss.mean()), 4)
        found[f"{kind}_halves"] = [round(float(loss[k::2].mean()), 4) for k in (0, 1)]
    return found


def rank(a: Any, b: Any) -> float:
    return round(float(spearmanr(a, b)[0]), 3)


if __name__ == "__main__":
    main()
