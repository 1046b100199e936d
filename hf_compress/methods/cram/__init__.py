"""CrAM, a compression-aware minimizer (Peste, Vladu, Kurtic, Lampert, Alistarh; ICLR 2023; arXiv:2207.14200).

`CrAM` wraps any torch optimizer and needs nothing but torch; `CrAMTrainer` and `CrAMConfig` stand for transformers'
`Trainer` and `TrainingArguments`; `CrAMMixin` joins a Trainer of your own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .optimizer import CrAM

__all__ = ["CrAM", "CrAMConfig", "CrAMMixin", "CrAMTrainer"]

if TYPE_CHECKING:
    from .config import CrAMConfig as CrAMConfig
    from .trainer import CrAMMixin as CrAMMixin
    from .trainer import CrAMTrainer as CrAMTrainer

_ROOM_OF = {"CrAMConfig": "config", "CrAMMixin": "trainer", "CrAMTrainer": "trainer"}


def __getattr__(name: str) -> Any:  # a bare PyTorch loop never loads transformers
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ROOM_OF[name]}", __name__), name)
