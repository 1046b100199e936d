"""Two real processes (gloo, DistributedDataParallel) take the steps of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

WORKER = Path(__file__).with_name("train_tiny.py")


def run(folder, *flags, processes=1):
    """`accelerate launch --multi_gpu` with the CPU as device: `--cpu` would start one process and say nothing."""
    launch = [sys.executable, str(WORKER)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if processes > 1:
        port = str(20_000 + os.getpid() % 20_000)
        accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes"]
        launch = [*accelerate, str(processes), "--main_process_port", port, str(WORKER)]
        environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(
        [*launch, "--output_dir", str(folder), *flags], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]
    return torch.load(folder / "weights.pt", weights_only=True), facts


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return run(tmp_path_factory.mktemp("single"), "--family")


def test_two_processes_equal_one(tmp_path, single):
    """4 samples a batch, 2 batches a window, 2 processes: the 16 samples of the single process."""
    weights, facts = run(tmp_path, "--batch", "4", "--accumulation", "2", "--family", processes=2)
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
