"""What CrAM+ costs beside plain training: whole steps, its own work alone, and memory.

Time is the processor clock of one thread, all forms in turns, so that a busy machine slows them alike; ratios are of
the minima and medians over rounds. "two passes" is the floor: forward and backward twice, and the step of SGD.
"bookkeeping" leaves the passes out: gradients are ready, and what is timed is the perturbation, the selection, the
masks, the sum of both gradients, and the step of SGD, in fused steps of SGD. Handing gradients over to `.grad` is work
of the passes: "hand over" is that alone, and "cram_alone" is without it. "published" is the code of
the paper, where a folder with its checkout is given; it draws the same patterns. Memory is the peak of a process of its
own, in copies of the parameters: weights, gradients and momentum are three.

    OMP_NUM_THREADS=1 python recipes/benchmarks/cram_cost.py --published FOLDER --output cram_cost.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published
import timm
import torch
from machine import facts
from shapes import SHAPES, SHORT_STEP, copied, copies_at_peak, peak_of
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification
from turns import beside, in_turns

from hf_compress.methods.cram import CrAM

ROUNDS, ROUNDS_OF_PUBLISHED = 15, 7
Loss = Callable[[Any], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--published", type=Path, help="folder of checkouts, see published.py")
    parser.add_argument("--memory", nargs=2, metavar=("NET", "FORM"), help="only print the peak of this process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print(json.dumps(copies_at_peak(lambda: for_memory(*options.memory))))
        return
    result = {
        "what": __doc__,
        "command": "python recipes/benchmarks/cram_cost.py --published FOLDER --output cram_cost.json",
        **facts(),
        "published": published.commits(options.published) if options.published else {},
        "rounds": ROUNDS,
        "steps": {name: steps(make, options.published) for name, make in NETS.items()},
        "bookkeeping": {name: bookkeeping(name, options.published) for name in SHAPES},
        "memory": {name: peak_of(__file__, "bert-base", name) for name in ("plain", "cram")},
    }
    text = json.dumps(result, indent=2)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)


def resnet18() -> tuple[Any, Loss]:
    """64 px, batch 16."""
    x, y = torch.randn(16, 3, 64, 64), torch.randint(0, 10, (16,))
    return timm.create_model("resnet18", num_classes=10), lambda model: cross_entropy(model(x), y)


def bert(width: int, layers: int, length: int) -> tuple[Any, Loss]:
    """Batch 16."""
    ids, labels = torch.randint(0, 30_000, (16, length)), torch.randint(0, 2, (16,))
    size = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    model = BertForSequenceClassification(BertConfig(**size, intermediate_size=4 * width))
    return model, lambda m: m(input_ids=ids, labels=labels).loss


NETS: dict[str, Callable[[], tuple[Any, Loss]]] = {
    "resnet18": resnet18,
    "bert-mini": lambda: bert(256, 4, 64),
    "bert-tiny": lambda: bert(128, 2, 32),
}


def steps(make: Callable[[], tuple[Any, Loss]], folder: Path | None) -> dict[str, Any]:
    """Whole steps beside that of plain SGD; every form has a model of its own."""
    forms: dict[str, Callable[[], Any]] = {}
    for name in ("plain", "two passes", "cram"):
        torch.manual_seed(0)
        model, loss = make()
        sgd = torch.optim.SGD(model.parameters(), fused=True, **SHORT_STEP)
        forms[name] = stepper(
            model, CrAM(sgd, model) if name == "cram" else sgd, loss, 2 if name == "two passes" else 1
        )
    found = beside(in_turns(forms, ROUNDS), "plain")
    if folder is not None:
        torch.manual_seed(0)
        model, loss = make()
        theirs = published.cram_optimizer(folder, model, **SHORT_STEP)
        their_step = lambda: published.cram_step(folder, theirs, model, lambda: loss(model))  # noqa: E731
        slowly = {"plain": forms["plain"], "cram": forms["cram"], "published": their_step}
        slow = beside(in_turns(slowly, ROUNDS_OF_PUBLISHED), "plain")
        found |= {"published": slow["published"], "published_over_ours": over(slow)}
    return found


def stepper(model: Any, optimizer: Any, loss: Loss, passes: int = 1) -> Callable[[], None]:
    def step() -> None:
        for _ in range(passes):
            loss(model).backward()
        if isinstance(optimizer, CrAM):
            with optimizer.compressed():
                loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bookkeeping(net: str, folder: Path | None) -> dict[str, Any]:
    """A step whose gradients are ready, in fused steps of SGD."""
    torch.manual_seed(0)
    model = SHAPES[net]()
    parameters = list(model.parameters())
    gradients = [torch.randn_like(p) for p in parameters]
    sgd = torch.optim.SGD(parameters, fused=True, **SHORT_STEP)
    cram = CrAM(sgd, model, ["unstructured:0.9"])

    def ours() -> None:
        with cram.compressed():
            torch.autograd.backward(parameters, gradients)
        cram.step()

    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    forms = {"plain": sgd.step, "copy": copied(parameters), "hand over": lambda: hand_over(parameters, gradients)}
    found: dict[str, Any] = beside(in_turns({**forms, "cram": ours}, ROUNDS), "plain")
    found["cram_alone"] = found["cram"]["ratio_of_minima"] - found["hand over"]["ratio_of_minima"]
    if folder is not None:
        other = SHAPES[net]()
        theirs = published.cram_optimizer(folder, other, [0.9], **SHORT_STEP)

        def closure() -> torch.Tensor:
            for parameter, gradient in zip(other.parameters(), gradients, strict=True):
                parameter.grad = gradient
            return torch.zeros(())

        closure()
        slowly = {"plain": sgd.step, "cram": ours, "published": lambda: theirs.step(closure)}
        slow = beside(in_turns(slowly, 3, warm_up=1), "plain")
        found |= {"published": slow["published"], "published_over_ours": over(slow)}
    return found


def hand_over(parameters: list[Any], gradients: list[torch.Tensor]) -> None:
    """What a backward pass does with its gradients: they become `.grad`, and hooks run."""
    for parameter in parameters:
        parameter.grad = None
    torch.autograd.backward(parameters, gradients)


def over(found: dict[str, Any]) -> float:
    """Of the minima."""
    return float(found["published"]["seconds"]["min"] / found["cram"]["seconds"]["min"])


def for_memory(net: str, form: str) -> tuple[Any, Callable[[], Any]]:
    torch.manual_seed(0)
    model = SHAPES[net]()
    ids, labels = torch.randint(0, 30_000, (2, 16)), torch.tensor([0, 1])
    sgd = torch.optim.SGD(model.parameters(), fused=True, **SHORT_STEP)
    return model, stepper(
        model, CrAM(sgd, model) if form == "cram" else sgd, lambda m: m(input_ids=ids, labels=labels).loss
    )


if __name__ == "__main__":
    main()
