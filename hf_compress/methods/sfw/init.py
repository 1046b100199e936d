"""SFW-Init: scale each constrained weight so that the first step of SFW lowers the loss most.

Every weight is alpha times what it was, with one alpha learned for each: direction and shape stay. Source: Miao et al.,
Learning Pruning-Friendly Networks via Frank-Wolfe, ICLR 2022, and its published code, whose loop this follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from ...distributed import mean_over_ranks
from .optimizer import SFW

Loss = Callable[[nn.Module, Any], torch.Tensor]
_SMALLEST = 0.01  # of alpha


def sfw_init(
    model: nn.Module, optimizer: SFW, batches: Iterator[Any], loss: Loss, steps: int = 390, lr: float = 1e-3
) -> dict[str, float]:
    """Learn one scale for each constrained weight, and scale the weights by it in place.

    In each iteration three batches b0, b1, b2 are drawn. The gradient on b0 and b1 gives one step of SFW (gradient
    rescaling, no momentum); the loss after it, on b0 and b2, is lowered by a step of Adam on the scales. Batch norms
    use the statistics of the batch and keep none, dropout is off. With several processes their slopes are averaged, so
    that all end with the same scales.

    Args:
        model: plain, not wrapped.
        optimizer: which weights lie in which region, and the learning rate of the step; it takes none here.
        batches: mappings of tensors with the samples along their first dimension, or tuples of tensors; three for each
            iteration.
        loss: of a model that is called like `model`, and a batch.
        steps: iterations; 390 as published.
        lr: of Adam.

    Returns:
        Name of each weight to its scale.

    Raises:
        ValueError: if batches end too early, or the loss is not finite.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [g for g in optimizer.param_groups if g["constraint"] is not None]
    weights = {names[id(p)]: p for g in groups for p in g["params"] if p.detach().any()}
    start = {name: p.detach().clone() for name, p in weights.items()}
    scales = torch.ones(len(weights), dtype=torch.float64)
    moments = torch.zeros(2, len(weights), dtype=torch.float64)
    with _measuring(model), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        for step in range(1, steps + 1):
            try:
                b0, b1, b2 = next(batches), next(batches), next(batches)
            except StopIteration as error:
                raise ValueError(f"SFW-Init needs {3 * steps} batches, they ended in iteration {step}") from error
            slopes = _slopes(model, groups, weights, loss, (b0, b1), (b0, b2), names)
            slopes = (slopes / scales).clamp(-1, 1)
            if not slopes.isfinite().all():
                raise ValueError(f"the loss of SFW-Init is not finite in iteration {step}; lower the learning rate")
            moments[0].lerp_(slopes, 0.1)
            moments[1].lerp_(slopes.square(), 0.001)
            update = (moments[0] / (1 - 0.9**step)) / ((moments[1] / (1 - 0.999**step)).sqrt() + 1e-8)
            scales = (scales - lr * update).clamp(min=_SMALLEST)
            with torch.no_grad():
                for scale, (name, weight) in zip(scales.tolist(), weights.items(), strict=True):
                    torch.mul(start[name], scale, out=weight.data)
    return dict(zip(weights, scales.tolist(), strict=True))


def _slopes(
    model: nn.Module,
    groups: list[dict[str, Any]],
    weights: Mapping[str, torch.Tensor],
    loss: Loss,
    before: tuple[Any, Any],
    after: tuple[Any, Any],
    names: Mapping[int, str],
) -> torch.Tensor:
    """<d, w> of every weight, d the slope of the loss after one step of SFW, divided by the learning rate."""
    parameters = list(weights.values())
    now = _loss_on(loss, model, before)  # weights that it does not depend on have gradients of zero
    gradients = torch.autograd.grad(now, parameters, create_graph=True, materialize_grads=True)
    gradient_of = dict(zip(map(id, parameters), gradients, strict=True))
    moved: dict[str, torch.Tensor] = {}
    for group in groups:
        inside = group["params"]
        along = [gradient_of.get(id(p), torch.zeros_like(p)) for p in inside]  # a weight of zeros stays where it is
        oracle = group["constraint"].oracle([g.detach() for g in along])
        if not oracle.is_valid:  # without gradient, as behind a norm that starts at zero, a weight stays where it is
            continue
        vertices = [oracle.vertex(i) for i in range(len(inside))]
        length = torch.stack([(p - v).square().sum() for p, v in zip(inside, vertices, strict=True)]).sum().sqrt()
        size = torch.stack([g.square().sum() for g in along]).sum().sqrt()
        share = (group["lr"] * size / length).clamp(0, 1)
        moved |= {names[id(p)]: torch.lerp(p, v, share) for p, v in zip(inside, vertices, strict=True)}
    lr = groups[0]["lr"]
    ahead = _loss_on(loss, _Moved(model, moved), after) / lr
    slopes = torch.autograd.grad(ahead, parameters, materialize_grads=True)
    products = [(d * p.detach()).sum().double() for d, p in zip(slopes, parameters, strict=True)]
    return mean_over_ranks(torch.stack(products).detach()).cpu()


def _loss_on(loss: Loss, model: nn.Module, batches: tuple[Any, Any]) -> torch.Tensor:
    """Of two batches as one; where they are padded to different lengths, of each, weighted by their samples."""
    first, second = ({**b} if isinstance(b, Mapping) else dict(enumerate(b)) for b in batches)
    tensors = [(first[k], second[k]) for k in first if isinstance(first[k], torch.Tensor)]
    if all(a.shape[1:] == b.shape[1:] for a, b in tensors):
        return loss(model, _joined(*batches))
    sizes = [len(tensor) for tensor in tensors[0]]
    values = [loss(model, batch) * (size / sum(sizes)) for batch, size in zip(batches, sizes, strict=True)]
    return torch.stack(values).sum()


class _Moved(nn.Module):
    """The model with other weights; calls and attributes are its own."""

    def __init__(self, model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.__dict__["_model"], self.__dict__["_weights"] = model, weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._model, dict(self._weights), args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode, with batch norms that use the statistics of the batch and keep none."""
    modes = {module: module.training for module in model.modules()}
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    model.eval()
    for norm in norms:
        norm.train()
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for module, training in modes.items():
            module.training = training


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, Mapping):
        return {k: _cat(first[k], second[k]) for k in first}
    return tuple(_cat(a, b) for a, b in zip(first, second, strict=True))


def _cat(first: Any, second: Any) -> Any:
    return torch.cat([first, second]) if isinstance(first, torch.Tensor) else first
