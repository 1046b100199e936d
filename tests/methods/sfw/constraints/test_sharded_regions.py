"""Three processes (gloo) with rows dealt as FSDP2 deals them give what one process gives."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hf_compress.methods.sfw.constraints import parse_constraint
from tests.distributed.launch import end

SHAPES = [(7, 4, 3, 3), (24, 7), (9,), (2, 5), (14, 4)]  # rows that no number of ranks divides, and fewer than ranks
REGIONS = {
    "l1(radius=1.5)": [0, 1],
    "lp(p=3, radius=1.5)": [0, 1],
    "linf(radius=1.5)": [0, 1],
    "k_sparse(k=0.2, radius=1.5)": [0, 1, 2, 3],
    "k_support(k=0.2, radius=1.5)": [0, 1, 2],
    "group_k_support(k=3, radius=1.5)": [0, 1, 2, 3],
    "group_k_support(k=3, axes=1, radius=1.5)": [1, 3],
    "group_k_support(k=2, axes=0 1, groups=7, radius=1.5)": [0, 1],
    "group_k_support(k=2, axes=0 1, groups=7, blocks=2 1, radius=1.5)": [4, 1],
    "group_k_support(k=1, axes=1 0, groups=2, blocks=2 3, radius=1.5)": [4, 1],
    "group_k_support(k=3, axes=0, blocks=2 3, radius=1.5)": [4, 2],
    "nuclear(radius=1.5)": [0, 1, 2],
    "spectral_k_sparse(k=0.3, radius=1.5)": [0, 1],
    "spectral_k_support(k=0.3, radius=1.5)": [0],
    "spectral_k_support(k=2, radius=1.5)": [1, 2, 3],
}


def tensors(seed, which):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPES[i], generator=generator) for i in which]


def answers(region, directions, weights, memory):
    """Everything that a region says, with whole tensors."""
    whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in region.lmo(directions)]
    oracle = region.oracle(directions, memory)
    numbers = [oracle.dual, oracle.squared_distance(weights), oracle.inner(weights), region.gauge(weights)]
    for i, weight in enumerate(weights):
        oracle.move_(weight, i, torch.tensor(0.25))
    numbers.append(region.shrink_(weights))
    moved = [w.full_tensor() if isinstance(w, DTensor) else w for w in weights]
    return whole + moved + [number.float() for number in numbers]


def worker(rank, processes, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    for text, which in REGIONS.items():
        for plain in {None, 0} if len(which) > 1 else {None}:  # the first one whole on every rank
            compare(parse_constraint(text), which, mesh, plain)
    # The negative control: rows of one rank alone have another vertex.
    region, g = parse_constraint("l2(radius=1.5)"), distribute_tensor(tensors(0, [0])[0], mesh, [Shard(0)])
    assert not torch.allclose(region.lmo([g.to_local()])[0], region.lmo([g])[0].to_local())
    end()


def compare(region, which, mesh, plain):
    def dealt(whole):
        parts = [distribute_tensor(t.clone(), mesh, [Shard(0)]) for t in whole]
        return [whole[0].clone(), *parts[1:]] if plain == 0 else parts

    memory = [{} for _ in which]
    for step in range(2):
        directions, weights = tensors(step, which), tensors(step + 10, which)
        found = answers(region, dealt(directions), dealt(weights), memory)
        vertices = region.lmo(dealt(directions))
        assert [isinstance(v, DTensor) for v in vertices] == [i != plain for i in range(len(which))]
        for a, b in zip(found, answers(region, directions, weights, None), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), region


def test_sharded_tensors_give_what_whole_ones_give(tmp_path):
    mp.spawn(worker, (3, str(tmp_path)), nprocs=3)
