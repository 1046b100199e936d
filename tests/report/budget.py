"""Report one checkpoint in this process, and print what it cost beyond what was imported before."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import timm  # noqa: F401
import torch
import transformers  # noqa: F401

from hf_compress.report import inspect_checkpoint


def memory(field: str) -> int:
    """Bytes that lie in memory now (VmRSS) or lay there at the peak (VmHWM), mapped files included.

    The peak that getrusage gives would begin with that of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


torch.set_num_threads(1)
before, start = memory("VmRSS"), seconds()
assert memory("VmHWM") < before + (32 << 20), "importing took more at its peak, which would hide ours"
report = inspect_checkpoint(sys.argv[1], sys.argv[2:] or None)
cost = {"seconds": seconds() - start, "bytes": memory("VmHWM") - before, "layers": len(report.layers)}
print(json.dumps({**cost, "architecture": report.architecture, "patterns": list(report.patterns)}))
