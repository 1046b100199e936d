"""What goes: the published counts, speed-ups and sparsities, and mistakes by name."""

from __future__ import annotations

import copy
import math
import re
import shlex

import pytest
import timm
import torch
import transformers as t
from hypothesis import given
from hypothesis import strategies as st

import hf_compress  # noqa: F401  # registers the nets of the papers
from hf_compress.cli.recipes import packaged, read_recipe
from hf_compress.family.footprint import count_macs
from hf_compress.methods.tpp import TrainabilityPenalty, select
from hf_compress.structure import remove
from tests.conftest import tiny_resnet
from tests.structure.conftest import SIZES, gpt2, llama, timm_vit

IMAGES = torch.randn(2, 3, 8, 8)
FIRST = "resnet.encoder.stages.0.layers.0.layer.0.convolution"


@pytest.fixture(scope="module")
def resnet50():
    return timm.create_model("resnet50").eval()


PUBLISHED = [
    (1.49, 19.64, {"layer[1-3]": 0.3, "layer4": 0.14}),
    (2.31, 15.93, {"layer[1-3]": 0.6, "layer4": 0.21}),
    (2.56, 15.79, {"layer[1-2]": 0.74, "layer3": 0.6, "layer4": 0.21}),
    (3.06, 11.08, {"layer[1-3]": 0.68, "layer4": 0.5}),
]


@pytest.mark.parametrize(("speed_up", "parameters", "shares"), PUBLISHED)
def test_the_published_speed_ups_of_resnet50(resnet50, speed_up, parameters, shares):
    rules = [f"{stage}.*.conv[12]=filters:{share}" for stage, share in shares.items()]
    found = select(resnet50, rules, torch.zeros(1, 3, 224, 224))
    assert round(found.speed_up, 2) == speed_up
    smaller = copy.deepcopy(resnet50)
    gone = remove(smaller, found.pruned, torch.randn(1, 3, 64, 64))
    left = sum(p.numel() for p in smaller.parameters())
    assert round(left / 1e6, 2) == parameters
    assert gone == sum(p.numel() for p in resnet50.parameters()) - left


@pytest.mark.parametrize(
    ("share", "sparsity", "speed_up"),
    [(0.3, 31.14, 1.45), (0.5, 49.82, 1.99), (0.7, 70.58, 3.59), (0.9, 90.45, 11.58), (0.95, 95.18, 19.85)],
)
def test_the_published_sparsities_of_resnet56(share, sparsity, speed_up):
    model = timm.create_model("resnet56_cifar").eval()
    before, images = sum(p.numel() for p in model.parameters()), torch.randn(1, 3, 32, 32)
    dense_macs = count_macs(model, {"x": images})
    found = select(model, [f"layer*.conv1=filters:{share}"], images)
    assert len(found.pruned) == 27
    gone = remove(model, found.pruned, images)
    assert round(100 * gone / before, 2) == sparsity
    assert round(found.speed_up, 2) == speed_up
    assert dense_macs / count_macs(model, {"x": images}) == pytest.approx(found.speed_up, rel=1e-9)


def test_the_recipe_of_resnet34_is_the_published_one():
    patterns = read_recipe("imagenet_resnet34_tpp")["patterns"]
    found = select(timm.create_model("resnet34"), patterns, torch.zeros(1, 3, 224, 224))
    assert round(found.speed_up, 2) == 1.32


def test_the_recipe_of_resnet50_names_the_published_shares(resnet50):
    """As its patterns, and as flags in a comment."""
    text, own = packaged()["imagenet_resnet50_tpp"].read_text(), read_recipe("imagenet_resnet50_tpp")["patterns"]
    settings = [own, *(shlex.split(line)[1:] for line in re.findall(r"--patterns .*", text))]
    found = [select(resnet50, rules, torch.zeros(1, 3, 224, 224)).speed_up for rules in settings]
    assert sorted(round(speed_up, 2) for speed_up in found) == [1.49, 2.31, 2.56, 3.06]


@given(st.integers(2, 300), st.integers(1, 99))
def test_counts(count, percent):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, count, 1, bias=False), torch.nn.Conv2d(count, 1, 1))
    found = select(model, [f"filters:{percent / 100}"], torch.zeros(1, 1, 2, 2)).pruned["0"]
    assert len(found) == min(-(-percent * count // 100), math.floor(0.995 * count))
    magnitudes = model[0].weight.detach().double().abs().flatten()
    assert magnitudes[found].max() <= magnitudes[[i for i in range(count) if i not in set(found)]].min()


def test_a_group_with_depthwise_convolutions_and_gates_is_chosen_once():
    """Any of its layers would name it; what falls is what the smaller model multiplies."""
    model = timm.create_model("mobilenetv3_small_050", num_classes=4).eval()
    images = torch.randn(1, 3, 32, 32)
    dense_macs = count_macs(model, {"x": images})
    found = select(model, ["filters:0.5"], images)
    assert not any(path.endswith(("conv_dw", "conv_expand")) for path in found.pruned)
    penalty = TrainabilityPenalty(model, found.pruned, images)
    assert penalty.values()["gram"] > 0
    assert remove(model, found.pruned, images) > 0
    assert dense_macs / count_macs(model, {"x": images}) == pytest.approx(found.speed_up, rel=1e-6)


def test_equal_scores_go_by_position():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 6, 1), torch.nn.Conv2d(6, 1, 1))
    torch.nn.init.ones_(model[0].weight)
    assert select(model, ["filters:0.5"], torch.zeros(1, 1, 2, 2)).pruned == {"0": [0, 1, 2]}


