"""To w + rho * g and back: on a CPU other memory stands in for the weights, elsewhere they are copied in few calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...distributed import is_sharded, local

Saved = list[tuple[torch.Tensor, torch.Tensor]]  # parameters, and their weights


def leave(
    parameters: Sequence[torch.Tensor], memory: Sequence[torch.Tensor], rho: float | torch.Tensor, saved: Saved
) -> None:
    """Make every parameter w + rho * g, g being its `.grad`, 0 where there is none.

    Args:
        parameters: which are changed in place.
        memory: for the part of each on this rank, of its shape and type.
        rho: a number, or a 0-dim tensor that nothing waits for.
        saved: takes what `come_back` needs, so that it is there whatever happens.
    """
    together: Saved = []
    for parameter, room in zip(parameters, memory, strict=True):
        if _has_own_memory(parameter):  # no copy there and none back
            saved.append((parameter, parameter.data))
            parameter.data = ascended(parameter.data, parameter.grad, rho, room)
        else:
            together.append((parameter, room))
    if together:
        torch._foreach_copy_([room for _, room in together], [local(p) for p, _ in together])
        saved += together
    climbing = [(local(p), local(p.grad)) for p, _ in together if p.grad is not None]
    if climbing:
        weights, gradients = [w for w, _ in climbing], [g for _, g in climbing]
        if isinstance(rho, torch.Tensor):
            torch._foreach_addcmul_(weights, gradients, [rho.to(w.device, w.dtype) for w in weights])
        elif rho:
            torch._foreach_add_(weights, gradients, alpha=rho)


def come_back(saved: Saved) -> None:
    """Parameters are bit for bit what they were."""
    together = [(local(p), value) for p, value in saved if not _has_own_memory(p)]
    if together:
        torch._foreach_copy_([part for part, _ in together], [value for _, value in together])
    for parameter, value in saved:
        if _has_own_memory(parameter):
            parameter.data = value


def ascended(
    weight: torch.Tensor, gradient: torch.Tensor | None, rho: float | torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """w + rho * g, written to `out`; w itself for a rho of 0, which an infinite gradient would make NaN."""
    if gradient is None:
        return out.copy_(weight)
    if isinstance(rho, torch.Tensor):
        return torch.addcmul(weight, gradient, rho.to(weight.device, weight.dtype), out=out)
    return torch.add(weight, gradient, alpha=rho, out=out) if rho else out.copy_(weight)


def _has_own_memory(parameter: torch.Tensor) -> bool:
    """Whether other memory may stand in for that of a parameter: no shards, no graph of a GPU that knows addresses."""
    return parameter.device.type == "cpu" and not is_sharded(parameter)
