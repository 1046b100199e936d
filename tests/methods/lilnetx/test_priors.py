"""Priors: closed forms of values and gradients in float64, and blocks by brute force."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_compress.methods.lilnetx import l2_prior, latent_layers, reparametrize, slice_prior, slice_sparsity


def model_of(*layers, **options):
    model = nn.Sequential(*layers).double()
    reparametrize(model, include=["*"], **options)
    return model


def test_squares_and_their_gradient():
    torch.manual_seed(0)
    model = model_of(nn.Conv2d(3, 4, 3), nn.Linear(16, 8))
    value = l2_prior(model)
    value.backward()
    expected = 0.0
    for layer in latent_layers(model):
        phi = layer.latent.detach() / layer.decoded.gain
        expected += phi.square().sum()
        torch.testing.assert_close(layer.latent.grad, 2 * phi / layer.decoded.gain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("order", ["l1", "l2", "linf"])
def test_norms_of_kernels_and_their_gradient(order):
    torch.manual_seed(0)
    model = model_of(nn.Conv2d(3, 4, 3))
    (layer,) = latent_layers(model)
    with torch.no_grad():
        layer.latent[1, 2] = 0  # an empty slice
        layer.latent[0, 0] = 0.5  # and one of ties
    value = slice_prior(model, order)
    value.backward()
    gain = layer.decoded.gain
    total, expected = 0.0, torch.zeros_like(layer.latent)
    for o in range(4):
        for i in range(3):
            phi = layer.latent[o, i].detach() / gain
            norm = {"l1": phi.abs().sum(), "l2": phi.square().sum().sqrt(), "linf": phi.abs().max()}[order]
            total += norm
            if order == "l1":
                expected[o, i] = phi.sign() / gain
            elif order == "l2" and norm > 0:
                expected[o, i] = phi / norm / gain
            elif order == "linf" and norm > 0:
                largest = phi.abs() == norm
                expected[o, i] = phi.sign() * largest / largest.sum() / gain
    torch.testing.assert_close(value, total)
    torch.testing.assert_close(layer.latent.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.Linear, lambda i, o: Conv1D(o, i)])
def test_blocks_of_linear_layers_are_squares(kind):
    torch.manual_seed(0)
    model = model_of(kind(16, 24))
    (layer,) = latent_layers(model)
    weight = layer.latent.detach() / layer.decoded.gain
    weight = weight.T if layer.decoded.is_transposed else weight
    expected = sum(weight[o : o + 8, i : i + 8].norm() for o in range(0, 24, 8) for i in range(0, 16, 8))
    torch.testing.assert_close(slice_prior(model), expected)


def test_what_has_no_structure_to_lose_has_no_prior():
    model = model_of(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1), nn.Linear(5, 3))
    assert slice_prior(model) == 0
    assert slice_sparsity(model) == 0
    one_row = model_of(nn.Linear(16, 3))  # outputs that 8 does not divide
    (layer,) = latent_layers(one_row)
    expected = (layer.latent.detach() / layer.decoded.gain).reshape(-1, 8).norm(dim=1).sum()
    torch.testing.assert_close(slice_prior(one_row), expected)


def test_sparsity_counts_what_rounds_to_nothing():
    model = model_of(nn.Conv2d(3, 4, 3), nn.Linear(16, 8))
    conv, linear = latent_layers(model)
    with torch.no_grad():
        conv.latent[:2] = 0.4 * conv.decoded.gain
        conv.latent[2:] = conv.decoded.gain
        linear.latent[:, :8] = -0.4 * linear.decoded.gain
        linear.latent[:, 8:] = linear.decoded.gain
    assert slice_sparsity(model) == pytest.approx((6 + 1) / (12 + 2))


def test_another_norm_is_refused():
    with pytest.raises(ValueError, match="order is one of l1, l2, linf, got 'l3'"):
        slice_prior(model_of(nn.Conv2d(3, 4, 3)), "l3")
