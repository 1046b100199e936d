"""Two real processes, with whole weights (DistributedDataParallel) and with sharded ones (FSDP2), keep zeros zero."""

from __future__ import annotations

import json
import math

import pytest
import torch

import hf_compress as hfc
from tests.conftest import tiny_vit
from tests.distributed.launch import launch

pytestmark = pytest.mark.slow  # real processes: 30 seconds and more in all

WEIGHT = "vit.layers.1.mlp.fc2.weight"
SCENARIOS = ["lock", "lock_adamw", "free", "dense", "corner", "gradual", "gradual_layer", "gradual_groups", "damaged"]


def start(folder, way, *arguments):
    """Facts of both ranks, and the folder with the weights."""
    launch("train_pruned.py", folder, *arguments, *(["--fsdp"] if way == "fsdp" else []), processes=2)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)], folder


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def trained(request, tmp_path_factory):
    facts, folder = start(tmp_path_factory.mktemp(request.param), request.param, *SCENARIOS)
    for name in SCENARIOS:
        for rank in facts:
            assert rank[name]["world"] == 2
            assert rank[name]["kinds"] == [{"ddp": "Parameter", "fsdp": "DTensor"}[request.param]]
            assert rank[name]["wrapper"].startswith({"ddp": "DistributedDataParallel", "fsdp": "FSDP"}[request.param])
            assert rank[name]["rows"][WEIGHT] == {"ddp": 16, "fsdp": 8}[request.param]
        if name != "dense":
            assert not set(facts[0][name]["seen"]) & set(facts[1][name]["seen"])
    return facts, folder


def weights_of(trained, name):
    """The same on both ranks."""
    first, second = (torch.load(trained[1] / f"{name}{rank}.pt", weights_only=True) for rank in ("", "1"))
    assert all(torch.equal(first[n], second[n]) for n in first)
    return first


def counts_of(trained, name):
    """Zeros of whole weights after every step: of both parts together where each rank has one."""
    first, second = (rank[name]["counts"] for rank in trained[0])
    if trained[0][0][name]["kinds"] == ["Parameter"]:
        assert first == second
        return first
    return [{n: a[n] + b[n] for n in a} for a, b in zip(first, second, strict=True)]


def fresh_targets(weights):
    """Targets of a model on one process that has these weights."""
    model = tiny_vit()
    model.load_state_dict(weights)
    return hfc.find_targets(model)


def zeros_at_the_start(pattern):
    model = tiny_vit()
    hfc.compress(model, pattern)
    return {n: t.parameter.detach() == 0 for n, t in hfc.find_targets(model).items()}


@pytest.mark.parametrize(("name", "pattern", "steps"), [("lock", "unstructured:0.7", 200), ("lock_adamw", "2:4", 20)])
def test_no_step_undoes_a_zero(trained, name, pattern, steps):
    before, after = zeros_at_the_start(pattern), weights_of(trained, name)
    assert all(torch.equal(after[n] == 0, before[n]) for n in before)
    for rank in trained[0]:
        assert rank[name]["error"] is None
        assert rank[name]["lost"] == [0] * (steps - 1)
    assert counts_of(trained, name) == [{n: int(mask.sum()) for n, mask in before.items()}] * steps


def test_without_the_lock_zeros_are_lost(trained):
    """The negative control of the test above."""
    before, after = zeros_at_the_start("unstructured:0.7"), weights_of(trained, "free")
    kept = sum(int(((after[n] == 0) & before[n]).sum()) for n in before)
    assert kept < 0.1 * sum(int(mask.sum()) for mask in before.values())


def test_a_single_zero_on_one_rank_is_locked(trained):
    assert [rank["corner"]["error"] for rank in trained[0]] == [None, None]
    assert [sum(c.values()) for c in counts_of(trained, "corner")] == [1] * 5
    assert weights_of(trained, "corner")[WEIGHT][0, 0] == 0


def test_lost_zeros_are_found_at_the_save_on_every_rank(trained):
    """Sharded, one rank alone has damaged its half of the weight."""
    is_sharded = trained[0][0]["damaged"]["kinds"] == ["DTensor"]
    mask = zeros_at_the_start("2:4")[WEIGHT]
    number = int(mask[8:].sum()) if is_sharded else int(mask.sum())
    for rank in trained[0]:
        assert rank["damaged"]["error"].startswith(f"RuntimeError: {number} zeros of '{WEIGHT}' are lost at step 4")
        assert rank["damaged"]["step"] == 4


def test_a_dense_model_is_refused_on_every_rank_before_the_first_step(trained):
    for rank in trained[0]:
        assert "has no zero in its 13 targets" in rank["dense"]["error"]
        assert rank["dense"]["seen"] == []


@pytest.mark.parametrize("name", ["gradual", "gradual_layer"])
def test_gradual_pruning_counts_exactly_on_the_way_and_at_the_end(trained, name):
    """20 steps: dense until 2, renewed every 4 steps and at 14."""
    weights = weights_of(trained, name)
    targets = fresh_targets(weights)
    pattern = hfc.parse_pattern("unstructured:0.8" if name == "gradual" else "unstructured:0.77:layer")
    for n, mask in pattern.masks(targets).items():
        assert torch.equal(mask, weights[n] != 0)
    sizes = {n: t.parameter.numel() for n, t in targets.items()}
    for rank in trained[0]:
        assert rank[name]["error"] is None
        assert rank[name]["lost"] == [0] * 19
    for step, counts in enumerate(counts_of(trained, name), start=1):
        last = max([r for r in (2, 6, 10, 14) if r <= step], default=2)
        share = pattern.share * (1 - (1 - (last - 2) / 12) ** 3)
        if name == "gradual":
            assert sum(counts.values()) == math.floor(round(share * sum(sizes.values()), 6))
        else:
            assert counts == {n: math.floor(round(share * size, 6)) for n, size in sizes.items()}
    assert sum(counts.values()) > 3000


def test_groups_are_exact_and_rounded_at_last(trained):
    weights = weights_of(trained, "gradual_groups")
    targets = fresh_targets(weights)
    grouped = [n for n, t in targets.items() if t.parameter.shape[1] % 4 == 0]
    assert len(grouped) == 12
    assert all((weights[n].unflatten(1, (-1, 4)) == 0).sum(2).ge(2).all() for n in grouped)
    hfc.parse_pattern("2:4+int8").project_(targets)
    assert all(torch.equal(t.parameter, weights[n]) for n, t in targets.items())
    quarter = sum(weights[n].numel() for n in grouped) // 4
    totals = [sum(counts.values()) for counts in counts_of(trained, "gradual_groups")]
    assert totals == [0] * 5 + [quarter] * 8 + [2 * quarter] * 7


@pytest.mark.slow
def test_resumed_runs_of_sharded_weights_equal_the_uninterrupted_ones(tmp_path):
    """AdamW: torch cannot load the sharded state of an optimizer that has none. 9 lies between two renewals."""
    names = ["gradual", "lock_adamw"]
    whole = start(tmp_path, "fsdp", *names, "--save_steps", "9")
    wanted = [weights_of(whole, name) for name in names]
    resumed = start(tmp_path, "fsdp", *names, "--resume_step", "9")
    for name, weights in zip(names, wanted, strict=True):
        found = weights_of(resumed, name)
        assert len(resumed[0][0][name]["counts"]) == 11
        assert all(torch.equal(found[n], weights[n]) for n in weights)
        assert sum(int((w == 0).sum()) for w in found.values()) > 1500
