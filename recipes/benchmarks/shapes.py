"""Nets whose shapes the cost benchmarks use, and what a process of its own says about memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from transformers import BertConfig, BertForSequenceClassification

SHAPES: dict[str, Callable[[], Any]] = {
    "resnet50": lambda: timm.create_model("resnet50"),
    "bert-base": lambda: BertForSequenceClassification(BertConfig()),
}
SHORT_STEP: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9}


def with_gradients(model: Any) -> Callable[[], None]:
    """Random gradients that change a little at every call, as momentum does in training."""
    parameters = list(model.parameters())
    base = [torch.randn_like(p) for p in parameters]

    def renew() -> None:
        for parameter, gradient in zip(parameters, base, strict=True):
            parameter.grad = gradient.add_(torch.randn_like(gradient), alpha=0.1)

    return renew


def copied(parameters: list[Any]) -> Callable[[], None]:
    """Reads and writes every weight once, into memory that is there already."""
    room = [torch.empty_like(p) for p in parameters]

    def copy() -> None:
        for there, parameter in zip(room, parameters, strict=True):
            there.copy_(parameter.detach())

    return copy


def peak_of(script: str, *arguments: str) -> dict[str, Any]:
    """What a process of its own prints after `--memory` and the arguments: see `copies_at_peak`."""
    command = [sys.executable, script, "--memory", *arguments]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def copies_at_peak(make: Callable[[], tuple[Any, Callable[[], Any]]], steps: int = 3) -> dict[str, float]:
    """The most memory of this process over some steps, less that before the model, in copies of its weights.

    Pages of programs and libraries, of which some are loaded at their first use, are not counted.

    Args:
        make: gives the model and what one step is.
        steps: that count.
    """
    before = _kibibytes("RssAnon")
    model, step = make()
    for _ in range(steps):
        step()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    # ru_maxrss would start from that of the process that started this one.
    peak = _kibibytes("VmHWM") - _kibibytes("RssFile")
    return {"copies": round((peak - before) * 1024 / size, 3), "parameter_bytes": size}


def _kibibytes(name: str) -> int:
    """A number of the kernel on the memory of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0])
