"""Sharded weights (FSDP2, gloo) take the steps of whole ones: rows that no number of ranks divides, both settings."""

from __future__ import annotations

import json

import pytest
import torch

from tests.distributed.launch import largest_difference, launch, run


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_a_bare_loop_equals_one_process(tmp_path, processes):
    """Every pattern, CrAM+ and plain, weights gathered again for the backward pass or kept; and SAM."""
    launch("fsdp_bare.py", tmp_path, processes=processes)
    for rank in range(processes):
        facts = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert facts["world"] == processes
        assert facts["kinds"] == ["DTensor"]
        assert facts["wrong_masks"] == 0
        assert len(facts["differences"]) == 19
        assert max(facts["differences"].values()) < 1e-6
        assert facts["stale"] > 1e-3  # the negative control: gathered copies that are not forgotten
    rows = [json.loads((tmp_path / f"rank{rank}.json").read_text())["rows"] for rank in range(processes)]
    assert rows[0] != rows[-1]  # uneven shards


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return run(tmp_path_factory.mktemp("single"), "--family")


def test_the_trainer_equals_one_process(tmp_path, single):
    """4 samples a batch, 2 batches a window, 2 processes: the 16 samples of the single process."""
    flags = ["--batch", "4", "--accumulation", "2", "--fsdp"]
    weights, facts = run(tmp_path, *flags, "--family", "--save_steps", "2", processes=2, by_accelerate=True)
    assert [f["world"] for f in facts] == [2, 2]
    assert [f["kinds"] for f in facts] == [["DTensor"]] * 2
    assert not set(facts[0]["seen"]) & set(facts[1]["seen"])
    assert largest_difference(weights, single[0]) < 1e-6
    assert facts[0]["metrics"] == facts[1]["metrics"]
    for ours, wanted in zip(facts[0]["metrics"], single[1][0]["metrics"], strict=True):
        assert ours["accuracy"] == pytest.approx(wanted["accuracy"])


@pytest.mark.slow
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    """AdamW: torch cannot load the sharded state of an optimizer that has none, as SGD without momentum."""
    flags = ["--batch", "4", "--accumulation", "2", "--fsdp", "--optim", "adamw_torch"]
    weights, _ = run(tmp_path / "whole", *flags, "--save_steps", "2", processes=2)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed, facts = run(tmp_path / "resumed", *flags, "--resume", checkpoint, processes=2)
    assert len(facts[0]["seen"]) == 4
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_replaying_only_the_last_micro_batch_is_seen(tmp_path, single):
    """The negative control of the test above."""
    weights, facts = run(tmp_path, "--batch", "4", "--accumulation", "2", "--fsdp", "--only_last", processes=2)
    assert [f["kinds"] for f in facts] == [["DTensor"]] * 2
    assert largest_difference(weights, single[0]) > 1e-5
