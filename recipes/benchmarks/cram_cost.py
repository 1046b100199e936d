"""What a CrAM+ step costs beside a plain one: time on ResNet-18 (64 px, batch 16), memory on a BERT-base.

Time is the processor clock of one thread, plain and CrAM steps in turns, so that a busy machine slows both; the ratio
of the minima and the median of the ratios are kept. Memory is the peak resident size of a process of its own.

    OMP_NUM_THREADS=1 python recipes/benchmarks/cram_cost.py --output recipes/benchmarks/results/cram_cost.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

from hf_compress.methods.cram import CrAM

ROUNDS = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory", choices=["plain", "cram"], help="measure one process and print its peak")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print(json.dumps(peak_memory(options.memory == "cram")))
        return
    result = {
        "what": __doc__,
        "command": "OMP_NUM_THREADS=1 python " + " ".join(sys.argv),
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "versions": {p: importlib.metadata.version(p) for p in ("hf_compress", "torch", "timm", "transformers")},
        "time": step_times(),
        "memory": memory(),
    }
    text = json.dumps(result, indent=2)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)


def step_times() -> dict[str, Any]:
    """Seconds of a step with and without CrAM."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 3, 64, 64), torch.randint(0, 10, (16,))
    steps = {}
    for name in ("plain", "cram"):
        model = timm.create_model("resnet18", num_classes=10)
        sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
        steps[name] = stepper(model, CrAM(sgd, model) if name == "cram" else sgd, lambda m: cross_entropy(m(x), y))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(ROUNDS + 2):
        for name in steps if i % 2 else reversed(steps):
            start = time.process_time()
            steps[name]()
            if i >= 2:
                seconds[name].append(time.process_time() - start)
    ratios = [c / p for c, p in zip(seconds["cram"], seconds["plain"], strict=True)]
    return {
        "net": "resnet18, 64 px, batch 16, patterns unstructured 0.5, 0.7, 0.9",
        "seconds": {name: {"min": min(s), "median": statistics.median(s)} for name, s in seconds.items()},
        "ratio_of_minima": min(seconds["cram"]) / min(seconds["plain"]),
        "median_ratio": statistics.median(ratios),
        "rounds": ROUNDS,
    }


def stepper(model: Any, opt: Any, loss: Any) -> Any:
    def step() -> None:
        loss(model).backward()
        if isinstance(opt, CrAM):
            with opt.compressed():
                loss(model).backward()
        opt.step()
        opt.zero_grad()

    return step


def memory() -> dict[str, Any]:
    """Peaks of two processes, and their difference in copies of the parameters."""
    peaks = {}
    for name in ("plain", "cram"):
        command = [sys.executable, __file__, "--memory", name]
        peaks[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    extra = peaks["cram"]["peak_bytes"] - peaks["plain"]["peak_bytes"]
    return {
        "net": "BERT-base for classification, batch 2 of 16 tokens, SGD with momentum",
        "peaks": peaks,
        "extra_copies_of_the_parameters": extra / peaks["plain"]["parameter_bytes"],
    }


def peak_memory(with_cram: bool) -> dict[str, int]:
    """Resident size at its highest over three steps."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_labels=2))
    ids, labels = torch.randint(0, 30_000, (2, 16)), torch.tensor([0, 1])
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    step = stepper(model, CrAM(sgd, model) if with_cram else sgd, lambda m: m(input_ids=ids, labels=labels).loss)
    for _ in range(3):
        step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": peak, "parameter_bytes": sum(p.numel() * 4 for p in model.parameters())}


if __name__ == "__main__":
    main()
