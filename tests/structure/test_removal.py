"""Removed models equal those with zeros in the places of what is gone; what cannot be removed leaves no trace."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import transformers as t
from torch import nn

import hf_compress as hfc
from hf_compress.structure import describe, remove
from tests.conftest import tiny_resnet
from tests.structure.conftest import (
    SIZES,
    albert,
    bart,
    bert,
    distilbert,
    gpt2,
    llama,
    make,
    modernbert,
    qwen3,
    run,
    t5,
    timm_swiglu,
    timm_vit,
    vit,
)

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def with_statistics(name):
    """In eval mode, with norms that shift, so that a filter of zeros gives no zeros."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


FILTERS = {  # the plan, and for every entry the layers whose parameters of the same indices go along
    "resnet18": {"layer1.0.conv1": ([0, 5, 6], ["layer1.0.bn1"]), "layer4.1.conv1": (range(1, 500), ["layer4.1.bn1"])},
    "resnet26": {"layer2.0.conv1": ([7], ["layer2.0.bn1"]), "layer2.0.conv2": ([0, 1], ["layer2.0.bn2"])},
    "mobilenetv3_small_050": {
        "blocks.3.0.conv_pw": ([0, 5], [f"blocks.3.0.{n}" for n in ("bn1", "conv_dw", "bn2", "se.conv_expand")]),
        "blocks.3.0.se.conv_reduce": ([1], []),
    },
    "convnext_atto": {"stages.1.blocks.0.mlp.fc1": ([2, 3], [])},
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters(name):
    model = with_statistics(name)
    masked, plan = copy.deepcopy(model), {root: indices for root, (indices, _) in FILTERS[name].items()}
    for root, (indices, along) in FILTERS[name].items():
        for path in (root, *along):
            for parameter in masked.get_submodule(path).parameters():
                parameter.data[list(indices)] = 0
    before = sum(p.numel() for p in model.parameters())
    gone = remove(model, plan, IMAGES)
    assert gone == before - sum(p.numel() for p in model.parameters()) > 0
    with torch.no_grad():
        wanted, found = masked(IMAGES), model(IMAGES)
    assert (wanted - found).abs().max() <= 1e-5 * wanted.abs().max()
    model.train()(IMAGES).sum().backward()
    for path, indices in plan.items():
        layer, was = model.get_submodule(path), masked.get_submodule(path).out_channels
        assert layer.weight.grad.shape[0] == layer.out_channels == was - len(indices)


TEXT = [bert, albert, distilbert, gpt2, llama, qwen3, bart, modernbert]
CASES = [*((b, "heads:0.25") for b in [*TEXT, vit, timm_vit] if b not in (llama, qwen3)), (llama, "heads:0.5")]
CASES += [(qwen3, "heads:0.5"), *((b, "neurons:0.4") for b in [*TEXT, vit, timm_vit, timm_swiglu, t5])]


@pytest.mark.parametrize(("build", "pattern"), CASES, ids=lambda c: c if isinstance(c, str) else c.__name__)
def test_neurons_and_heads(build, pattern):
    model = make(build)
    masked = copy.deepcopy(model)
    hfc.compress(masked, pattern)
    report = hfc.compress(model, pattern, remove=True)
    counts = [sum(p.numel() for p in m.parameters()) for m in (masked, model)]
    assert report.parameters_removed == counts[0] - counts[1] > 0
    assert not any("keeps its shape" in reason for reason in report.skipped.values())
    with torch.no_grad():
        torch.testing.assert_close(run(model), run(masked), rtol=1e-5, atol=1e-5)
    assert all(p.requires_grad for p in model.parameters())


def test_heads_with_a_position_bias_of_their_own_are_refused_and_nothing_changes():
    model = make(t5)
    state, wanted = {n: v.clone() for n, v in model.state_dict().items()}, run(model)
    with pytest.raises(
        ValueError, match=r"outputs of 'encoder\.block.* cannot be removed: the model does not run with"
    ):
        hfc.compress(model, "heads:0.5", remove=True)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(run(model), wanted)
    assert describe(model) == {}


class NotZero(nn.Module):
    """What follows the filters makes no zeros of zeros."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.b(self.a(x).sigmoid())


def test_what_is_not_equal_without_outputs_is_found_by_running_it():
    torch.manual_seed(0)
    model = NotZero()
    wanted = model(IMAGES)
    with pytest.raises(
        ValueError, match="outputs of 'a' cannot be removed exactly: without them the output of the model"
    ):
        remove(model, {"a": [1]}, IMAGES)
    assert torch.equal(model(IMAGES), wanted)
    assert model.a.out_channels == model.b.in_channels == 6
    assert model.training


def test_a_model_that_diverged_is_named_as_such_and_stays_as_it_is():
    model = tiny_resnet()
    with torch.no_grad():
        model.classifier[1].weight[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="training that diverged"):
        remove(model, {"resnet.encoder.stages.0.layers.0.layer.0.convolution": [1]}, torch.randn(1, 3, 32, 32))
    pairs = zip(before.values(), model.state_dict().values(), strict=True)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def test_outputs_that_lie_side_by_side_are_columns_of_one_reader():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn, self.c = (
                nn.Conv2d(3, 4, 1),
                nn.Conv2d(3, 6, 1),
                nn.BatchNorm2d(10),
                nn.Conv2d(10, 2, 1),
            )

        def forward(self, x):
            return self.c(self.bn(torch.cat([self.a(x), self.b(x)], 1)))

    model = Joined().eval()
    masked = copy.deepcopy(model)
    for parameters, gone in (((masked.a.weight, masked.a.bias), [1]), ((masked.b.weight, masked.b.bias), [0, 5])):
        for p in parameters:
            p.data[gone] = 0
    masked.bn.bias.data[[1, 4, 9]] = 0
    remove(model, {"a": [1], "b": [0, 5]}, IMAGES)
    assert (model.a.out_channels, model.b.out_channels, model.bn.num_features, model.c.in_channels) == (3, 4, 7, 7)
    torch.testing.assert_close(model(IMAGES), masked(IMAGES))


def test_tied_and_frozen_weights():
    model = make(bert)
    model.encoder.layer[1].intermediate.dense.weight = model.encoder.layer[0].intermediate.dense.weight
    with pytest.raises(ValueError, match="nothing can be removed from '.*intermediate.dense': several layers share it"):
        remove(model, {"encoder.layer.0.intermediate.dense": [1]})
    model = make(bert).requires_grad_(False)
    remove(model, {"encoder.layer.0.intermediate.dense": [1]})
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, "the plan is empty"),
        ({"encoder.layer.0.nothing": [1]}, "is no Linear, Conv or Conv1D layer of BertModel"),
        ({"encoder.layer.0.attention.self.value": [0, 1]}, "makes 4 heads of 4 rows; name all rows"),
        (
            {f"encoder.layer.0.attention.self.{n}": range(r, r + 4) for n, r in (("key", 0), ("query", 4))},
            "name one layer",
        ),
    ],
)
def test_wrong_plans_are_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        remove(make(bert), plan)


def test_widths_are_rounded_up_to_a_multiple():
    model = t.BertModel(t.BertConfig(**SIZES))
    hfc.compress(model, "neurons:0.5", remove=True, multiple_of=8)
    assert model.encoder.layer[0].intermediate.dense.out_features == 16  # of 24, 12 would be half
    net = with_statistics("resnet18")
    report = hfc.compress(net, "filters:0.9", remove=True, multiple_of=16)
    assert (net.layer1[0].conv1.out_channels, net.layer4[1].conv1.out_channels) == (16, 64)  # 7 and 52
    assert "those of 'layer1.1.conv2' are joined with them" in report.skipped["layer1.0.conv2.weight"]
    assert net.layer1[0].conv2.weight.flatten(1).any(1).sum() == 16  # zeros, as without remove
    assert net.layer1[0].conv2.out_channels == 64
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="multiple_of is a whole number of at least 1"):
            hfc.compress(model, "neurons:0.5", remove=True, multiple_of=wrong)


def test_a_net_that_does_not_say_its_size_is_tried_on_images_of_any():
    report = hfc.compress(tiny_resnet().eval(), "filters:0.5", remove=True)
    assert report.parameters_removed > 0
    assert len(report.skipped) < len(report.layers)


def test_other_patterns_are_not_removed():
    with pytest.raises(ValueError, match="filters:SHARE, neurons:SHARE and heads:SHARE can; 2:4 writes zeros"):
        hfc.compress(make(bert), "2:4", remove=True)


def test_weights_in_half_precision():
    """The check is as strict: on a CPU zeros are added in float32, which rounds nothing away."""
    torch.manual_seed(0)
    model = with_statistics("resnet18").bfloat16()
    plan = {f"layer{i}.0.conv1": list(range(20)) for i in range(1, 5)}
    assert remove(model, plan, IMAGES) > 0
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
