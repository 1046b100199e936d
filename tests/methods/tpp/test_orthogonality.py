"""Kernel orthogonality against autograd of its definition, for wide and tall weights and transposed layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_compress.methods.tpp import KernelOrthogonality

LAYERS = {
    "wide": lambda: nn.Conv2d(3, 4, 3),
    "tall": lambda: nn.Linear(3, 8),
    "transposed": lambda: Conv1D(6, 4),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_steps_and_values(kind):
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[kind]()).double()
    weight = model[0].weight
    nn.init.normal_(weight, std=0.5)
    rows = weight.T if kind == "transposed" else weight.flatten(1)
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    value = 0.1 * (gram - torch.eye(len(gram), dtype=torch.double)).square().sum()
    (exact,) = torch.autograd.grad(0.3 * value, weight)
    penalty = KernelOrthogonality(model, ["0"])
    weight.grad = torch.ones_like(weight)
    penalty.add_gradients(0.3)
    assert (weight.grad - 1 - exact).abs().max() < 1e-12
    assert penalty.values()["orthogonality"].item() == pytest.approx(value.item(), rel=1e-12)
    before = weight.detach().clone()
    penalty.decay_(0.3, rate=0.01)
    assert torch.allclose(weight, before - 0.01 * exact, rtol=0, atol=1e-14)
    weight.requires_grad_(False)
    penalty.decay_(0.3, rate=0.01)
    assert torch.allclose(weight, before - 0.01 * exact, rtol=0, atol=1e-14)


def test_rows_become_orthonormal():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4))
    penalty = KernelOrthogonality(model, ["0"], weight=1.0)
    for _ in range(300):
        penalty.decay_(1.0, rate=0.05)
    assert torch.allclose(model[0].weight @ model[0].weight.T, torch.eye(4), atol=1e-5)
