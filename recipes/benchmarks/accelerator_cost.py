"""What the methods cost on an accelerator, and what 2:4 and removed filters give there; one command, a few minutes.

Forms run in turns, each after the device has done all that was given to it, on the clock of the wall.

- copy: gigabytes a second that one copy of a tensor reads and writes.
- selection: masks of all weights of ResNet-50 and BERT-base, in gigabytes of weights a second, and in copies of them.
- steps: accelerator_steps.py.
- two_four: Linear layers of BERT-base, ViT-B and ViT-L in float16, and these nets whole, as `to_sparse_semi_structured`
  of 2:4 weights beside dense.
- removed: ResNet-50 in float16 without half of its filters, eager and compiled, beside what multiplications promise.

--small takes small nets, which any machine runs, so that the script itself can be tried.

    python recipes/benchmarks/accelerator_cost.py --output recipes/benchmarks/results/accelerator_cost.json
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerator_steps
import timm
import torch
from accelerator_steps import clock_of
from machine import facts
from shapes import SHAPES, copied
from torch import nn
from torch.sparse import to_sparse_semi_structured
from transformers import BertConfig, BertModel
from turns import Seconds, beside, in_turns, ratios

import hf_compress as hfc
from hf_compress.family.footprint import count_macs

PATTERNS = ("unstructured:0.5", "unstructured:0.9", "unstructured:0.95", "unstructured:0.9:layer", "2:4", "4:8")
LAYERS = {  # columns and rows of a weight, and rows of what is multiplied with it
    "BERT-base, in": (768, 3072, 8192),
    "BERT-base, out": (3072, 768, 8192),
    "ViT-B, qkv": (768, 2304, 12608),
    "ViT-L, in": (1024, 4096, 12608),
    "ViT-L, out": (4096, 1024, 12608),
}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output", type=Path)
    flags.add_argument("--small", action="store_true", help="small nets, two rounds")
    flags.add_argument("--device", default=str(torch.accelerator.current_accelerator() or "cpu"))
    options = flags.parse_args()
    device, rounds = torch.device(options.device), 2 if options.small else 7
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    result = {"what": __doc__, "command": "python " + " ".join(sys.argv), **facts(), "device": name, "rounds": rounds}
    parts: dict[str, Callable[[], Any]] = {
        "copy": lambda: copy_speed(device, rounds, 1 << (20 if options.small else 28)),
        "selection": lambda: selections(device, rounds, options.small),
        "steps": lambda: {n: accelerator_steps.measured(net, device, rounds) for n, net in nets.items()},
        "two_four": lambda: two_four(device, rounds, options.small),
        "removed": lambda: removed(device, rounds, options.small),
    }
    nets = accelerator_steps.nets(options.small)
    for part, make in parts.items():
        result[part] = make()
        print(part, json.dumps(result[part], indent=1) if part != "steps" else "is done", flush=True)
        if options.output:  # what is finished is kept, whatever comes
            options.output.write_text(json.dumps(result, indent=2) + "\n")


def copy_speed(device: torch.device, rounds: int, entries: int) -> float:
    """Gigabytes a second, read and written."""
    source = torch.randn(entries, device=device)
    room = torch.empty_like(source)
    seconds = in_turns({"copy": lambda: room.copy_(source)}, rounds, clock=clock_of(device))["copy"]
    return round(8 * entries / min(seconds) / 1e9, 1)


@torch.no_grad()
def selections(device: torch.device, rounds: int, is_small: bool) -> dict[str, Any]:
    found = {}
    for name, make in SHAPES.items() if not is_small else [("resnet20", lambda: timm.create_model("resnet20_cifar"))]:
        torch.manual_seed(0)
        targets = hfc.find_targets(make().to(device))
        targets = {name: t for name, t in targets.items() if t.parameter.shape[t.reduction_dim] % 8 == 0}
        weights = [t.parameter for t in targets.values()]
        forms: dict[str, Callable[[], Any]] = {"copy": copied(weights)}
        for pattern in PATTERNS:
            forms[pattern] = functools.partial(hfc.parse_pattern(pattern).select, targets)
        size = sum(4 * w.numel() for w in weights)
        numbers = beside(in_turns(forms, rounds, repeats=dict.fromkeys(forms, 3), clock=clock_of(device)), "copy")
        for own in numbers.values():
            own["gigabytes_a_second"] = round(size / own["seconds"]["min"] / 1e9, 1)
        found[name] = numbers
    return found


@torch.no_grad()
def two_four(device: torch.device, rounds: int, is_small: bool) -> dict[str, Any]:
    """How much faster, or what torch says where it cannot."""
    found: dict[str, Any] = {}
    for name, (columns, rows, batch) in LAYERS.items():
        columns, rows, batch = (128, 128, 64) if is_small else (columns, rows, batch)
        layer = nn.Linear(columns, rows, device=device, dtype=torch.float16).requires_grad_(False)
        x = torch.randn(batch, columns, device=device, dtype=torch.float16)
        found[name] = sparse_beside_dense(layer, {"input": x}, rounds)
    small = {"depth": 1, "embed_dim": 64, "num_heads": 1} if is_small else {}
    bert = BertConfig(num_hidden_layers=1) if is_small else BertConfig()
    ids = torch.randint(1, 30_000, (1, 8) if is_small else (64, 128), device=device)
    images = torch.randn(1 if is_small else 64, 3, 224, 224, device=device, dtype=torch.float16)
    vit = timm.create_model("vit_base_patch16_224", **small)
    for name, model, inputs in (("BERT-base", BertModel(bert), {"input_ids": ids}), ("ViT-B", vit, {"x": images})):
        found[name] = sparse_beside_dense(model.to(device, torch.float16).eval(), inputs, rounds)
    return found


def sparse_beside_dense(dense: Any, inputs: dict[str, torch.Tensor], rounds: int) -> dict[str, Any]:
    sparse = copy.deepcopy(dense)
    holder = sparse if not isinstance(sparse, nn.Linear) else nn.Sequential(sparse)
    hfc.compress(holder, "2:4", exclude=[])
    try:
        for layer in [m for m in holder.modules() if isinstance(m, nn.Linear) and is_cut(m.weight)]:
            layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight), requires_grad=False)
        sparse(**inputs)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return {"cannot": str(error)[:300]}
    forms = {"dense": lambda: dense(**inputs), "sparse": lambda: sparse(**inputs)}
    return speed_up(in_turns(forms, rounds, clock=clock_of(next(iter(inputs.values())).device)), "dense", "sparse")


def is_cut(weight: torch.Tensor) -> bool:
    return 2 * int(weight.count_nonzero()) <= weight.numel()


@torch.no_grad()
def removed(device: torch.device, rounds: int, is_small: bool) -> dict[str, Any]:
    """Inductor compiles where the nets are of full size."""
    name, size, batch = ("resnet20_cifar", 32, 2) if is_small else ("resnet50", 224, 64)
    half = torch.float32 if device.type == "cpu" else torch.float16
    dense = timm.create_model(name).eval()
    smaller = copy.deepcopy(dense)
    hfc.compress(smaller, "filters:0.5", remove=True)
    x = {"x": torch.randn(1, 3, size, size)}
    promised = count_macs(dense, x) / count_macs(smaller, x)
    nets = {"dense": dense, "smaller": smaller}
    for net in nets.values():
        net.to(device, half, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size, device=device, dtype=half).to(memory_format=torch.channels_last)
    found: dict[str, Any] = {"promised": round(promised, 3)}
    backend = "aot_eager" if is_small else "inductor"
    for way in ("eager", "compiled"):
        run = {n: m if way == "eager" else torch.compile(m, backend=backend) for n, m in nets.items()}
        forms = {n: lambda m=m: m(images) for n, m in run.items()}
        found[way] = speed_up(in_turns(forms, rounds, warm_up=3, clock=clock_of(device)), "dense", "smaller")
        found[way]["kept"] = round(found[way]["speed_up"] / promised, 3)
    return found


def speed_up(seconds: Seconds, before: str, after: str) -> dict[str, Any]:
    found = {f"{name}_milliseconds": round(1e3 * statistics.median(s), 3) for name, s in seconds.items()}
    return {**found, "speed_up": round(statistics.median(ratios(seconds, before, after)), 3)}


if __name__ == "__main__":
    main()