def test_the_last_rule_counts_and_layers_without_one_stay():
    found = select(tiny_resnet(), ["filters:0.25", f"{FIRST}=filters:0"], IMAGES)
    assert list(found.pruned) == [FIRST.replace("stages.0", "stages.1")]
    assert found.pattern == "filters:0.25"
    assert {
        path: len(rows) for path, rows in select(tiny_resnet(), [f"{FIRST}=filters:0.5"], IMAGES).pruned.items()
    } == {FIRST: 4}


def test_what_keeps_its_shape_says_why():
    reasons = select(tiny_resnet(), ["filters:0.5"], IMAGES).skipped
    assert "are joined with them" in reasons["resnet.encoder.stages.0.layers.0.layer.1.convolution"]


def test_a_goal_for_the_speed_up_scales_all_shares():
    model = timm.create_model("resnet20_cifar")
    images = torch.zeros(1, 3, 32, 32)
    found = select(model, ["layer*.conv1=filters:0.5", "layer3.*.conv1=filters:0.25"], images, speed_up=1.6)
    assert 1.6 <= found.speed_up < 1.67
    shares = {path: len(rows) / model.get_submodule(path).out_channels for path, rows in found.pruned.items()}
    assert shares["layer1.0.conv1"] == pytest.approx(2 * shares["layer3.0.conv1"], abs=1 / 16)
    assert found.pattern.startswith("filters:0.")
    with pytest.raises(ValueError, match=r"a speed-up of 500 is out of reach: these layers give at most \d+\.\d\d"):
        select(model, ["filters:0.5"], images, speed_up=500)


def test_widths_are_multiples():
    found = select(timm.create_model("resnet20_cifar"), ["filters:0.6"], torch.zeros(1, 3, 32, 32), multiple_of=8)
    assert {len(rows) for rows in found.pruned.values()} == {8, 16, 32}


def test_neurons_and_heads_of_transformers():
    model = t.BertModel(t.BertConfig(**SIZES))
    found = select(model, ["neurons:0.5", "heads:0.25"], model.dummy_inputs)
    path = "encoder.layer.0"
    assert found.pattern == "neurons:0.5+heads:0.25"
    assert {p for p in found.pruned if p.startswith(path)} == {
        f"{path}.intermediate.dense",
        f"{path}.attention.self.value",
    }
    layer = model.encoder.layer[0]
    projections = [getattr(layer.attention.self, n).weight.detach().double().abs() for n in ("query", "key", "value")]
    scores = torch.stack([w.view(4, -1).mean(1) for w in projections]).mean(0)
    head = scores.argmin().item()
    assert found.pruned[f"{path}.attention.self.value"] == list(range(4 * head, 4 * head + 4))
    neurons = layer.intermediate.dense.weight.abs().mean(1)
    expected = neurons.argsort()[: len(neurons) // 2].sort().values.tolist()
    assert found.pruned[f"{path}.intermediate.dense"] == expected


@pytest.mark.parametrize("make", [llama, gpt2, timm_vit])
def test_gated_fused_and_transposed_layers(make):
    model = make()
    inputs = IMAGES if make is timm_vit else model.dummy_inputs
    found = select(model, ["neurons:0.5", "heads:0.5"], inputs)
    assert remove(model, found.pruned, inputs) > 0


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            ["nothing.*=filters:0.5"],
            r"nothing\.\*=filters:0\.5 matches no layer with filters; there are: resnet\.embed",
        ),
        (["*.shortcut.convolution=filters:0.5"], "names a layer that keeps its shape: .* are joined with them"),
        (["neurons:0.5"], "ResNetForImageClassification has nothing that neurons:0.5 removes"),
        (["filters:0"], "has nothing that filters:0 removes"),
        (["2:4"], "'2:4' removes nothing; allowed: filters:SHARE, neurons:SHARE or heads:SHARE"),
        (["=filters:0.5"], "'=filters:0.5' removes nothing"),
        (["filters:2"], "a share removed in"),
    ],
)
def test_mistakes_are_named(rules, message):
    with pytest.raises(ValueError, match=message):
        select(tiny_resnet(), rules, IMAGES)
