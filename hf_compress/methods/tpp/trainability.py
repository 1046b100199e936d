"""How well gradients pass a network: singular values of the Jacobian of its outputs by its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...calibration import in_eval_mode, like_parameters


def mean_jacobian_singular_value(model: nn.Module, inputs: Any, max_outputs: int | None = None) -> float:
    """The mean over samples of all singular values of the Jacobian; 1 would pass gradients on unchanged.

    Args:
        model: see `jacobian_singular_values`.
        inputs: one batch, see there, or an iterable of batches.
        max_outputs: see there.

    Raises:
        ValueError: without a batch.
    """
    batches = [inputs] if isinstance(inputs, (torch.Tensor, Mapping)) else inputs
    values = [jacobian_singular_values(model, batch, max_outputs).flatten() for batch in batches]
    if not values:
        raise ValueError("inputs are empty; give a batch, or an iterable of batches")
    return float(torch.cat(values).mean())


def jacobian_singular_values(model: nn.Module, inputs: Any, max_outputs: int | None = None) -> torch.Tensor:
    """Singular values of d outputs / d inputs for every sample, (samples, min(outputs, inputs)), in descending order.

    The model runs in eval mode, so that samples do not mix and no statistics change; no gradient of a parameter and no
    random number is touched. One backward pass is taken for each output.

    Args:
        model: its output is a tensor (samples, ...), or has one as `logits`.
        inputs: a floating-point tensor (samples, ...), or a mapping of keyword arguments with one as `pixel_values` or
            `inputs_embeds`.
        max_outputs: of one sample; None for any number.

    Raises:
        ValueError: for inputs without a gradient, such as token ids, or a model of more outputs.

    Source: Saxe et al., arXiv:1312.6120; Wang and Fu, arXiv:2207.12534, section 4.
    """
    keywords = dict(inputs) if isinstance(inputs, Mapping) else {}
    name = next((n for n in ("pixel_values", "inputs_embeds") if n in keywords), None)
    given = keywords[name] if name else inputs
    if not isinstance(given, torch.Tensor) or not given.is_floating_point():
        raise ValueError(
            "the Jacobian is taken by a floating-point tensor of inputs: give it alone, or as pixel_values or "
            f"inputs_embeds; got {list(keywords) or type(inputs).__name__}"
        )
    with torch.enable_grad(), in_eval_mode(model):
        at = like_parameters(model, given.detach()).requires_grad_(True)
        arguments = {k: like_parameters(model, v) for k, v in keywords.items()}
        output: Any = model(**{**arguments, name: at}) if name else model(at)
        output = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
        if output is None:
            raise ValueError(f"{type(model).__name__} gives neither a tensor nor logits")
        outputs = output.flatten(1)
        count = outputs.shape[1]
        if max_outputs is not None and count > max_outputs:
            raise ValueError(f"the Jacobian would take a backward pass for each of {count} outputs")
        jacobians = at.new_empty(len(at), count, at[0].numel())
        for i in range(count):
            (row,) = torch.autograd.grad(outputs[:, i].sum(), at, retain_graph=i + 1 < count)
            jacobians[:, i] = row.flatten(1)
    return torch.stack([torch.linalg.svdvals(jacobian.double()) for jacobian in jacobians.detach()])
