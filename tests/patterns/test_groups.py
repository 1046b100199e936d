"""Filters, neurons and heads as zeros: exact counts, shared scores, against loops over single groups."""

from __future__ import annotations

import copy
import math
import re
from decimal import Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hf_compress as hfc
from hf_compress.patterns.base import count_pruned
from hf_compress.structure import find_coupled_targets
from hf_compress.targets import Groups, Target
from tests.conftest import tiny_bert, tiny_resnet, tiny_vit
from tests.test_selection import tensors

SHARES = st.floats(0, 1, exclude_max=True)
NORMS = st.sampled_from(["l1", "l2"])


@st.composite
def filters(draw):
    """What counts as convolutions: plain tensors with rows."""
    weights = {str(i): w for i, w in enumerate(draw(tensors())) if w.ndim}
    return weights or {"0": torch.ones(3, 2)}


@torch.no_grad()
def with_biases(model):
    """transformers starts with biases of zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    return model


def pruned_rows(mask):
    return (~mask).flatten(1).all(1) if mask.ndim > 1 else ~mask


@given(filters(), SHARES, NORMS)
def test_of_every_layer_the_floor_goes_smallest_norms_first(weights, share, norm):
    masks = hfc.Filters(share, norm).masks(weights)
    for name, weight in weights.items():
        rows = weight.double().abs().reshape(weight.shape[0], math.prod(weight.shape[1:]))
        sizes = [
            math.fsum(row.tolist()) if norm == "l1" else math.sqrt(math.fsum(r * r for r in row.tolist()))
            for row in rows
        ]
        if weight.dtype != torch.float64:
            sizes = torch.tensor(sizes, dtype=torch.float64).float().tolist()
        order = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
        wanted = torch.ones(weight.shape, dtype=torch.bool)
        wanted[order[: count_pruned(share, len(sizes))]] = False
        if weight.dtype == torch.float64 and len(set(sizes)) < len(sizes):
            assert (~masks[name]).sum() == (~wanted).sum()  # equal norms differ in the last bit of a sum
        else:
            assert torch.equal(masks[name], wanted)


def test_counts_are_decimal():
    weight = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    for share in ("0.29", "0.57", "0.58", "0.7"):
        mask = hfc.Filters(float(share)).masks({"w": weight})["w"]
        assert int(pruned_rows(mask).sum()) == math.floor(Decimal(share) * 100)


@given(filters(), SHARES, SHARES, NORMS)
def test_what_a_smaller_share_prunes_a_larger_one_prunes_too(weights, a, b, norm):
    few, many = (hfc.Filters(s, norm).masks(weights) for s in sorted((a, b)))
    assert not any((many[n] & ~few[n]).any() for n in weights)


@given(filters(), SHARES, NORMS)
def test_projecting_twice_changes_nothing_more(weights, share, norm):
    pattern = hfc.Filters(share, norm)
    once = {n: w.clone() for n, w in weights.items()}
    pattern.project_(once)
    twice = {n: w.clone() for n, w in once.items()}
    pattern.project_(twice)
    assert all(torch.equal(once[n], twice[n]) for n in once)


@given(st.sampled_from(["filters", "neurons", "heads"]), SHARES, NORMS)
def test_texts_read_back(name, share, norm):
    kind = {"filters": hfc.Filters, "neurons": hfc.Neurons, "heads": hfc.Heads}[name]
    pattern = kind(share, norm)
    assert hfc.parse_pattern(str(pattern)) == pattern
    assert str(hfc.parse_pattern(str(pattern))) == str(pattern)
    assert not set(pattern.revision) & set(":~^?*[\\ ")
    step = pattern.partway(0.5)
    assert hfc.parse_pattern(str(step)) == step == kind(share * 0.5, norm)
    assert pattern.partway(1) == pattern
    assert pattern.partway(0) is None


def test_names_of_revisions():
    texts = ["filters:0.5", "neurons:0.5", "heads:0.25", "filters:0.955:l1", "neurons:0:l2"]
    assert [hfc.parse_pattern(t).revision for t in texts] == [
        "filters-0.50",
        "neurons-0.50",
        "heads-0.25",
        "filters-0.955-l1",
        "neurons-0.00",
    ]
    assert [str(hfc.parse_pattern(t)) for t in ("filters:.50:l2", "heads:0.250")] == ["filters:0.5", "heads:0.25"]


@pytest.mark.parametrize("text", ["filters", "filters:", "filters:1", "neurons:-0.1", "heads:0.5:l3", "heads:0.5:l1:x"])
def test_a_wrong_text_names_the_form(text):
    name = text.split(":")[0]
    with pytest.raises(ValueError, match=rf'allowed: "{name}:SHARE" with a share removed in \[0, 1\), such as {name}'):
        hfc.parse_pattern(text)


def test_every_form_is_named():
    with pytest.raises(ValueError) as caught:
        hfc.parse_pattern("nope")
    assert all(f'"{name}:SHARE"' in str(caught.value) for name in ("filters", "neurons", "heads", "low_rank"))


@pytest.mark.parametrize("pattern", [hfc.Neurons(0.5), hfc.Heads(0.5), hfc.parse_pattern("neurons:0.5+int8")])
def test_single_weights_do_not_say_what_belongs_to_them(pattern, mlp):
    for weights in ({"w": torch.randn(4, 4)}, hfc.find_targets(mlp)):
        for act in (pattern.masks, pattern.project_):
            with pytest.raises(ValueError, match="which weights belong together.*find_coupled_targets"):
                act(weights)


@pytest.mark.parametrize(
    ("text", "model", "message"),
    [
        ("filters:0.5", tiny_bert, "finds no filters in these .*: it is no convolution"),
        ("neurons:0.5", tiny_resnet, "finds no neurons in these .*: it is no layer of a feed-forward pair"),
        ("heads:0.5", tiny_resnet, "finds no heads in these .*: it is no projection of an attention"),
    ],
)
def test_a_model_without_such_groups(text, model, message):
    model = model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        hfc.compress(model, text)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_layers_are_left_alone_and_reported():
    vit = with_biases(tiny_vit())
    before = {n: p.clone() for n, p in vit.named_parameters()}
    report = hfc.compress(vit, "filters:0.5")
    name = "vit.embeddings.patch_embeddings.projection.weight"
    assert report.skipped == {n: "it is no convolution" for n in report.layers if n != name}
    assert report.layers[name].sparsity == 0.5
    changed = {n for n, p in vit.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {name, name.replace("weight", "bias")}


def test_filters_take_their_bias_along_and_leave_the_batch_norm():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2))
    with torch.no_grad():
        net[1].bias.fill_(0.5)
    before = copy.deepcopy(net)
    hfc.compress(net, "filters:0.5")
    for layer, old in ((net[0], before[0]), (net[3], before[3])):
        norms = old.weight.flatten(1).norm(dim=1)
        gone = norms < norms.median() if len(norms) % 2 else norms <= norms.sort().values[len(norms) // 2 - 1]
        assert torch.equal(layer.weight, old.weight * ~gone[:, None, None, None])
        assert torch.equal(layer.bias, old.bias * ~gone)
    assert all(torch.equal(a, b) for a, b in zip(net[1].parameters(), before[1].parameters(), strict=True))


def loops(weights, groups, norm):
    """The score of every group, entry by entry in Python."""
    scores = [0.0] * next(iter(groups.values())).count
    for name, part in groups.items():
        weight = weights[name]
        size = weight.shape[part.dim] // (part.blocks * part.count)
        for index in range(weight.shape[part.dim]):
            values = weight.select(part.dim, index).flatten().double().tolist()
            group = index // size % part.count
            scores[group] += sum(abs(v) if norm == "l1" else v * v for v in values)
    return scores


MODELS = {"bert": tiny_bert, "vit": tiny_vit}


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["neurons", "heads"])
def test_the_weights_of_a_group_share_one_score(name, kind, norm):
    model = with_biases(MODELS[name]())
    targets = find_coupled_targets(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    pattern = hfc.parse_pattern(f"{kind}:0.5:{norm}")
    masks = pattern.masks(targets)
    sets: dict[str, dict[str, Groups]] = {}
    for n, target in targets.items():
        for part in target.groups[kind] if isinstance(target.groups[kind], tuple) else ():
            sets.setdefault(part.of, {})[n] = part
    assert sets
    wanted = {n: torch.ones(t.parameter.shape, dtype=torch.bool) for n, t in targets.items()}
    zeroed = {}
    for groups in sets.values():
        scores = loops(before, groups, norm)
        gone = sorted(range(len(scores)), key=lambda g: scores[g])[: len(scores) // 2]
        for n, part in groups.items():
            size = before[n].shape[part.dim] // (part.blocks * part.count)
            lines = [i for i in range(before[n].shape[part.dim]) if i // size % part.count in gone]
            wanted[n].index_fill_(part.dim, torch.tensor(lines), False)
            if part.dim == 0:
                zeroed[n.replace("weight", "bias")] = lines
    assert all(torch.equal(masks[n], wanted[n]) for n in wanted)
    hfc.compress(model, pattern)
    for n, parameter in model.named_parameters():
        expected = before[n].clone()
        if n in wanted:
            expected *= wanted[n]
        if n in zeroed:
            expected[zeroed[n]] = 0
        assert torch.equal(parameter, expected)


def test_a_layer_between_two_pairs_loses_rows_and_columns():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    first, second, third = (net[i].weight.detach().clone() for i in (0, 2, 4))
    hfc.compress(net, "neurons:0.5")
    outer = (first.square().sum(1) + second.square().sum(0)).argsort()[:4]
    inner = (second.square().sum(1) + third.square().sum(0)).argsort()[:3]
    first[outer], third[:, inner] = 0, 0
    second[inner], second[:, outer] = 0, 0
    assert all(torch.equal(net[i].weight, w) for i, w in ((0, first), (2, second), (4, third)))
    assert set(net[2].bias.eq(0).nonzero().flatten().tolist()) == set(inner.tolist())
    again = copy.deepcopy(net.state_dict())
    hfc.compress(net, "neurons:0.5")
    assert all(torch.equal(v, again[n]) for n, v in net.state_dict().items())


def test_masks_of_a_chain_leave_the_model_alone(mlp):
    before = copy.deepcopy(mlp.state_dict())
    masks = hfc.parse_pattern("neurons:0.5+int8").masks(find_coupled_targets(mlp))
    plain = hfc.Neurons(0.5).masks(find_coupled_targets(mlp))
    assert all(torch.equal(masks[n], plain[n]) for n in plain)
    assert all(torch.equal(v, before[n]) for n, v in mlp.state_dict().items())
    assert hfc.parse_pattern("neurons:0.5+int8").partway(0.5) == hfc.Neurons(0.25)
    report = hfc.compress(mlp, "neurons:0.5+int8")
    assert report.sparsity == pytest.approx(0.5, abs=0.05)
    assert torch.equal(mlp[0].weight == 0, ~plain["0.weight"] | (mlp[0].weight == 0))


def test_ties_go_by_position():
    weight = torch.ones(6, 2)
    assert hfc.Filters(0.5).masks({"w": weight})["w"][:, 0].tolist() == [False] * 3 + [True] * 3
    target = Target(weight, 1, "linear", groups={"heads": (Groups("a", 0, 3),), "neurons": "none"})
    assert hfc.Heads(0.4).masks({"w": target})["w"][:, 0].tolist() == [False] * 2 + [True] * 4


def test_a_small_weight_is_no_zero():
    """Squares of these are no float32 numbers."""
    weight = torch.tensor([[3e-30], [1e-30], [2e-30], [0.0]])
    assert hfc.Filters(0.5).masks({"w": weight})["w"].flatten().tolist() == [True, False, True, False]


def test_nan_is_named_and_nothing_is_written(mlp):
    with torch.no_grad():
        mlp[2].weight[0, 0] = torch.nan
    before = copy.deepcopy(mlp.state_dict())
    with pytest.raises(ValueError, match=re.escape("'2.weight' holds NaN")):
        hfc.compress(mlp, "neurons:0.5")
    assert all(torch.equal(v.nan_to_num(), before[n].nan_to_num()) for n, v in mlp.state_dict().items())
