"""Starts the workers of this folder in real processes and reads what they leave."""

from __future__ import annotations

import functools
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tests.conftest import ROOT

HERE = Path(__file__).parent


def launch(worker, *arguments, processes=1, by_accelerate=False):
    """Run a worker in so many processes, with the CPU as device.

    Args:
        worker: name of its file.
        arguments: of its command line.
        processes: how many ranks there are; 1 has no process group.
        by_accelerate: start them as users do, with `accelerate launch --multi_gpu` (`--cpu` would start one process
            and say nothing), instead of forking a process that has imported everything.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if not by_accelerate:
        _fork(worker, list(map(str, arguments)), processes, port)
        return
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    command += ["--main_process_port", str(port), str(HERE / worker), *map(str, arguments)]
    environment = {**_environment(), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def _fork(worker, arguments, processes, port):
    with tempfile.NamedTemporaryFile("r", prefix="worker", errors="replace") as log:
        job = {"worker": str(HERE / worker), "arguments": arguments, "processes": processes, "port": port}
        server = _server()
        server.stdin.write(json.dumps({**job, "log": log.name}) + "\n")
        server.stdin.flush()
        ready, *_ = select.select([server.stdout], [], [], 300)
        assert ready, f"no end after 300 seconds\n{log.read()}"
        codes = json.loads(server.stdout.readline())
        assert codes == [0] * processes, f"exit codes {codes}\n{log.read()}"


@functools.cache
def _server():
    """One for all tests of this process; it ends when its standard input does."""
    command = [sys.executable, "-m", "tests.distributed.forks"]
    return subprocess.Popen(
        command, env=_environment(), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def end():
    """The last call of a worker: gloo's threads can abort a process that tears them down ("terminate called ...")."""
    if dist.is_initialized():
        dist.barrier()
        time.sleep(0.2)  # no process ends while the other still reads from it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(folder, *flags, processes=1, by_accelerate=False):
    """Train a tiny model; its weights, and what every rank saw."""
    arguments = ("--output_dir", folder, *flags)
    launch("train_tiny.py", *arguments, processes=processes, by_accelerate=by_accelerate)
    facts = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]
    return torch.load(folder / "weights.pt", weights_only=True), facts


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
