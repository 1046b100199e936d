"""What patterns would leave of a checkpoint: data-free, for any size of model, before anything is trained or pruned."""

from __future__ import annotations

from .measure import inspect_checkpoint
from .result import CheckpointReport, LayerNumbers, PatternNumbers
from .spectrum import Spectrum

__all__ = ["CheckpointReport", "LayerNumbers", "PatternNumbers", "Spectrum", "inspect_checkpoint"]
