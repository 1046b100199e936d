"""Outputs that change nothing are found, and no others; removed, the model gives out the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_compress.calibration import fold_batch_norm_
from hf_compress.structure import needless_outputs, remove
from tests.conftest import tiny_bert, tiny_resnet


class Net(nn.Module):
    """Filters behind a batch norm and an activation."""

    def __init__(self, activation):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)
        self.activation, self.out = activation, nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.b(self.activation(self.norm(self.a(x)))).mean((2, 3)))


def net(activation=None):
    torch.manual_seed(0)
    model = Net(activation or nn.ReLU()).eval()
    with torch.no_grad():
        for p in (model.norm.running_mean, model.norm.weight, model.norm.bias):
            p.copy_(torch.rand(8) + 0.5)
        model.b.weight[:, 2] = 0  # unread
        model.a.weight[[1, 5, 6]] = 0
        model.a.bias[[1, 5, 6]] = 0
        model.norm.bias[1] = -1.0  # nothing passes a ReLU
        model.norm.bias[5] = 1.0
        model.norm.running_mean[[1, 5, 6]] = 0
        model.norm.bias[6] = 0
    return model


def output(model, x):
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize(
    ("activation", "gone"), [(nn.ReLU(), [1, 2, 6]), (nn.Tanh(), [2, 6]), (nn.Sigmoid(), [2]), (nn.Identity(), [2, 6])]
)
def test_what_is_found_depends_on_what_the_activation_makes_of_an_empty_row(activation, gone):
    model, x = net(activation), torch.randn(4, 3, 8, 8)
    plan, lines = needless_outputs(model, x)
    assert plan == {"a": gone}
    assert lines == {("a", "outputs"): tuple(gone), ("norm", "norm"): tuple(gone), ("b", "inputs"): tuple(gone)}
    before = output(model, x)
    if isinstance(activation, nn.Sigmoid):  # which makes 1/2 of zeros, but here nobody reads it
        with pytest.raises(ValueError, match="cannot be removed exactly"):
            remove(net(activation), {"a": [5]}, x)
    remove(model, plan, x)
    torch.testing.assert_close(output(model, x), before, rtol=1e-5, atol=1e-6)


def test_a_bias_keeps_an_empty_row():
    model = net()
    with torch.no_grad():
        model.a.bias[1] = 3.0
    assert needless_outputs(model, torch.randn(2, 3, 8, 8))[0] == {"a": [2, 6]}


def test_one_output_stays():
    model = net()
    with torch.no_grad():
        model.b.weight.zero_()
    plan, _ = needless_outputs(model, torch.randn(2, 3, 8, 8))
    assert plan["a"] == list(range(1, 8))


def test_a_reader_behind_flattened_maps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4, 3)).eval()
    with torch.no_grad():
        model[3].weight[:, 8:12] = 0  # all of filter 2
        model[3].weight[:, 16:19] = 0  # a part of filter 4
    x = torch.randn(2, 2, 4, 4)
    plan, _ = needless_outputs(model, x)
    assert plan == {"0": [2]}
    before = output(model, x)
    remove(model, plan, x)
    torch.testing.assert_close(output(model, x), before, rtol=1e-5, atol=1e-6)


def test_neurons_of_transformers_and_filters_of_blocks():
    model = tiny_bert().eval()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, [3, 9]] = 0
    ids = {"input_ids": torch.arange(6)[None]}
    assert needless_outputs(model, ids)[0] == {"bert.encoder.layer.0.intermediate.dense": [3, 9]}
    model = tiny_resnet().eval()
    block = model.resnet.encoder.stages[1].layers[0].layer
    with torch.no_grad():
        block[1].convolution.weight[:, 4] = 0
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
    assert needless_outputs(model, pixels)[0] == {"resnet.encoder.stages.1.layers.0.layer.0.convolution": [4]}
    assert needless_outputs(tiny_resnet(), pixels) == ({}, {})


def test_folded_batch_norms_do_what_they_did():
    model = tiny_resnet()
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 16, 16) + 1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2)
    model.eval()
    x = torch.randn(4, 3, 16, 16)
    before = output(model, x).logits
    assert fold_batch_norm_(model) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) > 3
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((m.running_mean == 0).all() and (m.running_var == 1).all() for m in norms)
    torch.testing.assert_close(output(model, x).logits, before, rtol=1e-4, atol=1e-5)
    assert fold_batch_norm_(nn.BatchNorm2d(3, affine=False)) == 0
