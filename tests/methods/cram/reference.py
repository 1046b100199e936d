"""CrAM once more, written from the formulas with functional calls, and the small nets that it is compared on."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy


def make_net(kind):
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4))
    # Batch norm makes the gradient of a bias before it rounding noise, which Adam would blow up.
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 2), nn.Flatten(), nn.Linear(4, 4)
    )


def data(steps=4):
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(12, 3, 4, 4, generator=generator), torch.randint(0, 4, (12,), generator=generator))
        for _ in range(steps)
    ]


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda params: torch.optim.Adam(params, lr=1e-2),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
}


def loss_of(net, batch):
    return cross_entropy(net(batch[0]), batch[1])


def reference_mask_24(weight):
    groups = weight.movedim(1, -1).unflatten(-1, (-1, 4))
    order = groups.abs().argsort(dim=-1, stable=True)
    return torch.ones_like(groups, dtype=torch.bool).scatter(-1, order[..., :2], False).flatten(-2).movedim(-1, 1)


def reference_int8(weight):
    """Symmetric, a scale for each output channel, half to even."""
    peak = weight.abs().flatten(1).amax(1).view(-1, *[1] * (weight.ndim - 1))
    scale = torch.where(peak > 0, peak / 127, 1.0)
    return (weight / scale).round().clamp(-127, 127) * scale


def reference_step(net, optimizer, batch, text, rho, plus, mask_gradient, normalize=False, mean=False):
    """One step from the formulas, by functional calls: weights never change on the way."""
    names = [n for n, p in net.named_parameters() if p.requires_grad]
    values = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    buffers = {n: b.clone() for n, b in net.named_buffers()}
    output = torch.func.functional_call(net, ({**values}, buffers), (batch[0],))
    first = torch.autograd.grad(cross_entropy(output, batch[1]), [values[n] for n in names])
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            buffer.copy_(buffers[name])
    perturbed = {n: v.detach().clone() for n, v in values.items()}
    if normalize:
        rho = rho / (sum(g.double().square().sum() for g in first).sqrt().item() + 1e-12)
    for name, gradient in zip(names, first, strict=True):
        perturbed[name].add_(gradient, alpha=rho)  # one rounding: a grid of 8 bits jumps at the last bit
    weights = {n: perturbed[n] for n in perturbed if n.endswith("weight") and perturbed[n].ndim > 1}
    masks = {}
    text, _, rounded = (text or "").partition("+")
    if text == "int8":
        text, rounded = "", "int8"
    if text == "2:4":
        masks = {n: reference_mask_24(w) for n, w in weights.items() if w.shape[1] % 4 == 0}
    elif text.endswith(":layer"):
        for name, weight in weights.items():
            order = weight.abs().flatten().argsort(stable=True)
            kept = torch.ones(weight.numel(), dtype=torch.bool)
            kept[order[: int(float(text.split(":")[1]) * weight.numel() + 1e-9)]] = False
            masks[name] = kept.view(weight.shape)
    elif text:
        flat = torch.cat([w.abs().flatten() for w in weights.values()])
        order = flat.argsort(stable=True)
        kept = torch.ones_like(flat, dtype=torch.bool)
        kept[order[: int(float(text.split(":")[1]) * flat.numel() + 1e-9)]] = False
        parts = kept.split([w.numel() for w in weights.values()])
        masks = {n: k.view(weights[n].shape) for n, k in zip(weights, parts, strict=True)}
    compressed = {n: torch.where(masks[n], v, 0.0) if n in masks else v for n, v in perturbed.items()}
    if rounded:
        compressed |= {n: reference_int8(compressed[n]) for n in weights}
    compressed = {n: v.detach().requires_grad_() for n, v in compressed.items()}
    output = torch.func.functional_call(net, (compressed, {n: b.clone() for n, b in net.named_buffers()}), (batch[0],))
    second = torch.autograd.grad(cross_entropy(output, batch[1]), [compressed[n] for n in names])
    for name, g1, g2 in zip(names, first, second, strict=True):
        if mask_gradient and name in masks:
            g2 = torch.where(masks[name], g2, 0.0)
        net.get_parameter(name).grad = (g1 + g2) / (2 if mean else 1) if plus else g2
    optimizer.step()
    optimizer.zero_grad()
