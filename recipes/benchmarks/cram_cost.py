"""What a CrAM+ step costs beside a plain one: time on ResNet-18 (64 px, batch 16), memory on a BERT-base.

Time is the processor clock of one thread, plain and CrAM steps in turns, so that a busy machine slows both; the ratio
of the minima and the median of the ratios are kept. Memory is the peak resident size of a process of its own.

    OMP_NUM_THREADS=1 python recipes/benchmarks/cram_cost.py --output recipes/benchmarks/results/cram_cost.json
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from digits import facts
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification
from turns import beside, in_turns

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
        **facts(),
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
    found = beside(in_turns(steps, ROUNDS), "plain")
    return {
        "net": "resnet18, 64 px, batch 16, patterns unstructured 0.5, 0.7, 0.9",
        "seconds": {name: numbers["seconds"] for name, numbers in found.items()},
        "ratio_of_minima": found["cram"]["ratio_of_minima"],
        "median_ratio": found["cram"]["median_ratio"],
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
