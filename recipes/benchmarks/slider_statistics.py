"""The slider on a CNN without data: stored batch-norm statistics against fresh ones, ResNet-20 on CIFAR-10.

A family of the trained ResNet-20 stores statistics for eight shares from 0.5 to 0.95, of 1,000 training images. Its
dense checkpoint is then pruned while it is loaded, at shares that are stored and between them, and compared with the
same weights after recalibration on 1,000 other training images, and with statistics left as they were. Points are the
accuracy on all test images (a lossy JPEG copy of CIFAR-10).

    OMP_NUM_THREADS=1 python recipes/benchmarks/slider_statistics.py --data FOLDER --weights WEIGHTS \\
        --output recipes/benchmarks/results/slider_statistics.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from cifar10_tpp import collate, load, resnet20
from machine import facts
from transformers import AutoModelForImageClassification

import hf_compress as hfc
from hf_compress.loading.statistics import STATISTICS

STORED, BETWEEN = (0.5, 0.7, 0.8, 0.9), (0.3, 0.55, 0.65, 0.775, 0.875, 0.925)
SAMPLES = 1000


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", type=Path, required=True, help="folder with train-*.parquet and test-*.parquet")
    flags.add_argument("--weights", type=Path, required=True, help="state dict of resnet20_cifar, safetensors")
    flags.add_argument("--output", type=Path, required=True)
    options = flags.parse_args()
    train, test = load(options.data)
    torch.manual_seed(0)
    order = torch.randperm(len(train)).tolist()
    ours, others = (batches(train, order[start : start + SAMPLES]) for start in (0, SAMPLES))
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        family = hfc.build_family(resnet20(options.weights), [], None, ours, name, calibration_samples=SAMPLES)
        dense = family.path_to(family.dense)
        for share in sorted((*STORED, *BETWEEN)):
            config = hfc.HfCompressConfig(f"unstructured:{share:g}")
            slid: Any = AutoModelForImageClassification.from_pretrained(dense, quantization_config=config)
            as_trained: Any = AutoModelForImageClassification.from_pretrained(dense)
            hfc.compress(as_trained, f"unstructured:{share:g}")
            points = {"stored": accuracy(slid, test), "as_trained": accuracy(as_trained, test)}
            hfc.recalibrate_batch_norm(slid, others, SAMPLES)
            points["fresh"] = accuracy(slid, test)
            rows[f"{share:g}"] = {**points, "is_stored": share in STORED}
            print(share, rows[f"{share:g}"], flush=True)
        size = (family.folder / STATISTICS).stat().st_size
    result = {"what": __doc__, **facts(), "bytes": size, "shares": rows}
    options.output.write_text(json.dumps(result, indent=2) + "\n")


def batches(images: Any, index: list[int]) -> list[dict[str, torch.Tensor]]:
    """Training images as they are in training: cropped and flipped."""
    return [collate([(images, i) for i in index[start : start + 100]]) for start in range(0, len(index), 100)]


@torch.no_grad()
def accuracy(model: Any, images: Any) -> float:
    """In points."""
    model.eval().to(memory_format=torch.channels_last)
    right = 0
    for start in range(0, len(images), 500):
        batch = collate([(images, i) for i in range(start, start + 500)])
        right += int((model(batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).sum())
    return round(100 * right / len(images), 2)


if __name__ == "__main__":
    main()
