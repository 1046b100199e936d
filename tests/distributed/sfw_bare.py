"""Run by several processes: SFW on sharded weights against the same on whole ones, every region."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

import hf_compress as hfc
from hf_compress.distributed import gathered
from tests.distributed.fsdp_bare import batches, largest_difference, net, shard
from tests.distributed.launch import end

REGIONS = [
    "l1(radius=2)",
    "l2(radius=2)",
    "lp(p=3, radius=1)",
    "linf(radius=0.3)",
    "k_sparse(k=0.1, radius=0.5)",
    "k_support(k=0.1, radius=2)",
    "group_k_support(k=0.3, radius=2)",
    "nuclear(radius=2)",
    "spectral_k_sparse(k=2, radius=1)",
    "spectral_k_support(k=2, radius=2)",
]


def train(model, region, share, scope="tensor", seed_of_data=0):
    opt = hfc.create_sfw(model, region, lr=0.2, scope=scope)
    opt.tracks_gap = True
    gaps = []
    for x, y in batches(4)[seed_of_data:]:
        cross_entropy(model(x[share]), y[share]).backward()
        opt.step()
        opt.zero_grad()
        gaps.append(float(opt.gap))
    return {n: gathered(p).detach().clone() for n, p in model.named_parameters()}, gaps


def main(folder):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    facts = {"world": world, "differences": {}, "gaps": {}}
    share = slice(rank * 12 // world, (rank + 1) * 12 // world)
    for region in REGIONS:
        for scope in ("tensor", "global"):
            model = shard(net(), True)
            facts["kinds"] = sorted({type(p).__name__ for p in model.parameters()})
            facts["rows"] = [p.to_local().shape[0] for p in model.parameters()]
            found, gaps = train(model, region, share, scope)
            wanted, wanted_gaps = train(net(), region, slice(None), scope)
            facts["differences"][f"{region} {scope}"] = largest_difference(found, wanted)
            facts["gaps"][f"{region} {scope}"] = max(abs(a - b) for a, b in zip(gaps, wanted_gaps, strict=True))
    # The mistake that must show: every rank takes its own part for the whole.
    other, _ = train(net(), REGIONS[4], share)
    facts["alone"] = largest_difference(other, train(net(), REGIONS[4], slice(None))[0])
    Path(folder, f"rank{rank}.json").write_text(json.dumps(facts))
    end()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
