"""Groups and ranks of weights whose rows are dealt to processes: those of one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import hf_compress as hfc
from hf_compress.targets import Groups, Target
from tests.distributed.launch import end

WORLD = 2


def weights(seed):
    """Rows that no number of ranks divides, and fewer rows than ranks."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        weight = torch.randn(shape, generator=generator)
        return (2 * weight).round() if seed % 2 else weight

    pair, heads = {"neurons": (Groups("p", 0, 11),)}, {"heads": (Groups("h", 0, 4, 3),)}
    none = {"neurons": "none", "heads": "none"}
    return {
        "first": Target(draw(11, 5), 1, "linear", draw(11), groups={**none, **pair}),
        "second": Target(draw(7, 11), 1, "linear", groups={**none, "neurons": (Groups("p", 1, 11),)}),
        "qkv": Target(draw(24, 7), 1, "linear", draw(24), groups={**none, **heads}),
        "out": Target(draw(7, 8), 1, "linear", groups={**none, "heads": (Groups("h", 1, 4),)}),
        "conv1d": Target(draw(6, 11), 0, "conv1d", groups=none),
        "conv": Target(draw(1, 3, 3), 1, "conv", draw(1), groups=none),
        "grouped": Target(draw(14, 3, 4), 1, "conv", conv_groups=2, groups=none),
    }


def deal(target, mesh):
    bias = None if target.bias is None else distribute_tensor(target.bias, mesh, [Shard(0)])
    facts = (target.conv_groups, target.groups)
    return Target(
        distribute_tensor(target.parameter, mesh, [Shard(0)]), target.reduction_dim, target.kind, bias, *facts
    )


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    mesh, wrong = init_device_mesh("cpu", (WORLD,)), []
    for seed in range(4):
        for text in (
            "filters:0.5",
            "neurons:0.4",
            "neurons:0.4:l1",
            "heads:0.5",
            "low_rank:0.75",
            "low_rank:0.4:energy",
        ):
            pattern = hfc.parse_pattern(text)
            whole, parts = weights(seed), {name: deal(t, mesh) for name, t in weights(seed).items()}
            if "low" not in text:
                masks, expected = pattern.masks(parts), pattern.masks(whole)
                wrong += [(text, n) for n in masks if not torch.equal(masks[n].full_tensor(), expected[n])]
            pattern.project_(whole)
            pattern.project_(parts)
            for name, target in whole.items():
                for a, b in ((target.parameter, parts[name].parameter), (target.bias, parts[name].bias)):
                    if a is not None and not torch.equal(b.full_tensor(), a):
                        wrong.append((text, name))
    torch.save(wrong, f"{folder}/{rank}.pt")
    end()


def test_shards_together_are_the_whole(tmp_path):
    multiprocessing.spawn(work, (str(tmp_path),), WORLD)
    assert [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)] == [[]] * WORLD
