"""Two real processes (gloo, DistributedDataParallel) take the steps of one."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.launch import largest_difference, run


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return run(tmp_path_factory.mktemp("single"), "--family")


def test_two_processes_equal_one(tmp_path, single):
    """4 samples a batch, 2 batches a window, 2 processes: the 16 samples of the single process."""
    weights, facts = run(tmp_path, "--batch", "4", "--accumulation", "2", "--family", processes=2, by_accelerate=True)
    assert [f["world"] for f in facts] == [2, 2]
    assert [f["ddp"] for f in facts] == ["DistributedDataParallel"] * 2
    assert not set(facts[0]["seen"]) & set(facts[1]["seen"])
    assert len(facts[0]["seen"]) == len(facts[1]["seen"]) == 8
    assert largest_difference(weights, single[0]) < 1e-6
    other_rank = torch.load(tmp_path / "weights1.pt", weights_only=True)
    assert all(torch.equal(weights[name], other_rank[name]) for name in weights)
    for row, wanted in zip(facts[0]["log"], single[1][0]["log"], strict=True):
        assert row["compressed_loss"] == pytest.approx(wanted["compressed_loss"], abs=1e-4)
        assert row["loss"] == pytest.approx(wanted["loss"], abs=1e-4)
    # One process writes the family, both measure it, and the numbers are those of one process.
    assert facts[0]["metrics"] == facts[1]["metrics"]
    for ours, wanted in zip(facts[0]["metrics"], single[1][0]["metrics"], strict=True):
        assert ours["accuracy"] == pytest.approx(wanted["accuracy"])


def test_replaying_only_the_last_micro_batch_is_seen(tmp_path, single):
    """The negative control of the test above."""
    weights, facts = run(tmp_path, "--batch", "4", "--accumulation", "2", "--only_last", processes=2)
    assert [f["world"] for f in facts] == [2, 2]
    assert largest_difference(weights, single[0]) > 1e-5


def test_gradients_that_are_views_of_buckets(tmp_path, single):
    weights, facts = run(tmp_path, "--batch", "4", "--accumulation", "2", "--bucket_view", processes=2)
    assert facts[0]["bucket_view"] is True
    assert largest_difference(weights, single[0]) < 1e-6


@pytest.mark.slow
def test_a_head_that_ignores_the_number_of_items(tmp_path):
    """The stock loop multiplies the loss of this head by the processes and by the accumulation steps."""
    one, _ = run(tmp_path / "one", "--model", "bert")
    flags = ["--model", "bert", "--batch", "4", "--accumulation", "2"]
    two, facts = run(tmp_path / "two", *flags, processes=2)
    stock, _ = run(tmp_path / "stock", *flags, "--no_check", processes=2)
    assert [f["world"] for f in facts] == [2, 2]
    assert largest_difference(one, two) < 1e-6
    assert largest_difference(one, stock) > 1e-3
