"""Starts the workers of this folder in real processes and reads what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.conftest import ROOT

HERE = Path(__file__).parent


def launch(worker, *arguments, processes=1):
    """`accelerate launch --multi_gpu` with the CPU as device: `--cpu` would start one process and say nothing."""
    command = [sys.executable, str(HERE / worker)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if processes > 1:
        port = str(20_000 + os.getpid() % 20_000)
        accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes"]
        command = [*accelerate, str(processes), "--main_process_port", port, str(HERE / worker)]
        environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run(folder, *flags, processes=1):
    """Train a tiny model; its weights, and what every rank saw."""
    launch("train_tiny.py", "--output_dir", folder, *flags, processes=processes)
    facts = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]
    return torch.load(folder / "weights.pt", weights_only=True), facts


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
