"""Run by several processes: selection and CrAM on sharded weights against the same on whole ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

import hf_compress as hfc
from hf_compress.methods.cram import CrAM, optimizer
from hf_compress.targets import Target
from tests.distributed.launch import end

PATTERNS = ["unstructured:0.5", "unstructured:0.9:layer", "2:4", "int8", "2:4+int8"]


def net():
    """Rows that no number of ranks divides, and a layer whose groups lie across rows."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 13), nn.ReLU(), nn.Linear(13, 12), nn.ReLU(), Conv1D(7, 12), nn.Linear(7, 5))


def batches(steps=3, size=12):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 8, generator=generator), torch.randint(0, 5, (size,), generator=generator))
        for _ in range(steps)
    ]


def train(model, pattern, share, plus, normalize=False):
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    opt = CrAM(sgd, model, [pattern] if pattern else [], rho=0.3, plus=plus, normalize=normalize)
    for x, y in batches():
        x, y = x[share], y[share]
        cross_entropy(model(x), y).backward()
        with opt.compressed():
            cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    return {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in model.named_parameters()}


def shard(model, reshard_after_forward, keep_gathered=False):
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, reshard_after_forward=reshard_after_forward)
    fully_shard(model, reshard_after_forward=reshard_after_forward)
    if keep_gathered:
        for module in model.modules():
            if hasattr(module, "set_reshard_after_backward"):
                module.set_reshard_after_backward(False)
    return model


def largest_difference(a, b):
    return max((a[n] - b[n]).abs().max().item() for n in a)


def check_selection(mesh):
    """Masks of shards, put together, are the masks of one process: ties, empty shards, types."""
    wrong = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for i in range(int(torch.randint(1, 5, (), generator=generator))):
            rows, columns = torch.randint(0, 9, (2,), generator=generator).tolist()
            weight = torch.randn(max(rows, 1), 4 * columns, generator=generator)
            if seed % 2:
                weight = (2 * weight).round()
            weights[str(i)] = weight.bfloat16() if seed % 5 == 4 else weight
        share = torch.rand((), generator=generator).item() if seed % 7 else 0.0
        for pattern in (hfc.Unstructured(share), hfc.Unstructured(share, "layer"), hfc.NM(2, 4)):
            whole = pattern.masks(weights)
            parts = pattern.masks(
                {n: Target(distribute_tensor(w, mesh, [Shard(0)]), 1, "linear") for n, w in weights.items()}
            )
            wrong += sum(not torch.equal(parts[n].full_tensor(), whole[n]) for n in weights)
    return wrong


def main(folder):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    facts = {"world": world, "wrong_masks": check_selection(mesh), "differences": {}}
    share = slice(rank * 12 // world, (rank + 1) * 12 // world)
    for pattern in [*PATTERNS, None]:
        for plus, reshard in ((True, True), (True, False), (False, True)):
            model = shard(net(), reshard, keep_gathered=not reshard)
            facts["kinds"] = sorted({type(p).__name__ for p in model.parameters()})
            facts["rows"] = [p.to_local().shape[0] for p in model.parameters()]
            found = train(model, pattern, share, plus)
            wanted = train(net(), pattern, slice(None), plus)
            facts["differences"][f"{pattern} {plus} {reshard}"] = largest_difference(found, wanted)
    sam = largest_difference(
        train(shard(net(), True), None, share, False, True), train(net(), None, slice(None), False, True)
    )
    facts["differences"]["SAM"] = sam
    optimizer.reshard = lambda model: None  # the mistake that must show: gathered weights go stale
    stale = train(shard(net(), False, keep_gathered=True), "unstructured:0.5", share, True)
    facts["stale"] = largest_difference(stale, train(net(), "unstructured:0.5", slice(None), True))
    Path(folder, f"rank{rank}.json").write_text(json.dumps(facts))
    end()


if __name__ == "__main__":
    main(sys.argv[1])
