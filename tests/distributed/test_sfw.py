"""SFW in two real processes takes the steps of one: sharded weights in every region, and both kinds of launch."""

from __future__ import annotations

import json

import pytest
import torch

from tests.distributed.launch import largest_difference, launch, run

pytestmark = pytest.mark.slow  # real processes: 30 seconds and more in all

FLAGS = ["--method", "sfw", "--constraint", "k_support(k=0.2, radius=init:1)"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_a_bare_loop_with_sharded_weights_equals_one_process(tmp_path, processes):
    launch("sfw_bare.py", tmp_path, processes=processes)
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(processes)]
    for facts in found:
        assert facts["world"] == processes
        assert facts["kinds"] == ["DTensor"]
        assert len(facts["differences"]) == 20
        assert max(facts["differences"].values()) < 1e-6
        assert max(facts["gaps"].values()) < 1e-4
    assert max(facts["alone"] for facts in found) > 1e-3
    assert found[0]["rows"] != found[-1]["rows"]  # uneven shards


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return run(tmp_path_factory.mktemp("single"), *FLAGS)


@pytest.mark.parametrize("kind", [[], ["--fsdp"]], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one(tmp_path, single, kind):
    flags = [*FLAGS, "--batch", "4", "--accumulation", "2", *kind]
    weights, facts = run(tmp_path, *flags, processes=2, by_accelerate=kind == "ddp")
    assert [f["world"] for f in facts] == [2, 2]
    assert not set(facts[0]["seen"]) & set(facts[1]["seen"])
    assert facts[0]["kinds"] == (["DTensor"] if kind else ["Parameter"])
    assert largest_difference(weights, single[0]) < 1e-6
    for row, wanted in zip(facts[0]["log"], single[1][0]["log"], strict=True):
        assert row["fw_gap"] == pytest.approx(wanted["fw_gap"], abs=1e-4)


def test_half_of_the_data_is_seen(tmp_path, single):
    """The negative control of the test above."""
    weights, _ = run(tmp_path, *FLAGS, "--batch", "8")
    assert largest_difference(weights, single[0]) > 1e-4


@pytest.mark.slow
def test_a_resumed_sharded_run_equals_the_uninterrupted_one(tmp_path):
    flags = [*FLAGS, "--batch", "4", "--accumulation", "2", "--fsdp"]
    weights, _ = run(tmp_path / "whole", *flags, "--save_steps", "2", processes=2)
    resumed, facts = run(tmp_path / "resumed", *flags, "--resume", tmp_path / "whole" / "checkpoint-2", processes=2)
    assert len(facts[0]["seen"]) == 4
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
