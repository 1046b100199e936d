"""What the penalty of TPP costs: its gradient in closed form beside autograd, and beside a training step.

"autograd" takes full Gram matrices, a mask that is kept from step to step, and the backward pass. "target" compares
the Gram matrix with a copy of itself whose rows and columns are set to zero one after the other in every step, as the
paper's code does, and takes the backward pass; decays are added to gradients by index in both. All leave the same
gradients (checked here to 1e-4 of the largest). The forms run in turns on the processor clock of one thread; the
median of the ratios is kept. The training step is forward and backward: ResNet-56 with 128 images, BERT-base with 1,024
tokens.

    OMP_NUM_THREADS=1 python recipes/benchmarks/tpp_cost.py --output recipes/benchmarks/results/tpp_cost.json
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from machine import facts
from transformers import BertConfig, BertForSequenceClassification
from turns import in_turns, ratios

import hf_compress  # noqa: F401  # registers the nets of the papers
from hf_compress.methods.tpp import TrainabilityPenalty, select

ROUNDS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "what": __doc__,
        "command": "OMP_NUM_THREADS=1 python " + " ".join(sys.argv),
        **facts(),
        "rounds": ROUNDS,
        "cases": {name: measured(*make()) for name, make in CASES.items()},
    }
    text = json.dumps(result, indent=2)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)


def resnet56(share: float) -> tuple[Any, Any, list[str], dict[str, Any]]:
    images = {"x": torch.randn(128, 3, 32, 32)}
    return timm.create_model("resnet56_cifar"), images, [f"layer*.conv1=filters:{share}"], {}


def resnet50() -> tuple[Any, Any, list[str], dict[str, Any]]:
    rules = ["layer[1-3].*.conv[12]=filters:0.6", "layer4.*.conv[12]=filters:0.21"]
    return timm.create_model("resnet50"), {"x": torch.randn(2, 3, 224, 224)}, rules, {}


def bert() -> tuple[Any, Any, list[str], dict[str, Any]]:
    model = BertForSequenceClassification(BertConfig())
    ids = torch.randint(1, 30_000, (8, 128))
    return model, {"input_ids": ids}, ["neurons:0.5"], {"gram_scale": "n", "gram_weight": 16.0}


CASES: dict[str, Callable[[], Any]] = {
    "resnet56, 90 % of the filters": lambda: resnet56(0.9),
    "resnet56, 50 % of the filters": lambda: resnet56(0.5),
    "resnet50, 2.31 x": resnet50,
    "bert-base, 50 % of the neurons": bert,
}


def measured(model: Any, inputs: Any, rules: list[str], gram: dict[str, Any]) -> dict[str, Any]:
    """Seconds of both forms and of a training step, and their ratios."""
    sample = {k: v[:1] for k, v in inputs.items()}
    sample = sample.get("x", sample)
    pruned = select(model, rules, sample).pruned
    penalty = TrainabilityPenalty(model, pruned, sample, **gram)
    written = {name: autograd_form(model, penalty, name == "target") for name in ("autograd", "target")}
    for form in written.values():
        check(model, penalty, form)

    def step() -> None:
        output = model(**inputs)
        (output if isinstance(output, torch.Tensor) else output.logits).square().mean().backward()

    forms: dict[str, Callable[[], None]] = {"closed": lambda: penalty.add_gradients(0.5), "training": step}
    forms |= {name: functools.partial(form, 0.5) for name, form in written.items()}
    seconds = in_turns(forms, ROUNDS, repeats={name: 3 for name in forms if name != "training"})
    ratio = lambda a, b: statistics.median(ratios(seconds, a, b))  # noqa: E731
    return {
        "layers": len(pruned),
        "milliseconds": {name: round(1e3 * statistics.median(s), 3) for name, s in seconds.items()},
        "autograd_over_closed": round(ratio("autograd", "closed"), 2),
        "target_over_closed": round(ratio("target", "closed"), 2),
        "closed_over_training": round(ratio("closed", "training"), 5),
    }


def autograd_form(model: Any, penalty: TrainabilityPenalty, has_target: bool) -> Callable[[float], None]:
    """The penalty written down for autograd, with a mask or with a target."""
    scale = {"mean": lambda n: 1 / n**2, "n": lambda n: 1 / n}[penalty.gram_scale]
    roots, decays = [], []
    for rows in penalty._rows:
        layer = model.get_submodule(rows.path)
        if rows.role == "root":
            stays = torch.ones(layer.weight.shape[0])
            stays[rows.pruned] = 0
            roots.append((layer.weight, 1 - stays[:, None] * stays[None], rows.pruned.tolist()))
        decays += [(p, rows.pruned) for p in (layer.weight, layer.bias) if p is not None]

    def form(strength: float) -> None:
        total: Any = 0.0
        for weight, mask, pruned in roots:
            matrix = weight.flatten(1)
            gram = matrix @ matrix.T
            if has_target:
                target = matrix.detach() @ matrix.detach().T
                for i in pruned:
                    target[i, :] = target[:, i] = 0
                gram = gram - target
            else:
                gram = gram * mask
            total = total + scale(len(mask)) * gram.square().sum()
        (penalty.gram_weight * strength * total).backward()
        with torch.no_grad():
            for parameter, rows in decays:
                parameter.grad[rows] += strength * parameter[rows]

    return form


def check(model: Any, penalty: TrainabilityPenalty, by_autograd: Callable[[float], None]) -> None:
    found = []
    for form in (penalty.add_gradients, by_autograd):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        form(0.5)
        found.append([p.grad.clone() for p in model.parameters()])
    largest = max(g.abs().max() for g in found[1])
    error = max((a - b).abs().max() for a, b in zip(*found, strict=True))
    if not error <= 1e-4 * largest:
        raise RuntimeError(f"the forms differ by {error}, the largest gradient is {largest}")


if __name__ == "__main__":
    main()
