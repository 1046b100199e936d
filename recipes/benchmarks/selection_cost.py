"""What exact selection and N:M masks cost, in copies of the weights, on the shapes of ResNet-50 and BERT-base.

A copy reads and writes every weight once, into memory that is there already. All forms run in turns on the processor
clock of one thread. "topk" takes a sorted topk of all magnitudes, laid into one tensor at once, as the published
optimizers do in their better cases; "sort" orders them all, and "argsort" is the published way to N:M masks. Before
they are timed, masks are compared with those of a stable sort.

    OMP_NUM_THREADS=1 python recipes/benchmarks/selection_cost.py --output selection_cost.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from machine import facts
from transformers import BertConfig, BertModel
from turns import beside, in_turns

import hf_compress as hfc
from hf_compress.selection import keep_largest

ROUNDS = 9
NETS: dict[str, Callable[[], Any]] = {
    "resnet50": lambda: timm.create_model("resnet50"),
    "resnet50, channels_last": lambda: timm.create_model("resnet50").to(memory_format=torch.channels_last),
    "bert-base": lambda: BertModel(BertConfig()),
}
SHARES = (0.5, 0.9, 0.95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    nets = {}
    for name, make in NETS.items():
        torch.manual_seed(0)
        nets[name] = measured(make())
        print(name, {form: round(numbers["ratio_of_minima"], 2) for form, numbers in nets[name].items()}, flush=True)
    command = "OMP_NUM_THREADS=1 python " + " ".join(sys.argv)
    result = {"what": __doc__, "command": command, **facts(), "rounds": ROUNDS, "nets": nets}
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


@torch.no_grad()
def measured(model: Any) -> dict[str, Any]:
    """Ratios to a copy of the targets of a model."""
    targets = {name: t for name, t in hfc.find_targets(model).items() if t.parameter.shape[t.reduction_dim] % 8 == 0}
    weights = [t.parameter.detach() for t in targets.values()]
    room, size = [w.clone() for w in weights], sum(w.numel() for w in weights)

    def copied() -> None:
        for there, weight in zip(room, weights, strict=True):
            there.copy_(weight)

    forms: dict[str, Callable[[], Any]] = {"copy": copied}
    for share in SHARES:
        forms[f"global {share}"] = lambda k=int(share * size): keep_largest(weights, k)
    forms["each layer 0.9"] = lambda: [keep_largest([w], int(0.9 * w.numel())) for w in weights]
    forms["2:4"] = lambda: hfc.NM(2, 4).select(targets)
    forms["4:8"] = lambda: hfc.NM(4, 8).select(targets)
    for share in SHARES:
        forms[f"topk, global {share}"] = lambda k=int((1 - share) * size): by_topk(weights, k)
    forms["topk, each layer 0.9"] = lambda: [by_topk([w], int(0.1 * w.numel())) for w in weights]
    forms["sort, global 0.9"] = lambda: by_sort(weights, int(0.9 * size))
    forms["argsort, 2:4"] = lambda: [by_argsort(t.parameter, t.reduction_dim, 2, 4) for t in targets.values()]
    check(forms, targets)
    slow = {name: form for name, form in forms.items() if "sort" in name or "topk" in name}
    fast = {name: form for name, form in forms.items() if name not in slow}
    slowly = beside(in_turns({"copy": copied, **slow}, 3, warm_up=1), "copy")
    return beside(in_turns(fast, ROUNDS), "copy") | {name: slowly[name] for name in slow}


def by_topk(weights: list[torch.Tensor], kept: int) -> list[torch.Tensor]:
    """As the published optimizers do it: the sorted largest magnitudes, of which the last one is the threshold."""
    threshold = torch.cat([w.abs().flatten() for w in weights]).topk(kept).values[-1]
    return [(w.abs() >= threshold).float() for w in weights]


def by_sort(weights: list[torch.Tensor], pruned: int) -> list[torch.Tensor]:
    """Masks from the order of all magnitudes, equal ones by position."""
    order = torch.cat([w.abs().flatten() for w in weights]).argsort(stable=True)
    mask = torch.ones(len(order), dtype=torch.bool)
    mask[order[:pruned]] = False
    return [part.view(w.shape) for part, w in zip(mask.split([w.numel() for w in weights]), weights, strict=True)]


def by_argsort(weight: torch.Tensor, dim: int, n: int, m: int) -> torch.Tensor:
    groups = weight.abs().movedim(dim, -1).unflatten(-1, (-1, m))
    mask = torch.ones(groups.shape, dtype=torch.bool)
    mask.scatter_(-1, groups.argsort(dim=-1, stable=True)[..., : m - n], False)
    return mask.flatten(-2).movedim(-1, dim)


def check(forms: dict[str, Callable[[], Any]], targets: Any) -> None:
    """RuntimeError where a fast mask is not that of a stable sort."""
    pairs = [(forms["global 0.9"](), forms["sort, global 0.9"]())]
    pairs.append((list(forms["2:4"]().values()), forms["argsort, 2:4"]()))
    for found, wanted in pairs:
        if not all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)):
            raise RuntimeError("a mask is not that of a stable sort")


if __name__ == "__main__":
    main()
