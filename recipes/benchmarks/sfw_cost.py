"""What a step of SFW costs beside a fused step of SGD with momentum, on the shapes of ResNet-50 and BERT-base.

Time is the processor clock of one thread, all optimizers in turns, so that a busy machine slows them alike; the ratio
of the minima and the median of the ratios are kept. Gradients are random and change a little from step to step, as
momentum does in training. Memory is what the optimizer keeps between steps, in copies of the parameters.

    OMP_NUM_THREADS=1 python recipes/benchmarks/sfw_cost.py --output recipes/benchmarks/results/sfw_cost.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from digits import facts
from transformers import BertConfig, BertForSequenceClassification
from turns import beside, in_turns

from hf_compress.methods.sfw import create_sfw

ROUNDS = 9
REGIONS = {
    "group": "group_k_support(k=0.1, radius=init:10)",
    "k_sparse": "k_sparse(k=0.1, radius=init:10)",
    "k_support": "k_support(k=0.1, radius=init:10)",
    "spectral": "spectral_k_support(k=0.1, radius=init:10)",
}
NETS = {
    "resnet50": lambda: timm.create_model("resnet50"),
    "bert-base": lambda: BertForSequenceClassification(BertConfig()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rescale", default="gradient")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "what": __doc__,
        "command": "OMP_NUM_THREADS=1 python " + " ".join(sys.argv),
        **facts(),
        "rescale": options.rescale,
        "regions": REGIONS,
        "nets": {name: measure(make(), options.rescale) for name, make in NETS.items()},
    }
    text = json.dumps(result, indent=2)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)


def measure(model: Any, rescale: str) -> dict[str, Any]:
    """Seconds of a step with each optimizer, and their ratios to SGD."""
    torch.manual_seed(0)
    parameters = list(model.parameters())
    base = [torch.randn_like(p) for p in parameters]
    optimizers: dict[str, Any] = {"sgd": torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, fused=True)}
    optimizers |= {name: create_sfw(model, text, lr=1e-3, rescale=rescale) for name, text in REGIONS.items()}

    def new_gradients() -> None:
        for parameter, gradient in zip(parameters, base, strict=True):
            parameter.grad = gradient.add_(torch.randn_like(gradient), alpha=0.1)

    seconds = in_turns({name: o.step for name, o in optimizers.items()}, ROUNDS, before=new_gradients)
    size = sum(p.numel() for p in parameters)
    return {
        name: {**numbers, "state_in_copies": state_size(optimizers[name]) / size}
        for name, numbers in beside(seconds, "sgd").items()
    }


def state_size(optimizer: torch.optim.Optimizer) -> int:
    """Entries of all tensors that an optimizer keeps."""
    tensors = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
    return sum(t.numel() for t in tensors)


if __name__ == "__main__":
    main()
