"""Compressed evaluations and teachers in two real processes (gloo): DDP and FSDP2, both methods."""

from __future__ import annotations

import json

import pytest
import torch

from tests.conftest import tiny_vit
from tests.distributed.launch import largest_difference, launch


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    model = tiny_vit(hidden_size=32)
    with torch.no_grad():
        model.classifier.weight.mul_(30)
    folder = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(folder)
    return folder


def run(folder, names, *flags, processes=1):
    launch("train_scored.py", folder, *names, *flags, processes=processes)
    facts = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]
    weights = {name: torch.load(folder / f"{name}0.pt", weights_only=True) for name in names}
    return facts, weights


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cram", "sfw"])
@pytest.mark.parametrize("sharding", [[], ["--fsdp"]], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one(tmp_path, teacher, method, sharding):
    """4 samples a batch, 2 batches a window, 2 processes: the 16 samples of the single process."""
    names = ["plain", "scored", "taught", "failing"]
    if not sharding:  # Accelerate cannot shard a model without input embeddings
        names.append("resnet")
    common = ["--method", method, "--teacher", teacher]
    (alone,), wanted = run(tmp_path / "one", names, *common)
    flags = [*common, "--batch", "4", "--accumulation", "2", *sharding]
    facts, weights = run(tmp_path / "two", names, *flags, processes=2)
    for name in names:
        if sharding:
            assert [f[name]["kinds"] for f in facts] == [["DTensor"]] * 2
        else:
            assert [f[name]["wrapper"] for f in facts] == ["DistributedDataParallel"] * 2
        assert largest_difference(weights[name], wanted[name]) < 2e-6
    assert largest_difference(weights["taught"], weights["plain"]) > 1e-4
    for name, tensor in weights["plain"].items():
        assert torch.equal(weights["scored"][name], tensor)
    for rank in facts:
        assert (rank["failing"]["error"], rank["failing"]["same"]) == ("no such metric", True)
        assert rank["taught"]["teacher"] == alone["taught"]["teacher"]
        assert rank["taught"]["losses"] == pytest.approx(alone["taught"]["losses"], abs=1e-4)
        for name in {"scored", "resnet"} & {*names}:
            assert len(rank[name]["scores"]) == {"scored": 2, "resnet": 1}[name]
            for ours, theirs in zip(rank[name]["scores"], alone[name]["scores"], strict=True):
                losses = {k: v for k, v in ours.items() if k.endswith("_loss") and (name != "resnet" or "-" in k)}
                assert len(set(losses.values())) == {"scored": 7, "resnet": 2}[name]
                assert losses == pytest.approx({key: theirs[key] for key in losses}, abs=1e-5)
