"""What a warm step of LilNetX allocates, writes and waits for: counted, so that it holds on every machine."""

from __future__ import annotations

import pytest
import torch

from hf_compress.methods.lilnetx import LilNetXConfig, entropy_models, latent_count, latent_layers, reparametrize
from hf_compress.methods.lilnetx import entropy_model as module
from hf_compress.methods.lilnetx.regularization import Regularization
from tests.methods.watch import WAITS, Watch


class State:
    """Of a Trainer."""

    def __init__(self):
        self.global_step, self.max_steps, self.num_train_epochs = 5, 10, 1


def net():
    torch.manual_seed(0)
    convolutions = [torch.nn.Conv2d(64, 64, 3, padding=1) for _ in range(4)]
    layers = [*convolutions, torch.nn.Flatten(), torch.nn.Linear(64 * 16, 256), torch.nn.Linear(256, 256)]
    model = torch.nn.Sequential(*layers)
    reparametrize(model, include=["*"])
    return model


def step(**options):
    """The term of the rate and the priors in a warm step, watched; without the optimizer of the entropy models."""
    model = net()
    args = LilNetXConfig("out", use_cpu=True, rate_weight=0.1, entropy_fit_steps=0, **options)
    terms, state = Regularization(model, args), State()
    terms.on_train_begin(args, state, None)
    terms.optimizer.step = lambda: None
    x = torch.randn(2, 64, 4, 4)
    for _ in range(2):
        model(x).square().mean().backward()
        terms.on_pre_optimizer_step(args, state, None)
    model.zero_grad()
    with Watch() as passes:
        model(x).square().mean().backward()
    with Watch() as watch:
        terms.on_pre_optimizer_step(args, state, None)
    return passes, watch, model


WRITTEN = {"rate": 104, "drawn": 136, "priors": 112}  # values for a latent, a tenth above what they are
OPTIONS = {
    "rate": {},
    "drawn": {"rate_latents": 100_000},
    "priors": {"l2_weight": 1e-3, "slice_weight": 1e-3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_larger_than_what_is_in_the_cache_is_allocated(name, monkeypatch):
    """Latents that are taken together, the values of a part of them, and a gradient for each layer."""
    monkeypatch.setattr(module, "_CHUNK", 1 << 18)  # the largest layer
    monkeypatch.setattr(module, "_CACHED", 1 << 12)
    _, watch, model = step(**OPTIONS[name])
    largest = max(4 * layer.latent.numel() for layer in latent_layers(model))
    assert largest == 4 << 18
    threads = torch.get_num_threads()
    assert watch.largest <= max(largest, threads * 22 * 4 << 12)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_latent_is_written_a_few_times(name):
    """Nearly all in the cache, where some 90 values for a latent lead to its bits and their derivatives."""
    _, watch, model = step(**OPTIONS[name])
    count = latent_count(model) if name != "drawn" else 100_000
    assert watch.written <= WRITTEN[name] * 4 * count
    assert watch.written >= 40 * 4 * count  # else nothing was watched


@pytest.mark.parametrize("name", OPTIONS)
def test_no_number_is_asked_for(name):
    """Every one of these would make the host wait for an accelerator."""
    passes, watch, _ = step(**OPTIONS[name])
    assert not WAITS & {*watch.names, *passes.names}
    assert {"sigmoid", "sigmoid_backward", "uniform_"} <= set(watch.names)
    assert "round_" in passes.names


def test_layers_of_one_distribution_are_taken_together():
    """So that small layers do not cost more calls than sigmoids."""
    _, watch, model = step()
    kinds, layers = len(entropy_models(model)), len(latent_layers(model))
    assert (kinds, layers) == (2, 6)
    assert watch.names.count("softplus") == kinds


def test_a_weight_is_decoded_with_two_temporaries():
    """The whole numbers and the rows, forward; the rows alone, backward."""
    model = net()
    (layer, *_) = latent_layers(model)
    with Watch() as watch:
        layer.module.weight.backward(torch.ones_like(layer.latent))
    large = 4 * layer.latent.numel()
    assert watch.largest == large
    assert watch.written <= 5.1 * large  # with the gradient that is given and rounding in place
