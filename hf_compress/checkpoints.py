"""Checkpoints of the Trainer: which are whole, which is the last, and copies of a model for them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)


def is_whole(checkpoint: str | Path, world_size: int) -> bool:
    """Whether the save of a checkpoint was not interrupted.

    The state is the last file that the Trainer writes; other ranks write their generators beside.
    """
    checkpoint = Path(checkpoint)
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    has_generators = not any(checkpoint.glob("rng_state*.pth")) or world_size == 1
    return has_generators or all((checkpoint / f"rng_state_{rank}.pth").is_file() for rank in range(world_size))


def last_checkpoint(folder: str | Path, world_size: int) -> str | None:
    """The last whole checkpoint in a folder, None where there is none; a later one that is not whole is named."""
    folders = [p for p in Path(folder).glob("checkpoint-*") if p.name[11:].isdigit()]
    for path in sorted(folders, key=lambda p: int(p.name[11:]), reverse=True):
        if is_whole(path, world_size):
            return str(path)
        logger.warning(f"The save of {path} was interrupted; an earlier checkpoint is resumed.")
    return None


def cpu_copy(model: Any) -> Any:
    """A copy of the model on the CPU, without what Accelerate and TRL have bound to the original."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        copied = tensor.detach().to("cpu", copy=True)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
    bound = {name: vars(model).pop(name) for name in ("forward", "_original_forward") if name in vars(model)}
    try:
        return copy.deepcopy(model, memo)
    finally:
        vars(model).update(bound)
