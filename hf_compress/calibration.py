"""Batch-norm statistics after compression: pruned weights give other activations than the ones recorded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, dataloader: Iterable[Any], num_samples: int = 1000) -> int:
    """Replace the running statistics of every batch norm by averages over training data, as CrAM does after pruning.

    Each sample counts the same, no weight changes, and only the batch norms see training mode: dropout stays off.

    Args:
        model: on its device; nothing happens where it has no batch norm with running statistics.
        dataloader: batches of training data: a mapping of keyword arguments of the model, a tuple or list whose first
            entry is the input, or the input itself.
        num_samples: how many samples to use at most; the last batch is cut to fit, and left out if one sample is left,
            which has no variance.

    Returns:
        The number of samples used, 0 without batch norm.

    Raises:
        ValueError: if there is batch norm and no data. The statistics are then what they were.

    Source: batch-norm tuning of CrAM (Peste et al., ICLR 2023); a plain average stands for its moving one.
    """
    norms = [m for _, m in _norms_with_statistics(model)]
    if not norms:
        return 0
    was_training = {m: m.training for m in model.modules()}
    momenta = [n.momentum for n in norms]
    buffers = [{k: b.clone() for k, b in n.named_buffers(recurse=False)} for n in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    try:
        used = _forward_samples(model, norms, dataloader, num_samples)
    except BaseException:
        for norm, saved in zip(norms, buffers, strict=True):
            for name, value in saved.items():
                norm.get_buffer(name).copy_(value)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in was_training.items():
            module.training = training
    return used


def batch_norm_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """The running means and variances of every batch norm, by name: the buffers themselves, no copies."""
    return {
        f"{prefix}.{name}" if prefix else name: norm.get_buffer(name)
        for prefix, norm in _norms_with_statistics(model)
        for name in ("running_mean", "running_var")
    }


def _norms_with_statistics(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@torch.no_grad()
def fold_batch_norm_(model: nn.Module) -> int:
    """Fold the running statistics of every batch norm into its scale and shift; in eval mode it does what it did.

    Mean 0 and variance 1 are left, which are small in a coded file and need no more digits than 16 bits have. A
    training goes on from them as from statistics that are wrong by so much: fold last.

    Args:
        model: any module. Batch norms without statistics, or without a scale, stay what they are.

    Returns:
        How many were folded.
    """
    count = 0
    for norm in model.modules():
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
            continue
        if not norm.affine:
            continue
        mean, variance, eps = norm.running_mean.double(), norm.running_var.double(), norm.eps
        slope = norm.weight.double() / (variance + eps).sqrt()
        norm.bias.copy_(norm.bias.double() - mean * slope)
        norm.weight.copy_(slope * math.sqrt(1 + eps))
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
        count += 1
    return count


def _forward_samples(model: nn.Module, norms: list[_BatchNorm], dataloader: Iterable[Any], num_samples: int) -> int:
    used = 0
    for batch in dataloader:
        if used >= num_samples:
            break
        inputs = _first(batch, num_samples - used, model)
        size = _batch_size(inputs)
        if used and size == 1:
            continue
        for norm in norms:
            norm.momentum = size / (used + size)  # makes the moving average the average over all samples so far
        if isinstance(inputs, dict):
            model(**inputs)
        else:
            model(inputs)
        used += size
    if not used:
        raise ValueError("no calibration data: the data loader gave no batch; pass some training data")
    return used


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module is in eval mode inside, and in its own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def like_parameters(model: nn.Module, value: Any) -> Any:
    """A tensor on the device of the model, in its floating-point type if it is floating point; all else unchanged."""
    if not isinstance(value, torch.Tensor):
        return value
    parameter = next(model.parameters())
    return value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)


def _first(batch: Any, count: int, model: nn.Module) -> Any:
    if isinstance(batch, Mapping):
        cut = {k: v[:count] if isinstance(v, torch.Tensor) and v.ndim else v for k, v in batch.items()}
        return {k: like_parameters(model, v) for k, v in cut.items()}
    if isinstance(batch, (tuple, list)):
        batch = batch[0]
    return like_parameters(model, batch[:count])


def _batch_size(inputs: Any) -> int:
    if isinstance(inputs, dict):
        return next(v.shape[0] for v in inputs.values() if isinstance(v, torch.Tensor) and v.ndim)
    return inputs.shape[0]
