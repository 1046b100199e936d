"""How large a checkpoint is: on disk, in a download, in parameters and in multiplications."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

_BLOCK = 1 << 20


def disk_bytes(folder: Path) -> tuple[int, int]:
    """Bytes of all files in a folder, as they are and after zlib at level 6."""
    raw = compressed = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        stream = zlib.compressobj(6)
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                raw += len(block)
                compressed += len(stream.compress(block))
        compressed += len(stream.flush())
    return raw, compressed


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Entries of all parameters, and how many are not zero; tied parameters count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(int(torch.count_nonzero(p)) for p in parameters)


@torch.no_grad()
def count_macs(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Multiplications of matrix products and convolutions in one forward pass; a zero is multiplied like any other."""
    model.eval()
    # The plain form of attention: of the fused ones of a CPU the products are not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops() // 2
