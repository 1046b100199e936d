"""CrAM with patterns whose groups lie in several weights: inside the block stands what `compress` makes of them."""

from __future__ import annotations

import copy

import pytest
import torch

import hf_compress as hfc
from hf_compress.methods.cram import CrAM
from tests.conftest import tiny_resnet
from tests.structure.conftest import bert, gpt2, inputs_of, llama, make

PATTERNS = ["neurons:0.5", "heads:0.5", "neurons:0.5+int8", "low_rank:0.75", "low_rank:0.2:energy"]


def loss_of(model):
    positional, named = inputs_of(model)
    dtype = next(model.parameters()).dtype
    named = {name: value.to(dtype) if value.is_floating_point() else value for name, value in named.items()}
    return model(*positional, **named)[0].float().square().mean()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("build", [bert, gpt2, llama])
def test_inside_stands_the_compressed_ascent(build, pattern):
    model = make(build)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("key.bias"))  # a frozen bias is zeroed with its head all the same
    opt = CrAM(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), model, [pattern], rho=0.05)
    loss_of(model).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = copy.deepcopy(model)
    with torch.no_grad():
        for ahead, parameter in zip(wanted.parameters(), model.parameters(), strict=True):
            if parameter.grad is not None:
                ahead.add_(parameter.grad, alpha=0.05)
    hfc.compress(wanted, pattern)
    with opt.compressed():
        for (name, found), expected in zip(model.named_parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=name)
        loss_of(model).backward()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    opt.step()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_half_precision_is_restored_exactly(pattern):
    model = make(bert).bfloat16()
    opt = CrAM(torch.optim.SGD(model.parameters(), lr=0.1), model, [pattern], rho=0.05)
    loss_of(model).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with opt.compressed():
        assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        loss_of(model).backward()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_convolutions_are_restored_exactly():
    model = tiny_resnet()
    opt = CrAM(torch.optim.SGD(model.parameters(), lr=0.1), model, ["filters:0.5", "low_rank:0.75"], rho=0.05)
    pixels = torch.randn(2, 3, 8, 8)
    for _ in range(4):
        model(pixel_values=pixels).logits.square().mean().backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with opt.compressed():
            model(pixel_values=pixels).logits.square().mean().backward()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        opt.step()
        opt.zero_grad()
