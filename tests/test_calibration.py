"""Batch-norm statistics after compression."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hf_compress as hfc


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(2))


def batches(count=6, size=10):
    generator = torch.Generator().manual_seed(3)
    return [(2 + torch.randn(size, 3, 5, 5, generator=generator), torch.zeros(size)) for _ in range(count)]


def test_statistics_are_averages_over_the_samples(net):
    data = batches()
    net(data[0][0])
    assert hfc.recalibrate_batch_norm(net, data, num_samples=45) == 45
    outputs = [net[0](x) for x, _ in data]
    outputs = [*outputs[:4], outputs[4][:5]]
    weights = torch.tensor([len(y) / 45 for y in outputs])[:, None]
    mean = (weights * torch.stack([y.mean((0, 2, 3)) for y in outputs])).sum(0)
    variance = (weights * torch.stack([y.transpose(0, 1).flatten(1).var(1) for y in outputs])).sum(0)
    torch.testing.assert_close(net[1].running_mean, mean)
    torch.testing.assert_close(net[1].running_var, variance)


def test_nothing_else_changes(net):
    data = batches()
    net(data[0][0])
    net[1].momentum = 0.3
    net[2].eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    rng = torch.get_rng_state()
    hfc.recalibrate_batch_norm(net, data)
    assert net[1].momentum == 0.3
    assert [m.training for m in net] == [True, True, False, True, True]
    assert torch.equal(torch.get_rng_state(), rng)  # dropout stayed off
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, state[k])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_a_single_last_sample_has_no_variance_and_is_left_out():
    net = nn.Sequential(nn.BatchNorm1d(3))
    data = [torch.randn(4, 3), torch.randn(4, 3), torch.randn(1, 3)]
    assert hfc.recalibrate_batch_norm(net, data) == 8
    torch.testing.assert_close(net[0].running_mean, torch.cat(data[:2]).mean(0))


def test_inputs_take_the_type_of_the_model(net):
    net(batches()[0][0])
    assert hfc.recalibrate_batch_norm(net.bfloat16(), batches()) == 60


def test_without_batch_norm_no_data_is_read(mlp):
    assert hfc.recalibrate_batch_norm(mlp, iter(())) == 0


@pytest.mark.parametrize("data", [[], [(torch.randn(2, 7, 5, 5),)]], ids=["empty", "wrong shape"])
def test_failures_leave_the_statistics_alone(net, data):
    net(batches()[0][0])
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError)):
        hfc.recalibrate_batch_norm(net, data)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_batches_of_keywords_and_bare_tensors(resnet):
    pixels = torch.randn(4, 3, 8, 8)
    assert hfc.recalibrate_batch_norm(resnet, [{"pixel_values": pixels, "labels": torch.zeros(4).long()}]) == 4
    assert hfc.recalibrate_batch_norm(resnet, [pixels], num_samples=3) == 3
