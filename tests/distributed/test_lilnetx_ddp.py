"""LilNetX in two real processes: those of DDP take the steps of one, FSDP2 is refused by name."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.launch import largest_difference, run

DDP = ["--method", "lilnetx", "--batch", "4", "--accumulation", "2"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), "--method", "lilnetx")[0]


def test_two_processes_equal_one(tmp_path, one):
    """With noise and drawn slices, and the family at the end."""
    two, facts = run(tmp_path, *DDP, "--family", processes=2, by_accelerate=True)
    assert [f["world"] for f in facts] == [2, 2]
    assert [f["ddp"] for f in facts] == ["DistributedDataParallel"] * 2
    assert not set(facts[0]["seen"]) & set(facts[1]["seen"])
    assert sum(name.endswith("parametrizations.weight.original") for name in one) > 8
    assert largest_difference(one, two) < 1e-6
    other_rank = torch.load(tmp_path / "weights1.pt", weights_only=True)
    assert all(torch.equal(two[name], other_rank[name]) for name in two)
    assert facts[0]["metrics"] == facts[1]["metrics"]
    assert facts[0]["variants"] == ["lilnetx", "unstructured:0.5", "2:4"]


@pytest.mark.slow
def test_noise_that_differs_between_processes_is_seen(tmp_path, one):
    """The negative control of the test above."""
    two, facts = run(tmp_path, *DDP, "--only_rank_0", processes=2)
    assert [f["world"] for f in facts] == [2, 2]
    other_rank = torch.load(tmp_path / "weights1.pt", weights_only=True)
    assert any(not torch.equal(two[name], other_rank[name]) for name in two)


def test_fsdp_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(AssertionError, match=r"FSDP deals them to the processes; launch it with DistributedDataParall"):
        run(tmp_path, "--method", "lilnetx", "--fsdp", processes=2)
    assert not list(tmp_path.glob("**/checkpoint-*"))
