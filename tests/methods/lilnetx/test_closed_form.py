"""Bits and derivatives in closed form against autograd of the plain formula, in all layouts, types and tails."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_compress.methods.lilnetx import EntropyModel, entropy_models, latent_layers, rate_bits, reparametrize
from hf_compress.methods.lilnetx import entropy_model as module
from tests.methods.lilnetx.reference import plain_bits


def spread(channels, dtype=torch.float64):
    torch.manual_seed(channels)
    model = EntropyModel(channels).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def derived(function, model, x, upstream):
    x = x.clone().requires_grad_()
    bits = function(x)
    total = bits.sum() * upstream if isinstance(upstream, float) else (bits * upstream).sum()
    return bits.detach(), torch.autograd.grad(total, [x, *model.parameters()])


@pytest.mark.parametrize("upstream", ["of a sum", "of each"])
@pytest.mark.parametrize(("slices", "row"), [(1, 1), (1, 9), (63, 8), (64, 8), (500, 9), (77, 49), (1111, 1)])
def test_values_and_gradients_are_those_of_autograd(monkeypatch, slices, row, upstream):
    monkeypatch.setattr(module, "_CACHED", 1000)  # several parts, and what is left over
    model = spread(row)
    x = 5 * torch.randn(slices, row, dtype=torch.float64)
    weight = 0.3 if upstream == "of a sum" else torch.randn(slices, row, dtype=torch.float64)
    bits, gradients = derived(model.bits, model, x, weight)
    expected, plain = derived(lambda y: plain_bits(model, y), model, x, weight)
    torch.testing.assert_close(bits, expected, rtol=1e-10, atol=1e-10)
    for own, other in zip(gradients, plain, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("mode", ["float32", "bfloat16 autocast"])
def test_single_precision_is_as_near_to_double_as_the_plain_formula(mode):
    model, x = spread(8, torch.float32), 20 * torch.randn(4000, 8)
    double = spread(8).requires_grad_()
    with torch.no_grad():
        for p, q in zip(double.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    exact, exact_gradients = derived(lambda y: plain_bits(double, y), double, x.double(), 1.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode != "float32"):
        bits, gradients = derived(model.bits, model, x, 1.0)
    plain, plain_gradients = derived(lambda y: plain_bits(model, y), model, x, 1.0)
    assert bits.dtype == torch.float32
    for own, other, true in zip((bits, *gradients), (plain, *plain_gradients), (exact, *exact_gradients), strict=True):
        error, allowed = ((each.double() - true).norm() / true.norm() for each in (own, other))
        assert error <= 2 * allowed + 1e-6


def test_outliers_keep_the_gradients_of_the_plain_formula():
    model = spread(4, torch.float32)
    x = torch.tensor([30.0, -30, 1e3, -1e3, 1e5, -1e5, 2e8, -2e8])[:, None].expand(-1, 4)
    bits, (slope, *others) = derived(model.bits, model, x, 1.0)
    expected, (plain, *plain_others) = derived(lambda y: plain_bits(model, y), model, x, 1.0)
    assert torch.isfinite(bits).all()
    torch.testing.assert_close(bits, expected, rtol=1e-3, atol=1e-3)
    is_resolved = x.abs() < 1e4  # beyond, the two ends of an interval are one number in float32
    torch.testing.assert_close(slope[is_resolved], plain[is_resolved], rtol=2e-2, atol=2e-2)
    assert (slope * x.sign() > 0)[x.abs() > 999].all()  # nearer, some are on the other side of the middle
    assert all(torch.isfinite(each).all() for each in (*others, *plain_others))


def test_flat_distributions_have_no_gradient_that_is_infinite():
    """Both ends are one number, also in the middle."""
    model = EntropyModel(2)
    with torch.no_grad():
        model.slopes.fill_(-60)
    bits, gradients = derived(model.bits, model, torch.randn(70, 2), 1.0)
    assert (bits > 60).all()
    assert all(torch.isfinite(each).all() for each in gradients)


def layers_of_all_kinds():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(6, 8, 3),
        nn.Linear(32, 16),
        Conv1D(24, 16),
        Conv1D(24, 16),
        nn.Linear(5, 4),
    ]
    model = nn.Sequential(*layers).double()
    reparametrize(model, include=["*"])
    return model


@pytest.mark.parametrize("max_latents", [None, 300])
@pytest.mark.parametrize("chunk", [72, 1000, 1 << 19])
def test_layers_that_are_taken_together_give_what_each_gives_alone(monkeypatch, chunk, max_latents):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    model = layers_of_all_kinds()
    layers, models = latent_layers(model), entropy_models(model)
    total = sum(layer.latent.numel() for layer in layers)
    rate_bits(model, generator=torch.Generator().manual_seed(7), max_latents=max_latents).backward()
    found = [layer.latent.grad for layer in layers] + [p.grad for each in models for p in each.parameters()]
    for parameter in [layer.latent for layer in layers] + [p for each in models for p in each.parameters()]:
        parameter.grad = None
    generator, bits = torch.Generator().manual_seed(7), 0.0
    for layer in layers:
        row, drawn = layer.decoded.decoder.row, layer.slices
        if max_latents is not None:
            drawn = max(1, round(max_latents / total * layer.slices))
        for start in range(0, drawn, max(1, chunk // row)):
            rows = layer.scaled[start : start + max(1, chunk // row)]
            if drawn < layer.slices:
                count = min(max(1, chunk // row), drawn - start)
                rows = layer.scaled[torch.randint(layer.slices, (count,), generator=generator)]
            noise = torch.rand(rows.shape, generator=generator, dtype=torch.float64) - 0.5
            bits = bits + plain_bits(layer.decoded.decoder.entropy[0], rows + noise).sum() * layer.slices / drawn
    bits.backward()
    expected = [layer.latent.grad for layer in layers] + [p.grad for each in models for p in each.parameters()]
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-9)


def test_a_graph_that_is_kept_gives_the_same_again_and_frozen_latents_get_nothing():
    model = layers_of_all_kinds()
    layers = latent_layers(model)
    layers[1].latent.requires_grad_(False)
    bits = rate_bits(model, generator=torch.Generator().manual_seed(0))
    bits.backward(retain_graph=True)
    first = layers[0].latent.grad.clone()
    bits.backward()
    torch.testing.assert_close(layers[0].latent.grad, 2 * first)
    assert layers[1].latent.grad is None
