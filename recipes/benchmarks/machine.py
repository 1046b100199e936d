"""What a result says of the machine and the versions that made it."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any


def facts() -> dict[str, Any]:
    return {
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "versions": {p: importlib.metadata.version(p) for p in ("hf_compress", "torch", "transformers")},
    }
