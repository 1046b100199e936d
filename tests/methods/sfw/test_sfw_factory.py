"""From a model to groups: what lies in a region, what does not, and timm's factory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_compress as hfc
from hf_compress.methods.sfw import LpBall, create_sfw
from tests.conftest import tiny_bert, tiny_resnet, tiny_vit


@pytest.mark.parametrize("make", [tiny_vit, tiny_bert, tiny_resnet])
def test_targets_lie_in_regions_of_their_own_and_the_rest_is_free(make):
    model = make()
    opt = create_sfw(model, "k_sparse", k=0.1, radius="init:2")
    inside = {g["param_names"][0]: g for g in opt.param_groups if g["constraint"] is not None}
    assert list(inside) == list(hfc.find_targets(model))
    assert all(len(g["params"]) == 1 for g in inside.values())
    (free,) = [g for g in opt.param_groups if g["constraint"] is None]
    assert {id(p) for g in opt.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert not {id(p) for p in free["params"]} & {id(t.parameter) for t in hfc.find_targets(model).values()}
    for group in inside.values():
        (weight,) = group["params"]
        k = max(1, int(0.1 * weight.numel()))
        # The largest norm inside is twice the norm that torch's initialisation gives.
        assert group["constraint"].size.value == pytest.approx(2 * (len(weight) / 3) ** 0.5 / k**0.5)
        assert group["constraint"].gauge([weight.detach()]) <= group["constraint"].size.value * (1 + 1e-5)


def test_one_region_for_all():
    model = tiny_vit()
    opt = create_sfw(model, "k_support(k=50, radius=3)", scope="global")
    constrained = [g for g in opt.param_groups if g["constraint"] is not None]
    assert len(constrained) == 1
    assert constrained[0]["param_names"] == list(hfc.find_targets(model))


def test_filters_of_convolutions_get_the_group_ball_and_the_classifier_an_l2_ball():
    model = tiny_resnet()
    opt = create_sfw(model, "group_k_support", k=0.5, radius="init:3")
    kinds = {name: t.kind for name, t in hfc.find_targets(model).items()}
    balls = {g["param_names"][0]: g["constraint"] for g in opt.param_groups if g["constraint"] is not None}
    assert {name: isinstance(ball, LpBall) for name, ball in balls.items()} == {
        name: kind == "linear" for name, kind in kinds.items()
    }


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("text", ["group_k_support(k=0.2, radius=init:3)", "k_sparse(k=0.1, radius=init:3)"])
def test_regions_of_gpt2_are_those_of_the_same_weights_as_linear_layers(text, scope):
    """Its Conv1D holds weights as (in, out): a step moves them as one of Linear layers moves the transposed ones."""
    torch.manual_seed(0)
    stored = nn.ModuleDict({"wide": Conv1D(24, 6), "narrow": Conv1D(6, 24)})
    plain = nn.ModuleDict({name: nn.Linear(*layer.weight.shape) for name, layer in stored.items()})
    for name, layer in plain.items():
        layer.weight.data = stored[name].weight.detach().T.clone()
    optimizers = [create_sfw(m, text, scope=scope, lr=0.1, include=["*"]) for m in (stored, plain)]
    for name, layer in plain.items():
        assert torch.equal(stored[name].weight.T, layer.weight)  # both were shrunk alike
        layer.weight.grad = torch.randn_like(layer.weight)
        stored[name].weight.grad = layer.weight.grad.T.clone()
    for optimizer in optimizers:
        optimizer.step()
    for name, layer in plain.items():
        torch.testing.assert_close(stored[name].weight.T, layer.weight)


def test_neither_the_model_nor_the_generator_is_touched_without_shrinking():
    model = tiny_resnet()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    create_sfw(model, "k_sparse", k=0.05, radius="init:1", shrink=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    create_sfw(model, "k_sparse", k=0.05, radius="init:1")
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"include": ["no.such"]}, "matches no weight"),
        ({"constraint": "k_sparse", "k": 10**6}, "keeps 1000000 entries"),
        ({"scope": "layer"}, "scope must be one of tensor, global"),
        ({"constraint": "lp"}, "lacks an argument"),
        ({"constraint": "k_sparse", "k": 1.5}, "share in"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_sfw(tiny_vit(), **arguments)


def test_frozen_weights_are_left_out():
    model = tiny_vit()
    names = list(hfc.find_targets(model))
    hfc.find_targets(model)[names[0]].parameter.requires_grad = False
    opt = create_sfw(model, "l2", radius=1)
    assert names[0] not in {n for g in opt.param_groups for n in g["param_names"]}
    for p in model.parameters():
        p.requires_grad = False
    with pytest.raises(ValueError, match="no trained weight"):
        create_sfw(model, "l2", radius=1)


def test_timm_makes_sfw_by_name():
    model = timm.create_model("resnet10t", num_classes=3)
    opt = create_optimizer_v2(model, "sfw", lr=0.1, constraint="k_support", k=0.1, radius="init:2")
    weights = [p for p in model.parameters() if p.ndim > 1]
    inside = [g["params"][0] for g in opt.param_groups if g["constraint"] is not None]
    assert {id(p) for p in inside} == {id(p) for p in weights}
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    opt.step()
    for group in opt.param_groups:
        if group["constraint"] is not None:
            weight = [p.detach() for p in group["params"]]
            assert group["constraint"].gauge(weight) <= group["constraint"].size.value * (1 + 1e-5)


@pytest.mark.parametrize("order", ["import timm.optim, hf_compress", "import hf_compress, timm.optim"])
def test_either_order_of_imports_registers_sfw(order):
    code = f"{order}\nassert 'sfw' in timm.optim.list_optimizers()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
