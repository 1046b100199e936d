"""Bits of latents: the published distribution function in float64, its tails, and what random slices estimate."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_compress.methods.lilnetx import (
    EntropyModel,
    entropy_models,
    fit_entropy_models,
    latent_count,
    latent_layers,
    rate_bits,
    reparametrize,
)
from hf_compress.methods.lilnetx import entropy_model as module
from tests.conftest import tiny_resnet


def spread_model(channels=3, seed=0):
    """A model whose parameters are far from where it starts."""
    model = EntropyModel(channels).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def published_cdf(model, x):
    """Written from the paper's description, one channel and one number at a time."""
    rows = []
    for row in x.tolist():
        values = []
        for channel, value in enumerate(row):
            for i in range(3):
                slope = math.log1p(math.exp(model.slopes[i, channel].item()))
                value = value * slope + model.offsets[i, channel].item()
                value = value + math.tanh(value) * math.tanh(model.bends[i, channel].item())
            slope = math.log1p(math.exp(model.slopes[3, channel].item()))
            values.append(1 / (1 + math.exp(-(value * slope + model.offsets[3, channel].item()))))
        rows.append(values)
    return torch.tensor(rows, dtype=torch.float64)


@given(st.integers(0, 10**6))
def test_bits_are_those_of_the_published_distribution(seed):
    model = spread_model(seed=seed)
    x = 4 * torch.rand(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 2
    p = published_cdf(model, x + 0.5) - published_cdf(model, x - 0.5)
    is_clear = p > 1e-6  # where the reference does not cancel
    torch.testing.assert_close(model.bits(x)[is_clear], -torch.log2(p)[is_clear], rtol=1e-8, atol=1e-8)


def test_probabilities_of_whole_numbers_sum_to_one():
    x = torch.arange(-20000, 20001, dtype=torch.float64)[:, None].expand(-1, 3)
    total = torch.exp2(-spread_model(seed=3).bits(x)).sum(0)
    torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=0)


def test_gradients_are_those_of_autograd_checks():
    model = spread_model(seed=1)
    x = torch.linspace(-6, 6, 12, dtype=torch.float64).reshape(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(model.bits, (x,), atol=1e-8)
    parameters = tuple(model.parameters())

    def of_parameters(*values):
        names = [name for name, _ in model.named_parameters()]
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x.detach(),))

    model.forward = model.bits
    assert torch.autograd.gradcheck(of_parameters, parameters, atol=1e-8)


def test_an_outlier_is_pulled_back():
    model = EntropyModel(1)
    x = torch.tensor([[-3e3], [3e3]], requires_grad=True)
    bits = model.bits(x)
    bits.sum().backward()
    assert torch.isfinite(bits).all()
    assert (bits > 100).all()
    assert x.grad[0] < -0.1
    assert x.grad[1] > 0.1
    published = -torch.log2(torch.sigmoid(model.logits(x + 0.5)) - torch.sigmoid(model.logits(x - 0.5)) + 1e-10)
    gradient = torch.autograd.grad(published.sum(), x)[0]
    assert (gradient == 0).all()  # which is why ours differs


def test_a_new_model_has_the_published_spread():
    generator = torch.Generator().manual_seed(0)
    p = torch.exp2(-EntropyModel(9, generator).bits(torch.arange(-200.0, 201)[:, None].expand(-1, 9)))
    x = torch.arange(-200.0, 201)[:, None]
    assert p[200].mean().item() == pytest.approx(0.056, abs=0.003)
    assert (p * x.square()).sum(0).sqrt().mean().item() == pytest.approx(7.9, abs=0.4)


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(32, 16), nn.Linear(5, 4))
    reparametrize(model, include=["*"])
    return model


def test_rate_is_the_sum_over_all_latents():
    model = small()
    models = entropy_models(model)
    assert [len(m.offsets[0]) for m in models] == [9, 8, 1]
    assert latent_count(model) == 216 + 512 + 20
    expected = sum(
        entropy.bits(layer.scaled.round()).sum() for layer, entropy in zip(latent_layers(model), models, strict=True)
    )
    torch.testing.assert_close(rate_bits(model, is_noisy=False), expected)
    assert not any(p is q for m in models for p in m.parameters() for q in model.parameters())


def test_noise_comes_from_the_generator_and_is_uniform(monkeypatch):
    model = small()
    first = rate_bits(model, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, rate_bits(model, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(first, rate_bits(model, generator=torch.Generator().manual_seed(4)))
    seen = []
    entropy = entropy_models(model)[1]
    monkeypatch.setattr(entropy, "bits", lambda x: (seen.append(x.detach()), x.sum())[1])
    rate_bits(model, generator=torch.Generator().manual_seed(0))
    noise = torch.cat(seen) - latent_layers(model)[1].scaled.detach()
    assert noise.min() >= -0.5
    assert noise.max() < 0.5
    assert noise.std().item() == pytest.approx(1 / math.sqrt(12), rel=0.1)


def test_random_slices_estimate_the_whole_without_bias():
    model = small()
    whole = rate_bits(model, is_noisy=False).item()
    draws = torch.tensor(
        [
            rate_bits(model, generator=torch.Generator().manual_seed(i), max_latents=100, is_noisy=False).item()
            for i in range(400)
        ]
    )
    error = draws.std() / math.sqrt(len(draws))
    assert draws.std() > 0
    assert abs(draws.mean().item() - whole) < 4 * error


def test_memory_is_bounded_by_the_chunk_and_the_sum_does_not_depend_on_it(monkeypatch):
    model = small()
    whole = rate_bits(model, is_noisy=False)
    sizes = []
    for entropy in entropy_models(model):
        bits = entropy.bits
        monkeypatch.setattr(entropy, "bits", lambda x, bits=bits: (sizes.append(x.numel()), bits(x))[1])
    monkeypatch.setattr(module, "_CHUNK", 72)
    torch.testing.assert_close(rate_bits(model, is_noisy=False), whole)
    assert max(sizes) <= 72
    assert len(sizes) > 8


def test_gradients_of_the_rate_reach_latents_in_their_units():
    model = small().double()
    (layer, *_) = latent_layers(model)
    generator = torch.Generator().manual_seed(7)
    rate_bits(model, generator=generator).backward()
    noise = torch.rand(24, 9, generator=torch.Generator().manual_seed(7), dtype=torch.float64) - 0.5
    x = (layer.scaled.detach() + noise).requires_grad_()
    entropy_models(model)[0].bits(x).sum().backward()
    torch.testing.assert_close(layer.latent.grad.reshape(-1, 9), x.grad / layer.decoded.gain, rtol=1e-10, atol=1e-12)


def test_fitted_models_are_near_the_entropy():
    model = tiny_resnet()
    reparametrize(model)
    latents = [layer.latent.detach().clone() for layer in latent_layers(model)]
    before = rate_bits(model, is_noisy=False) / latent_count(model)
    fit_entropy_models(model, steps=200)
    after = rate_bits(model, is_noisy=False) / latent_count(model)
    assert before > 3.9
    assert 2.0 < after < 3.9
    for layer, old in zip(latent_layers(model), latents, strict=True):
        assert torch.equal(layer.latent, old)
        assert layer.latent.requires_grad
        assert layer.latent.grad is None


def test_a_model_without_latents_is_refused():
    with pytest.raises(ValueError, match=r"has no latents; call reparametrize\(model\) first"):
        rate_bits(nn.Linear(2, 2))
