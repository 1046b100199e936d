"""What a result says of the machine, the settings and the versions that made it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GLIBC_TUNABLES")  # that change how long things take


def facts() -> dict[str, Any]:
    return {
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "versions": {p: importlib.metadata.version(p) for p in ("hf_compress", "torch", "transformers")},
    }
