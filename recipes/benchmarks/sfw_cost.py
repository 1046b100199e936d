"""What a step of SFW costs beside a fused step of SGD with momentum, on the shapes of ResNet-50 and BERT-base.

Time is the processor clock of one thread, all optimizers in turns, so that a busy machine slows them alike; ratios are
of the minima and medians over rounds. Gradients are random and change a little from step to step, as momentum does in
training. "published" is the code of the paper in the same balls, where a folder with its checkout is given: in fewer
rounds, and on ResNet-50 alone, for its groups are filters of convolutions. Memory is the peak of a process of its own,
in copies of the parameters: weights, gradients and momentum are three. "gaps" are 1 - <g, v> / dual norm of the
spectral vertex, on the momentum of 40 training steps from the eighth on, all layers: 0 is the exact one.

    OMP_NUM_THREADS=1 python recipes/benchmarks/sfw_cost.py --published FOLDER --output sfw_cost.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published
import timm
import torch
from machine import facts
from shapes import SHAPES, SHORT_STEP, copied, copies_at_peak, peak_of, with_gradients
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification
from turns import beside, in_turns

from hf_compress.methods.sfw import SFW, create_sfw

ROUNDS, ROUNDS_OF_PUBLISHED = 9, 3
K_SPARSE, GROUP = "k_sparse(k=0.1, radius=init:10)", "group_k_support(k=0.1, radius=init:10)"
SPECTRAL = "spectral_k_support(k=0.1, radius=init:10)"
FORMS: dict[str, tuple[str, str, str]] = {  # region, rescale, scope
    "k_sparse": (K_SPARSE, "diameter", "tensor"),
    "k_sparse, gradient": (K_SPARSE, "gradient", "tensor"),
    "k_sparse, global": (K_SPARSE, "diameter", "global"),
    "k_sparse, global, gradient": (K_SPARSE, "gradient", "global"),
    "k_support, gradient": ("k_support(k=0.1, radius=init:10)", "gradient", "tensor"),
    "group": (GROUP, "diameter", "tensor"),
    "group, gradient": (GROUP, "gradient", "tensor"),
    "spectral": (SPECTRAL, "diameter", "tensor"),
    "spectral, gradient": (SPECTRAL, "gradient", "tensor"),
}
PUBLISHED = ("k_sparse", "k_sparse, global", "group", "spectral")


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
        "command": "OMP_NUM_THREADS=1 python recipes/benchmarks/sfw_cost.py --published FOLDER --output sfw_cost.json",
        **facts(),
        "published": published.commits(options.published) if options.published else {},
        "rounds": ROUNDS,
        "forms": FORMS,
        "nets": {name: measured(name, options.published) for name in SHAPES},
        "gaps": {"resnet18": gaps(*resnet18()), "bert-mini": gaps(*bert_mini())},
    }
    text = json.dumps(result, indent=2)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)


def optimizer(model: Any, form: str) -> torch.optim.Optimizer:
    if form == "sgd":
        return torch.optim.SGD(model.parameters(), fused=True, **SHORT_STEP)
    if form == "nothing constrained":
        return SFW([{"params": list(model.parameters()), "constraint": None}], **SHORT_STEP)
    region, rescale, scope = FORMS[form]
    return create_sfw(model, region, rescale=rescale, scope=scope, **SHORT_STEP)


def measured(net: str, folder: Path | None) -> dict[str, Any]:
    """Seconds of a step with each optimizer, their ratios to SGD, and peaks of memory."""
    torch.manual_seed(0)
    model = SHAPES[net]()
    renew = with_gradients(model)
    names = ("sgd", "nothing constrained", *FORMS)
    forms: dict[str, Callable[[], Any]] = {name: optimizer(model, name).step for name in names}
    forms["copy"] = copied(list(model.parameters()))
    found = beside(in_turns(forms, ROUNDS, before=renew), "sgd")
    if folder is not None and net == "resnet50":
        theirs = {"sgd": forms["sgd"]} | {f"published {name}": step_of(folder, model, name) for name in PUBLISHED}
        theirs["published spectral, qrpartial"] = step_of(folder, model, "spectral", "qrpartial")
        seconds = in_turns(theirs, ROUNDS_OF_PUBLISHED, warm_up=1, before=renew)
        found |= {name: numbers for name, numbers in beside(seconds, "sgd").items() if name != "sgd"}
    for name in ("sgd", "k_sparse", "k_sparse, global, gradient", "group, gradient", "spectral, gradient"):
        found[name]["peak"] = peak_of(__file__, net, name)
    return found


def step_of(folder: Path, model: Any, form: str, svd: str = "partial") -> Callable[[], None]:
    region, rescale, scope = FORMS[form]
    return published.sfw_optimizer(folder, model, region, rescale, scope, svd=svd, **SHORT_STEP).step


def for_memory(net: str, form: str) -> tuple[Any, Callable[[], Any]]:
    model = SHAPES[net]()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model, optimizer(model, form).step


def resnet18() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    torch.manual_seed(0)
    images, labels = torch.randn(64, 3, 64, 64), torch.randint(0, 10, (64,))

    def loss(model: Any) -> torch.Tensor:
        batch = torch.randint(0, 64, (16,))
        return cross_entropy(model(images[batch]), labels[batch])

    return timm.create_model("resnet18", num_classes=10), loss


def bert_mini() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    torch.manual_seed(0)
    ids, labels = torch.randint(0, 30_000, (64, 64)), torch.randint(0, 2, (64,))
    config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)

    def loss(model: Any) -> torch.Tensor:
        batch = torch.randint(0, 64, (16,))
        return model(input_ids=ids[batch], labels=labels[batch]).loss  # type: ignore[no-any-return]

    return BertForSequenceClassification(config), loss


def gaps(model: Any, loss: Callable[[Any], torch.Tensor], steps: int = 40) -> dict[str, float]:
    """How far a followed vertex is from the best one, over all followed layers and steps from the eighth on."""
    sfw = create_sfw(model, SPECTRAL, lr=0.03)
    found = []
    for step in range(steps):
        loss(model).backward()
        sfw.step()
        sfw.zero_grad()
        for group in sfw.param_groups if step >= 8 else ():
            states = [sfw.state[p] for p in group["params"]]
            if group["constraint"] is None or "basis" not in states[0]:
                continue
            momentum, count = states[0]["momentum_buffer"], group["constraint"].count(group["params"])
            exact = group["constraint"].oracle([momentum]).dual
            matrix = momentum.flatten(1)
            short = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
            value = torch.linalg.vector_norm(states[0]["basis"][:, :count].T @ short, dtype=torch.float64)
            found.append(float(1 - value / exact))
    return {"vertices": len(found), "median": statistics.median(found), "largest": max(found)}


if __name__ == "__main__":
    main()
