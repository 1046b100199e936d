"""What is removed with the outputs of a layer: indices of the graph, and models that are traced without a trace."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers as t
from torch import nn

from hf_compress.structure.dependencies import Dependencies

IMAGE = torch.randn(1, 3, 32, 32)


def parts(model, path, indices, inputs=IMAGE):
    return {(line.path, line.part): line.indices for line in Dependencies(model, inputs).of(path, indices)}


def bert():
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    return t.BertForQuestionAnswering(t.BertConfig(**sizes, intermediate_size=24))


def test_a_filter_takes_its_norm_and_its_column_along():
    found = parts(timm.create_model("resnet18"), "layer1.0.conv1", [3, 1])
    names = [("layer1.0.conv1", "outputs"), ("layer1.0.bn1", "norm"), ("layer1.0.conv2", "inputs")]
    assert found == dict.fromkeys(names, (1, 3))


def test_depthwise_convolutions_and_gates_go_with_the_filters_that_they_see():
    found = parts(timm.create_model("mobilenetv3_small_050"), "blocks.3.0.conv_pw", [0, 5])
    block = {path.removeprefix("blocks.3.0."): part for path, part in found}
    assert block == {
        "conv_pw": "outputs",
        "bn1": "norm",
        "conv_dw": "outputs",
        "bn2": "norm",
        "se.conv_reduce": "inputs",
        "se.conv_expand": "outputs",
        "conv_pwl": "inputs",
    }


def test_a_flattened_image_is_many_columns():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 5))
    assert parts(model, "0", [2])["3", "inputs"] == tuple(range(1800, 2700))


def test_neurons_of_a_frozen_text_model_by_keyword_arguments():
    model = bert().requires_grad_(False)
    path = "bert.encoder.layer.0"
    found = parts(model, f"{path}.intermediate.dense", [7], {"input_ids": torch.ones(1, 8, dtype=torch.long)})
    assert found == {(f"{path}.intermediate.dense", "outputs"): (7,), (f"{path}.output.dense", "inputs"): (7,)}
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_tracing_changes_no_statistics():
    model = timm.create_model("resnet18")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Dependencies(model, torch.randn(4, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Added(nn.Module):
    """Two layers whose outputs are added, and one that the output does not depend on."""

    def __init__(self, norm=None):
        super().__init__()
        self.a, self.b, self.unused, self.last = (
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(3, 6, 1),
            nn.Linear(2, 2),
            nn.Conv2d(6, 2, 1),
        )
        self.norm = norm or nn.Identity()

    def forward(self, x):
        return self.last(self.norm(self.a(x)) + self.b(x))


@pytest.mark.parametrize(
    ("path", "indices", "message"),
    [
        ("layer1.0.conv2", [1], "'layer1.1.conv2' are joined with them"),
        ("fc", [1], "the model gives them out"),
        ("layer1.0.conv1", [], "at least one, got"),
        ("layer1.0.conv1", [64], "from 0 to 63"),
        ("layer1.0.conv1", [-1], "from 0 to 63"),
        ("layer1.0.conv1", [2, 2], "different ones"),
        ("layer1.0.conv1", range(64), "all 64 outputs"),
        ("layer1.0.bn1", [1], "'layer1.0.bn1' is no Linear, Conv or Conv1D layer of ResNet; there are: conv1, layer1"),
    ],
)
def test_what_cannot_be_removed_is_named(path, indices, message):
    with pytest.raises(ValueError, match=message):
        parts(timm.create_model("resnet18"), path, indices)


@pytest.mark.parametrize(
    ("model", "path", "message"),
    [
        (Added(), "a", "those of 'b' are joined"),
        (Added(), "unused", "'unused' has no part in the output of Added"),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1)), "0", "a GroupNorm, whose stat"),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.PReLU(8), nn.Conv2d(8, 2, 1)), "0", "'1' goes with them, a PReLU$"),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, groups=2)), "0", "'1' is a convolution of 2 groups"),
    ],
)
def test_what_cannot_be_removed_exactly_is_refused(model, path, message):
    with pytest.raises(ValueError, match=message):
        parts(model, path, [1])


def test_inputs_that_do_not_fit_are_refused_and_leave_nothing_behind():
    model = timm.create_model("resnet18")
    with pytest.raises(ValueError, match="ResNet does not run on these example_inputs"):
        Dependencies(model, torch.randn(1, 5, 32, 32))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
