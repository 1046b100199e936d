"""Both ways to the perturbed weights and back: by other memory, and by copies, as shards and accelerators take it."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_compress.methods.cram import CrAM, excursion

OPTIONS = {
    "plain": {"rho": 0.1},
    "normalized": {"rho": 0.1, "normalize": True},
    "without the first gradient": {"rho": 0.1, "plus": False},
    "no ascent": {"rho": 0.0},
}


def trained(model, batches, **options):
    cram = CrAM(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, ["unstructured:0.5", "2:4"], **options
    )
    for x in batches:
        model(x).square().mean().backward()
        with cram.compressed():
            model(x).square().mean().backward()
        cram.step()
        cram.zero_grad()
    return [p.detach() for p in model.parameters()]


def net():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(4, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(32, 8)]
    model = torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    return model


@pytest.mark.parametrize("name", OPTIONS)
def test_both_ways_give_the_same_bits(name, monkeypatch):
    model, batches = net(), torch.randn(4, 8, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    other = copy.deepcopy(model)
    by_memory = trained(model, batches, **OPTIONS[name])
    monkeypatch.setattr(excursion, "_has_own_memory", lambda parameter: False)
    by_copies = trained(other, batches, **OPTIONS[name])
    assert all(torch.equal(a, b) for a, b in zip(by_memory, by_copies, strict=True))


@pytest.mark.parametrize("has_own_memory", [True, False])
def test_an_exception_brings_the_weights_back(has_own_memory, monkeypatch):
    monkeypatch.setattr(excursion, "_has_own_memory", lambda parameter: has_own_memory)
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    places = [p.data_ptr() for p in model.parameters()]
    cram = CrAM(torch.optim.SGD(model.parameters(), lr=0.1), model, ["unstructured:0.5"], rho=0.5)
    model(torch.randn(2, 4, 4, 4)).square().mean().backward()
    with pytest.raises(KeyError, match="inside"), cram.compressed():
        fail_inside(model, before, places, has_own_memory)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert [p.data_ptr() for p in model.parameters()] == places


@pytest.mark.parametrize("has_own_memory", [True, False])
def test_without_ascent_an_infinite_gradient_stays_out_of_the_weights(has_own_memory, monkeypatch):
    monkeypatch.setattr(excursion, "_has_own_memory", lambda parameter: has_own_memory)
    model = net()
    cram = CrAM(torch.optim.SGD(model.parameters(), lr=0.1), model, ["unstructured:0.5"], rho=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    with cram.compressed():
        assert all(p.isfinite().all() for p in model.parameters())


def fail_inside(model, before, places, has_own_memory):
    weights = list(model.parameters())
    assert not all(torch.equal(p, b) for p, b in zip(weights, before, strict=True))
    assert any(p.data_ptr() != place for p, place in zip(weights, places, strict=True)) == has_own_memory
    raise KeyError("inside")
