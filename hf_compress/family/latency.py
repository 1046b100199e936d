"""How long a variant takes beside the dense checkpoint. Nothing is claimed to be faster than measured here."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_ROUNDS = 15
_LEAST, _BUDGET = 0.1, 2.0  # seconds for one pair of models: small ones take more rounds, large ones fewer


@torch.no_grad()
def measure_latency(model: nn.Module, dense: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Median milliseconds of a forward pass of both models, in turns, so that a busy machine slows both.

    Args:
        model: the variant.
        dense: the dense checkpoint, on the same device.
        inputs: keyword arguments of both, on that device.

    Returns:
        "milliseconds", "dense_milliseconds", "device", "threads" and "batch_size".
    """
    device = next(model.parameters()).device
    times: dict[int, list[float]] = {0: [], 1: []}
    for candidate in (model, dense):
        candidate.eval()
        candidate(**inputs)
    start, spent = time.perf_counter(), 0.0
    while spent < _LEAST or len(times[0]) < (3 if spent > _BUDGET else _ROUNDS):
        for i, candidate in enumerate((model, dense)):
            times[i].append(_seconds(candidate, inputs, device))
        spent = time.perf_counter() - start
    return {
        "milliseconds": round(1e3 * statistics.median(times[0]), 4),
        "dense_milliseconds": round(1e3 * statistics.median(times[1]), 4),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "batch_size": next(v.shape[0] for v in inputs.values() if isinstance(v, torch.Tensor)),
    }


def _seconds(model: nn.Module, inputs: Mapping[str, Any], device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    model(**inputs)
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
