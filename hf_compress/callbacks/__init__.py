"""Callbacks that keep pruned weights pruned in any Trainer, and a merge of LoRA adapters that does.

`SparsityLock` holds the zeros that a model has, `GradualPruning` makes them little by little and holds them.
"""

from __future__ import annotations

from .gradual import GradualPruning
from .lock import SparsityLock
from .lora import merge_lora

__all__ = ["GradualPruning", "SparsityLock", "merge_lora"]
