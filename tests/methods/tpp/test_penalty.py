"""The closed form of the gradient against autograd of the penalty, written out with masks in float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import timm
import torch
import transformers as t
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_compress.methods.tpp import SLIDES, TrainabilityPenalty
from tests.structure.conftest import SIZES, gpt2, llama, timm_vit

SCALES = {"mean": lambda n: n**-2, "n": lambda n: 1 / n, "sum": lambda n: 1}
PUBLISHED = {"gram_weight": 1000.0, "gram_scale": "mean", "filter_weight": 1.0, "norm_weight": 1.0}


def of_rows(weight, rows, gram_weight, gram_scale, **_):
    """The Gram term as it is defined: all filters by all filters, masked."""
    matrix = weight.flatten(1)
    stays = torch.ones(len(matrix), dtype=matrix.dtype)
    stays[list(rows)] = 0
    masked = (matrix @ matrix.T) * (1 - stays[:, None] * stays[None])
    return gram_weight * SCALES[gram_scale](len(matrix)) * masked.square().sum()


def decay(weight, *parameters):
    return weight / 2 * sum(p.square().sum() for p in parameters)


def check(model, penalty, expected, strength=0.3):
    """Gradients that are there already are added to, and all parameters get what autograd gives them."""
    (strength * expected).backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    penalty.add_gradients(strength)
    for name, p in model.named_parameters():
        gradient = p.grad - 1
        exact = torch.zeros_like(p) if wanted[name] is None else wanted[name]
        assert (gradient - exact).abs().max() <= 1e-10 * max(1, exact.abs().max()), name
    terms = penalty.values()
    assert sum(terms.values()).item() == pytest.approx(expected.item(), rel=1e-12)


class Convs(nn.Module):
    """A 3x3 and a 1x1 convolution, with and without norm and bias, and a Linear on top."""

    def __init__(self, bias=True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, bias=bias), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 5, 1, bias=False), nn.BatchNorm2d(5, affine=bias)
        self.fc1, self.fc2 = nn.Linear(5, 7), nn.Linear(7, 2)

    def forward(self, x):
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return self.fc2(self.fc1(x.mean((2, 3))).relu())


def convs(**kwargs):
    torch.manual_seed(0)
    model = Convs(**kwargs).double()
    for p in model.parameters():
        nn.init.normal_(p)
    return model


IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64)
SETTINGS = [PUBLISHED, {**PUBLISHED, "gram_weight": 16.0, "gram_scale": "n"}, SLIDES, {**PUBLISHED, "gram_weight": 0.0}]


@pytest.mark.parametrize("options", SETTINGS)
def test_convolutions_linear_layers_and_norms(options):
    model = convs()
    pruned = {"conv1": [1, 4], "conv2": [0], "fc1": [6, 2, 3]}
    expected = sum(of_rows(model.get_submodule(name).weight, rows, **options) for name, rows in pruned.items())
    for name, rows in pruned.items():
        layer = model.get_submodule(name)
        expected += decay(options["filter_weight"], layer.weight[rows])
        if layer.bias is not None:
            expected += decay(options["filter_weight"], layer.bias[rows])
    for norm, rows in ((model.bn1, [1, 4]), (model.bn2, [0])):
        expected += decay(options["norm_weight"], norm.weight[rows], norm.bias[rows])
    check(model, TrainabilityPenalty(model, pruned, IMAGES, **options), expected)


def test_a_norm_without_scales_and_a_layer_without_bias():
    model = convs(bias=False)
    expected = of_rows(model.conv2.weight, [3], **PUBLISHED) + decay(1, model.conv2.weight[[3]])
    check(model, TrainabilityPenalty(model, {"conv2": [3]}, IMAGES), expected)


def test_a_depthwise_convolution_and_a_gate_decay_with_their_filters():
    model = timm.create_model("mobilenetv3_small_050").double()
    rows, block = [0, 5], model.blocks[3][0]
    expected = of_rows(block.conv_pw.weight, rows, **PUBLISHED)
    made = (block.conv_pw.weight, block.conv_dw.weight, block.se.conv_expand.weight, block.se.conv_expand.bias)
    expected += decay(
        1, *(p[rows] for p in (*made, block.bn1.weight, block.bn1.bias, block.bn2.weight, block.bn2.bias))
    )
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    check(model, TrainabilityPenalty(model, {"blocks.3.0.conv_pw": rows}, images), expected)


def normal(model):
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p)
    return model.double()


def test_heads_have_a_gram_term_in_the_value_projection():
    model = normal(t.BertModel(t.BertConfig(**SIZES)))
    rows, attention = [4, 5, 6, 7], model.encoder.layer[1].attention.self
    expected = of_rows(attention.value.weight, rows, **PUBLISHED)
    for layer in (attention.query, attention.key, attention.value):
        expected += decay(1, layer.weight[rows], layer.bias[rows])
    check(model, TrainabilityPenalty(model, {"encoder.layer.1.attention.self.value": rows}), expected)


def test_a_fused_projection_has_a_gram_term_in_each_of_its_three_blocks():
    model = normal(timm_vit())
    rows = [4, 5, 6, 7, 20, 21, 22, 23, 36, 37, 38, 39]
    qkv = model.blocks[0].attn.qkv
    expected = sum(of_rows(block, [4, 5, 6, 7], **PUBLISHED) for block in qkv.weight.split(16))
    expected += decay(1, qkv.weight[rows], qkv.bias[rows])
    check(model, TrainabilityPenalty(model, {"blocks.0.attn.qkv": rows}), expected)


def test_gated_neurons_have_a_gram_term_in_both_layers():
    model = normal(llama())
    rows, mlp = [3, 10], model.layers[0].mlp
    expected = sum(of_rows(layer.weight, rows, **PUBLISHED) for layer in (mlp.gate_proj, mlp.up_proj))
    expected += decay(1, mlp.gate_proj.weight[rows], mlp.up_proj.weight[rows])
    check(model, TrainabilityPenalty(model, {"layers.0.mlp.gate_proj": rows}), expected)


def test_layers_with_their_outputs_in_the_second_dimension():
    model = normal(gpt2())
    rows, layer = [0, 23], model.h[1].mlp.c_fc
    expected = of_rows(layer.weight.T, rows, **PUBLISHED) + decay(1, layer.weight[:, rows], layer.bias[rows])
    check(model, TrainabilityPenalty(model, {"h.1.mlp.c_fc": rows}), expected)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_rows_of_many_layers(data):
    """Layers of one shape are taken together, whichever rows they lose."""
    count, width = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 6))
    model = nn.Sequential(
        *(nn.Linear(count if i else width, count, bias=i % 2 == 0) for i in range(4)), nn.Linear(count, 2)
    )
    normal(model)
    some = st.lists(st.integers(0, count - 1), min_size=1, max_size=count - 1, unique=True)
    pruned = {str(i): data.draw(some) for i in data.draw(st.sets(st.integers(0, 3), min_size=1))}
    expected = sum(of_rows(model[int(i)].weight, rows, **PUBLISHED) for i, rows in pruned.items())
    for i, rows in pruned.items():
        layer = model[int(i)]
        expected = expected + decay(1, layer.weight[rows], *([] if layer.bias is None else [layer.bias[rows]]))
    check(model, TrainabilityPenalty(model, pruned, torch.randn(1, width, dtype=torch.float64)), expected)


def test_half_precision_weights_are_multiplied_in_float32():
    model = convs()
    exact, half = copy.deepcopy(model).bfloat16().float(), copy.deepcopy(model).bfloat16()
    for each, dtype in ((exact, torch.float32), (half, torch.bfloat16)):
        TrainabilityPenalty(each, {"conv1": [1, 4]}, IMAGES.to(dtype)).add_gradients(0.3)
    assert torch.equal(half.conv1.weight.grad, exact.conv1.weight.grad.bfloat16())


def test_zeros_decoupled_steps_and_frozen_weights():
    model = convs()
    model.conv2.weight.requires_grad_(False)
    penalty = TrainabilityPenalty(model, {"conv1": [1, 4], "conv2": [0]}, IMAGES)
    penalty.add_gradients(torch.tensor(0.3, dtype=torch.float64))
    assert model.conv2.weight.grad is None
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    penalty.decay_(0.3, rate=1e-6)
    for name, p in model.named_parameters():
        moved = 0 if p.grad is None else 1e-6 * p.grad
        assert torch.allclose(start[name] - p.detach(), torch.as_tensor(moved, dtype=p.dtype), atol=1e-14), name
    penalty.zero_(["conv1"])
    assert model.conv1.weight[[1, 4]].count_nonzero() == 0 != model.conv1.weight[0].count_nonzero()
    assert model.bn1.weight[1] == 0 != model.bn2.weight[0]
    penalty.zero_()
    for p in (model.conv1.bias, model.bn1.weight, model.bn1.bias):
        assert p[[1, 4]].count_nonzero() == 0 != p[0]
    assert model.conv2.weight[0].count_nonzero() == model.bn2.bias[0] == 0
    strength_zero = {name: value.item() for name, value in penalty.values().items()}
    assert strength_zero == {"gram": 0, "decay": 0}


@pytest.mark.parametrize("strength", [1.0, 1e6])
def test_decoupled_steps_of_any_strength_shrink_the_rows(strength):
    model = convs()
    penalty = TrainabilityPenalty(model, {"conv1": [1, 4], "conv2": [0]}, IMAGES, filter_weight=0, norm_weight=0)
    sizes, grams = [model.conv1.weight[[1, 4]].norm().item()], [penalty.values()["gram"].item()]
    for _ in range(30):
        penalty.decay_(strength, rate=0.1)
        sizes.append(model.conv1.weight[[1, 4]].norm().item())
        grams.append(penalty.values()["gram"].item())
    assert all(after < before for before, after in itertools.pairwise(sizes))
    assert grams[-1] < 1e-3 * grams[0]


def test_filters_of_two_layers_that_meet_in_one_norm():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.norm = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(5)
            self.last = nn.Conv2d(5, 2, 1)

        def forward(self, x):
            return self.last(self.norm(torch.cat((self.left(x), self.right(x)), 1)))

    torch.manual_seed(0)
    model = Joined().double()
    penalty = TrainabilityPenalty(model, {"left": [1], "right": [0, 2]}, IMAGES)
    w, v, norm = model.left.weight, model.right.weight, [model.norm.weight[[1, 2, 4]], model.norm.bias[[1, 2, 4]]]
    rows = decay(1.0, w[1], model.left.bias[1], v[[0, 2]], model.right.bias[[0, 2]], *norm)
    check(model, penalty, rows + of_rows(w, [1], **PUBLISHED) + of_rows(v, [0, 2], **PUBLISHED))
    penalty.zero_(["right"])
    assert (model.norm.weight == 0).tolist() == [False, False, True, False, True]


@pytest.mark.parametrize(
    ("pruned", "options", "message"),
    [
        ({}, {}, "no layer has rows to remove"),
        ({"conv3": [1]}, {}, "'conv3' is no Linear, Conv or Conv1D layer of Convs"),
        ({"conv1": [6]}, {}, "indices of 'conv1' are different ones from 0 to 5"),
        ({"fc2": [1]}, {}, "no layer reads them"),
        ({"conv1": [1]}, {"gram_scale": "max"}, "gram_scale is one of mean, n, sum, got 'max'"),
        ({"conv1": [1]}, {"gram_weight": -1}, "gram_weight must be a number of at least 0, got -1"),
        ({"conv1": [1]}, {"norm_weight": float("nan")}, "norm_weight must be a number of at least 0, got nan"),
        ({"conv1": [1]}, {"example_inputs": None}, "give example_inputs, one sample that Convs runs on"),
    ],
)
def test_mistakes_are_named(pruned, options, message):
    with pytest.raises(ValueError, match=message):
        TrainabilityPenalty(convs(), pruned, **{"example_inputs": IMAGES, **options})


def test_part_of_a_head_and_rows_named_twice_are_refused():
    model = t.BertModel(t.BertConfig(**SIZES))
    path = "encoder.layer.0.attention.self"
    with pytest.raises(ValueError, match="makes 4 heads of 4 rows; name all rows"):
        TrainabilityPenalty(model, {f"{path}.value": [4, 5]})
    with pytest.raises(ValueError, match="goes with the outputs of two layers"):
        TrainabilityPenalty(model, {f"{path}.{name}": [0, 1, 2, 3] for name in ("value", "query")})
