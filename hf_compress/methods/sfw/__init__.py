"""SFW, stochastic Frank-Wolfe: training inside regions whose vertices are sparse, filter-sparse or of low rank.

Miao et al., Learning Pruning-Friendly Networks via Frank-Wolfe, ICLR 2022; Zimmer, Spiegel and Pokutta,
Compression-aware Training of Neural Networks using Frank-Wolfe, arXiv:2205.11921.

`SFW` is a torch optimizer and `create_sfw` makes one for a model; both need nothing but torch. `SFWTrainer` and
`SFWConfig` stand for transformers' `Trainer` and `TrainingArguments`; `SFWMixin` joins a Trainer of your own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .constraints import (
    Constraint,
    GroupKSupportBall,
    KSparsePolytope,
    KSupportBall,
    LpBall,
    NuclearBall,
    SpectralKSparsePolytope,
    SpectralKSupportBall,
    parse_constraint,
)
from .factory import TimmSFW, create_sfw
from .optimizer import SFW

__all__ = [
    "SFW",
    "Constraint",
    "GroupKSupportBall",
    "KSparsePolytope",
    "KSupportBall",
    "LpBall",
    "NuclearBall",
    "SFWConfig",
    "SFWMixin",
    "SFWTrainer",
    "SpectralKSparsePolytope",
    "SpectralKSupportBall",
    "TimmSFW",
    "create_sfw",
    "parse_constraint",
]

if TYPE_CHECKING:
    from .config import SFWConfig as SFWConfig
    from .trainer import SFWMixin as SFWMixin
    from .trainer import SFWTrainer as SFWTrainer

_ROOM_OF = {"SFWConfig": "config", "SFWMixin": "trainer", "SFWTrainer": "trainer"}


def __getattr__(name: str) -> Any:  # a bare PyTorch loop never loads transformers
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ROOM_OF[name]}", __name__), name)
