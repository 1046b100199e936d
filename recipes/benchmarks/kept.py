"""Runs of a benchmark that are kept as files: an interrupted one goes on, in several processes if wanted."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Run = dict[str, Any]

# Arguments of a training that leaves nothing behind but its weights.
QUIET: dict[str, Any] = {
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": False,
    "use_cpu": True,
}


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The flags of a script whose runs are kept."""
    flags = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--runs", type=Path, required=True, help="folder of finished runs")
    flags.add_argument("--output", type=Path, required=True)
    return flags


def kept(folder: Path, settings: Run, measure: Callable[[Run], Run], measures: bool = True) -> Run | None:
    """The result of one run: read from its file, or measured now and written to it.

    Args:
        folder: where the files are.
        settings: all that the result depends on; their hash names the file.
        measure: makes the result of the settings.
        measures: False looks without measuring.
    """
    path = file_of(folder, settings)
    if not path.is_file():
        if not measures:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps({"settings": settings, **measure(settings)}))
        aside.replace(path)
    result: Run = json.loads(path.read_text())
    return result


def file_of(folder: Path, settings: Run) -> Path:
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{name}.json"


def all_kept(folder: Path, runs: Sequence[Run], measure: Callable[[Run], Run]) -> list[Run]:
    """The results of all runs, in their order. Processes share them: none begins what another is at.

    Args:
        folder: see `kept`.
        runs: the settings of each.
        measure: see `kept`.
    """
    while True:
        for settings in runs:
            if not file_of(folder, settings).is_file():
                kept_by_one(folder, settings, measure)
        found = [result for s in runs if (result := kept(folder, s, measure, measures=False)) is not None]
        if len(found) == len(runs):
            return found
        print(f"other processes are at {len(runs) - len(found)} runs; waiting for them", flush=True)
        time.sleep(5)


def kept_by_one(folder: Path, settings: Run, measure: Callable[[Run], Run]) -> None:
    """One run, unless another process is at it."""
    folder.mkdir(parents=True, exist_ok=True)
    claim = file_of(folder, settings).with_suffix(".claim")
    with claim.open("w") as file:  # the system drops the lock of a process that dies
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if not file_of(folder, settings).is_file():
            result = kept(folder, settings, measure)
            print({k: v for k, v in (result or {}).items() if k != "settings"}, settings, flush=True)
        claim.unlink(missing_ok=True)
