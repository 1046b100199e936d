"""Work on tensors piece by piece, so that a piece stays in the cache of a CPU, and sums of squares of such pieces."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ....distributed import local
from ....selection import CHUNK

_BLOCK = 1024


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64 if it is so, in float32 otherwise."""
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()


def numbers_on(device: torch.device, values: Sequence[float]) -> torch.Tensor:
    """Numbers as a float64 tensor on a device, which is not waited for."""
    return torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)


def chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Pieces that fit the cache of a CPU; the whole tensor elsewhere, at least one piece."""
    size = CHUNK if tensor.device.type == "cpu" else max(tensor.numel(), 1)
    yield from tensor.detach().reshape(-1).split(size)


def pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The part of a tensor on this rank, in float32 or float64, in chunks."""
    return (wide(chunk) for chunk in chunks(local(tensor)))


def rows(part: torch.Tensor, beside: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
    """Pieces of whole rows that fit the cache of a CPU; the whole tensor elsewhere.

    Args:
        part: which is split; with one row beside several, it is given for each piece of those.
        beside: by whose size it is split, its own by default.
    """
    of = part if beside is None else beside
    size = max(1, CHUNK * of.shape[0] // max(of.numel(), 1)) if of.device.type == "cpu" else max(1, of.shape[0])
    if part.shape[0] != of.shape[0]:
        return itertools.repeat(part, max(1, math.ceil(of.shape[0] / size)))
    return iter(part.split(size))


def summed(values: Iterator[torch.Tensor]) -> torch.Tensor:
    """The sum of at least one value."""
    total = next(values)
    for value in values:
        total = total + value
    return total


def square_sum(*parts: torch.Tensor) -> torch.Tensor:
    """The sum of squares of all parts, a 0-dim float64 tensor; see `square_sums`."""
    return square_sums(iter(parts))


def square_sums(parts: Iterator[torch.Tensor]) -> torch.Tensor:
    """The sum of squares of at least one part, in float32 or float64.

    Returns:
        A 0-dim float64 tensor with a relative error below 1e-6, whatever the scale.
    """
    numbers, tensors = 0.0, []
    with np.errstate(all="ignore"):
        for part in parts:
            number = _square_sum_of_blocks(part)
            # No square that counts was too small or too large for float32.
            if 1e-20 < number < 1e30:
                numbers += number
            else:
                tensors.append(torch.linalg.vector_norm(part, dtype=torch.float64).square())
    return summed(iter(tensors)) + numbers if tensors else torch.tensor(numbers, dtype=torch.float64)


def _square_sum_of_blocks(part: torch.Tensor) -> float:
    """In float32, block by block; 0 where it would make an accelerator wait, or cut a float64 short."""
    if part.device.type != "cpu" or part.dtype != torch.float32:
        return 0.0
    flat: np.ndarray = part.reshape(-1).numpy()
    # One dot product of all may add one entry after the other, and lose six digits of a million on some CPUs.
    blocks = flat[: flat.size // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
    total = float(np.vecdot(blocks, blocks).sum(dtype=np.float64))
    rest = flat[blocks.size :]
    return total + float(np.dot(rest, rest)) if rest.size else total


def squared_norm(tensor: torch.Tensor) -> torch.Tensor:
    """`square_sum` of the part of a tensor on this rank."""
    part = local(tensor).detach()
    return square_sum(part) if part.dtype in (torch.float32, torch.float64) else square_sums(pieces(tensor))
