"""Balls of neurons and heads: what is in them, that all their weights choose the same groups, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hf_compress as hfc
from hf_compress.methods.sfw import SFW, GroupKSupportBall, LpBall, create_sfw
from hf_compress.structure import find_coupled_targets
from tests.conftest import tiny_resnet
from tests.structure.conftest import (
    bert,
    gpt2,
    inputs_of,
    llama,
    make,
    mlp,
    modernbert,
    phi3,
    run,
    timm_glu,
    timm_vit,
    vit,
)

MODELS = [bert, vit, gpt2, llama, timm_vit]
FUSED = [modernbert, timm_glu]
KINDS = ["neurons", "heads"]
in_models = pytest.mark.parametrize("build", [*MODELS, *FUSED], ids=lambda b: b.__name__)
in_kinds = pytest.mark.parametrize("kind", KINDS)


def train(model, steps=3, **options):
    """Towards random outputs; the gradients of the last step stay."""
    opt = create_sfw(model, "group_k_support", **{"k": 0.25, "radius": "weights:1", **options})
    args, kwargs = inputs_of(model)
    for _ in range(steps):
        opt.zero_grad()
        out = model(*args, **kwargs)
        out = out if isinstance(out, torch.Tensor) else out[0]
        target = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        (out - target).square().mean().backward()
        opt.step()
    return opt


def balls(opt):
    return [g for g in opt.param_groups if isinstance(g["constraint"], GroupKSupportBall)]


def parts_of(model, kind):
    return {n: t.groups[kind][0] for n, t in find_coupled_targets(model).items() if isinstance(t.groups[kind], tuple)}


def nonzero_groups(weight, part):
    lines = weight.movedim(part.dim, 0).flatten(1).any(1)
    return lines.view(part.blocks, part.count, -1).any(2).any(0)


@in_models
@in_kinds
def test_all_weights_of_a_vertex_have_the_same_groups(build, kind):
    model = make(build)
    share = 0.25 if kind == "neurons" else 0.5
    opt, parts = train(model, group_by=kind, k=share), parts_of(model, kind)
    differs = False
    for group in balls(opt):
        region, names = group["constraint"], group["param_names"]
        gradients = [p.grad for p in group["params"]]
        k = int(share * parts[names[0]].count)
        vertex = region.lmo(gradients)
        found = [nonzero_groups(v, parts[n]) for n, v in zip(names, vertex, strict=True)]
        assert found[0].sum() == k
        assert all(torch.equal(found[0], other) for other in found)
        assert region.gauge([p.detach() for p in group["params"]]) <= region.size.value * (1 + 1e-5)
        for name, gradient in zip(names, gradients, strict=True):
            part = parts[name]
            alone = GroupKSupportBall(k, 1.0, axes=part.dim, groups=part.count, blocks=part.blocks)
            differs |= not torch.equal(nonzero_groups(alone.lmo([gradient])[0], part), found[0])
    assert differs  # alone, they would choose others


@in_models
@in_kinds
def test_a_ball_holds_all_weights_that_share_groups(build, kind):
    model = make(build)
    opt = create_sfw(model, "group_k_support", k=1, group_by=kind)
    targets, parts = find_coupled_targets(model), parts_of(model, kind)
    for group in balls(opt):
        of = parts[group["param_names"][0]].of
        assert group["param_names"] == [n for n, part in parts.items() if part.of == of]
    others = {g["param_names"][0]: g for g in opt.param_groups if isinstance(g["constraint"], LpBall)}
    assert others.keys() == targets.keys() - parts.keys()
    for name, group in others.items():
        outputs = targets[name].parameter.shape[targets[name].output_dim]
        # The largest norm inside is 15 times the norm that torch's initialisation gives.
        assert group["constraint"].size.value == pytest.approx(15 * (outputs / 3) ** 0.5)
    assert {id(p) for g in opt.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("build", MODELS, ids=lambda b: b.__name__)
@in_kinds
def test_at_a_vertex_nothing_is_lost_when_its_zeros_are_cut(build, kind):
    """A whole step to a vertex leaves half of the groups zero, so that nothing changes without them."""
    changes = []
    for group_by in (kind, "filters"):
        model = make(build)
        train(model, 1, group_by=group_by, k=0.5, radius="weights:4", lr=1.0, momentum=0.0, rescale="none")
        before = run(model)
        hfc.compress(model, f"{kind}:0.5")
        changes.append((run(model) - before).abs().max().item())
    assert changes[0] < 1e-6
    assert changes[1] > 1e-3


def test_a_weight_with_two_parts_lies_in_the_ball_of_the_first():
    model = mlp()
    opt = create_sfw(model, "group_k_support", k=0.5, group_by="neurons", include=["*"])
    first, second = balls(opt)
    assert first["param_names"] == ["0.weight", "3.weight"]
    assert (first["constraint"].axes, first["constraint"].groups) == ((0, 1), 12)
    assert second["param_names"] == ["5.weight"]
    assert (second["constraint"].axes, second["constraint"].groups) == (1, 10)


def test_excluded_and_frozen_weights():
    model = vit()
    model.layers[0].mlp.fc1.weight.requires_grad = False
    opt = create_sfw(model, "group_k_support", k=0.5, group_by="neurons", exclude=["layers.1.mlp.fc1.weight"])
    (ball,) = balls(opt)
    assert ball["param_names"] == ["layers.0.mlp.fc2.weight"]  # what is trained of the neurons
    lone = [g["param_names"][0] for g in opt.param_groups if isinstance(g["constraint"], LpBall)]
    assert "layers.1.mlp.fc2.weight" in lone


@pytest.mark.parametrize("build", [gpt2, timm_vit], ids=lambda b: b.__name__)
def test_state_is_loaded_by_the_same_balls_alone(build, tmp_path):
    model, twin = make(build), make(build)
    opt = train(model, group_by="heads", k=1, radius=3)
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert any("blocks=3 1" in (g["constraint"] or "") for g in state["param_groups"])
    other = create_sfw(twin, "group_k_support", k=1, radius=3, group_by="heads")
    other.load_state_dict(state)
    assert str(other.state_dict()) == str(opt.state_dict())
    for options in ({"k": 2}, {"k": 1, "group_by": "neurons"}, {"k": 1, "radius": 4}):
        wrong = create_sfw(make(build), "group_k_support", **{"radius": 3, "group_by": "heads", **options})
        with pytest.raises(ValueError, match="resume with the settings of the first run"):
            wrong.load_state_dict(state)


def test_text_of_a_ball_makes_the_same_ball():
    model = make(timm_vit)
    opt = train(model, group_by="heads", k=1)
    twin = make(timm_vit)
    weights = dict(twin.named_parameters())
    named = [
        {"params": [weights[n] for n in g["param_names"]], "constraint": g["constraint"] and str(g["constraint"])}
        for g in opt.param_groups
    ]
    again = SFW(named)
    assert [g["constraint"] for g in again.param_groups] == [g["constraint"] for g in opt.param_groups]


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (vit, {"group_by": "layers"}, "group_by must be one of filters, neurons, heads, got 'layers'"),
        (vit, {"group_by": "heads", "constraint": "k_sparse"}, "needs the constraint group_k_support, got k_sparse"),
        (vit, {"group_by": "heads", "scope": "global"}, "scope must be 'tensor', got 'global'"),
        (
            vit,
            {"group_by": "heads", "constraint": "group_k_support(axes=1)"},
            "leave them out of group_k_support.*axes",
        ),
        (vit, {"group_by": "heads", "constraint": "group_k_support(blocks=3)"}, "leave them out of"),
        (vit, {"group_by": "heads", "k": 5}, "q_proj.weight, .*keeps 5 groups, .* have 4"),
        (tiny_resnet, {"group_by": "neurons"}, "finds no neurons in these .*: it is no layer of a feed-forward pair"),
        (phi3, {"group_by": "heads"}, "finds no heads in these .*: it is no projection of an attention"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), {"group_by": "neurons"}, "'0.weight' for one"),
    ],
)
def test_mistakes_are_named(build, options, message):
    with pytest.raises(ValueError, match=message):
        create_sfw(build(), **{"constraint": "group_k_support", **options})
