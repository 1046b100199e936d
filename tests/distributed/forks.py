"""Starts workers of this folder by forking a process that has imported everything: seconds less for each of them.

One line of JSON on standard input is one launch, with what `torchrun` puts into the environment of its ranks; the
answer is the exit status of each rank. A rank that fails ends the others.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys

import transformers

import hf_compress as hfc
import tests.conftest

LOADED = (hfc.CrAMTrainer, hfc.SFWTrainer, hfc.TPPTrainer, hfc.LilNetXTrainer, transformers.Trainer, tests.conftest)


def start(job: dict, rank: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if job["processes"] > 1:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["processes"]}
            ranks |= {"LOCAL_WORLD_SIZE": job["processes"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job["port"]}
            os.environ |= {name: str(value) for name, value in ranks.items()} | {"ACCELERATE_USE_CPU": "true"}
        sys.argv = [job["worker"], *job["arguments"]]
        runpy.run_path(job["worker"], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


for line in sys.stdin:
    job = json.loads(line)
    running = {start(job, rank): rank for rank in range(job["processes"])}
    codes = {}
    while running:
        child, status = os.wait()
        rank = running.pop(child)
        codes[rank] = os.waitstatus_to_exitcode(status)
        if codes[rank]:
            for other in running:
                os.kill(other, signal.SIGKILL)
    print(json.dumps([codes[rank] for rank in sorted(codes)]), flush=True)
