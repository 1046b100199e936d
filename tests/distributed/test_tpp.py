"""TPP in two real processes: those of DDP take the steps of one and remove alike, FSDP2 is refused by name."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.launch import largest_difference, run

DDP = ["--method", "tpp", "--batch", "4", "--accumulation", "2"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), "--method", "tpp")[0]


def test_two_processes_equal_one(tmp_path, one):
    """All three parts of the run, and the family of both models at the end."""
    two, facts = run(tmp_path, *DDP, "--family", processes=2, by_accelerate=True)
    assert [f["world"] for f in facts] == [2, 2]
    assert [f["ddp"] for f in facts] == ["DistributedDataParallel"] * 2
    assert not set(facts[0]["seen"]) & set(facts[1]["seen"])
    assert one["vit.layers.0.mlp.fc1.weight"].shape == (12, 16)
    assert largest_difference(one, two) < 1e-6
    other_rank = torch.load(tmp_path / "weights1.pt", weights_only=True)
    assert all(torch.equal(two[name], other_rank[name]) for name in two)
    assert facts[0]["metrics"] == facts[1]["metrics"]
    assert facts[0]["variants"] == ["neurons:0.5+heads:0.5", "unstructured:0.5", "2:4"]


@pytest.mark.slow
def test_a_penalty_on_one_process_alone_is_seen(tmp_path, one):
    """The negative control of the test above."""
    two, facts = run(tmp_path, *DDP, "--only_rank_0", processes=2)
    assert [f["world"] for f in facts] == [2, 2]
    assert largest_difference(one, two) > 1e-5


def test_fsdp_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(AssertionError, match=r"FSDP deals them to the processes; launch it with DistributedDataParall"):
        run(tmp_path, "--method", "tpp", "--fsdp", processes=2)
    assert not list(tmp_path.glob("**/checkpoint-*"))
