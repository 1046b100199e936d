"""TPP: filters that will be removed become orthogonal to the others and small, so that nobody misses them.

Wang and Fu, Trainability Preserving Neural Pruning, ICLR 2023. `TrainabilityPenalty`, `select` and
`mean_jacobian_singular_value` need nothing but torch. `TPPTrainer` and `TPPConfig` stand for transformers' `Trainer`
and `TrainingArguments`; `TPPMixin` joins a Trainer of your own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .orthogonality import KernelOrthogonality
from .penalty import SLIDES, TrainabilityPenalty
from .schedule import GrowingSchedule
from .selection import Selection, select
from .trainability import jacobian_singular_values, mean_jacobian_singular_value

__all__ = [
    "SLIDES",
    "GrowingSchedule",
    "KernelOrthogonality",
    "Selection",
    "TPPConfig",
    "TPPMixin",
    "TPPTrainer",
    "TrainabilityPenalty",
    "jacobian_singular_values",
    "mean_jacobian_singular_value",
    "select",
]

if TYPE_CHECKING:
    from .config import TPPConfig as TPPConfig
    from .trainer import TPPMixin as TPPMixin
    from .trainer import TPPTrainer as TPPTrainer

_ROOM_OF = {"TPPConfig": "config", "TPPMixin": "trainer", "TPPTrainer": "trainer"}


def __getattr__(name: str) -> Any:  # a bare PyTorch loop never loads transformers
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ROOM_OF[name]}", __name__), name)
