"""SFW-Init: slopes against finite differences, the loss after one step, and what it leaves alone."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import cross_entropy

from hf_compress.methods.sfw import create_sfw, init
from hf_compress.methods.sfw.init import sfw_init
from tests.conftest import tiny_resnet
from tests.methods.sfw.test_sfw_trainer import train

REGION = "k_support(k=0.3, radius=3)"


def net(dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.5), nn.Linear(12, 4))
    return layers.to(dtype)


def batches(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    while True:
        x = torch.randn(16, 6, generator=generator, dtype=dtype)
        yield x, (x[:, :4]).argmax(1)


def loss(model, batch):
    x, y = batch
    return cross_entropy(model(x), y)


def loss_after_one_step(model, opt, scales, batches_of_step, vertices=None):
    """Written down once more: scale, one step of SFW from b0 and b1, the loss on b0 and b2."""
    b0, b1, b2 = batches_of_step
    before, after = (tuple(map(torch.cat, zip(b0, other, strict=True))) for other in (b1, b2))
    weights = [g["params"][0] for g in opt.param_groups if g["constraint"] is not None]
    regions = [g["constraint"] for g in opt.param_groups if g["constraint"] is not None]
    kept = [w.detach().clone() for w in weights]
    model.train()
    model[3].eval()
    norm = model[1]
    norm.track_running_stats = False
    with torch.no_grad():
        for w, scale in zip(weights, scales, strict=True):
            w.mul_(scale)
    gradients = torch.autograd.grad(loss(model, before), weights)
    if vertices is None:
        vertices = [c.lmo([g])[0] for c, g in zip(regions, gradients, strict=True)]
    with torch.no_grad():
        for w, g, v in zip(weights, gradients, vertices, strict=True):
            w.lerp_(v, min(float(opt.param_groups[0]["lr"] * g.norm() / (w - v).norm()), 1.0))
        value = float(loss(model, after))
        for w, old in zip(weights, kept, strict=True):
            w.copy_(old)
    norm.track_running_stats = True
    return value, vertices


def test_slopes_are_those_of_finite_differences():
    model = net()
    opt = create_sfw(model, REGION, lr=0.5, shrink=False)
    three = list(itertools.islice(batches(), 3))
    groups = [g for g in opt.param_groups if g["constraint"] is not None]
    weights = {g["param_names"][0]: g["params"][0] for g in groups}
    names = {id(p): n for n, p in weights.items()}
    pairs = [(three[0], three[1]), (three[0], three[2])]
    with init._measuring(model):
        slopes = init._slopes(model, groups, weights, loss, *pairs, names)
    _, vertices = loss_after_one_step(model, opt, [1.0, 1.0], three)
    for i, slope in enumerate(slopes.tolist()):
        up, down = ([1.0 + (h if j == i else 0.0) for j in range(2)] for h in (1e-6, -1e-6))
        values = [loss_after_one_step(model, opt, scales, three, vertices)[0] for scales in (up, down)]
        assert slope == pytest.approx((values[0] - values[1]) / 2e-6 / 0.5, rel=1e-4)


def test_the_loss_after_one_step_falls_and_directions_stay():
    model = net()
    opt = create_sfw(model, REGION, lr=0.5, shrink=False)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    statistics = {n: b.clone() for n, b in model.named_buffers()}
    three = list(itertools.islice(batches(), 3))
    before, _ = loss_after_one_step(model, opt, [1.0, 1.0], three)
    model.train()
    scales = sfw_init(model, opt, itertools.cycle(three), loss, steps=100, lr=0.01)
    after, _ = loss_after_one_step(model, opt, [1.0, 1.0], three)
    assert after < before - 0.01
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, start[name] * scales.get(name, 1.0))
    assert set(scales) == {"0.weight", "4.weight"}
    assert all(scale >= 0.01 and scale != 1 for scale in scales.values())
    assert all(torch.equal(b, statistics[n]) for n, b in model.named_buffers())
    assert all(module.training for module in model.modules() if module is not model[3])
    assert not opt.state


def test_a_weight_without_gradient_stays_where_it_is():
    model = net()
    nn.init.zeros_(model[1].weight)  # as the last norm of a residual branch: nothing before it has a gradient
    nn.init.constant_(model[1].bias, 0.5)
    opt = create_sfw(model, REGION, lr=0.5, shrink=False)
    first = model[0].weight.detach().clone()
    scales = sfw_init(model, opt, batches(), loss, steps=3, lr=0.01)
    assert scales["0.weight"] == 1
    assert torch.equal(model[0].weight, first)
    assert scales["4.weight"] != 1


def test_a_weight_of_zeros_stays_where_it_is_beside_others_in_its_ball():
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    nn.init.zeros_(model[2].weight)
    opt = create_sfw(model, "group_k_support", k=0.5, radius=3, group_by="neurons", include=["*"], lr=0.5, shrink=False)
    assert [g["param_names"] for g in opt.param_groups[:2]] == [["0.weight", "2.weight"], ["4.weight"]]
    scales = sfw_init(model, opt, batches(), loss, steps=3, lr=0.01)
    assert set(scales) == {"0.weight", "4.weight"}
    assert not model[2].weight.any()
    assert scales["4.weight"] != 1


def test_batches_of_different_lengths_count_by_their_samples():
    """As of a text collator that pads to the longest: the slopes are those of the same samples in batches alike."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x, y = torch.randn(9, 2, 6, dtype=torch.float64), torch.randint(0, 4, (9,))

    def padded(batch, length):
        return functional.pad(batch, (0, 0, 0, length - batch.shape[1])), y[: len(batch)]

    def mean_loss(called, batch):  # padding has no say
        return cross_entropy(called(batch[0][:, :2]).mean(1), batch[1])

    scales = []
    for lengths in ((2, 2, 2), (2, 5, 3)):
        net = copy.deepcopy(model)
        opt = create_sfw(net, REGION, lr=0.5, shrink=False, include=["*"])
        parts = zip((x[:3], x[:4], x[:9]), lengths, strict=True)
        scales.append(sfw_init(net, opt, iter([padded(*part) for part in parts]), mean_loss, 1, 0.1))
    assert scales[0] == pytest.approx(scales[1], abs=1e-12)
    assert set(scales[0].values()) != {1.0}


def test_a_weight_that_the_loss_does_not_use_stays_where_it_is():
    model = net()
    model[2].add_module("unused", nn.Linear(3, 3).double())  # in a tanh, which calls nothing
    opt = create_sfw(model, REGION, lr=0.5, shrink=False, include=["*"])
    scales = sfw_init(model, opt, batches(), loss, 2)
    assert scales["2.unused.weight"] == 1.0
    assert scales["0.weight"] != 1.0


def test_too_few_batches_and_a_broken_loss_are_named():
    model = net()
    opt = create_sfw(model, REGION, shrink=False)
    with pytest.raises(ValueError, match="needs 12 batches, they ended in iteration 2"):
        sfw_init(model, opt, itertools.islice(batches(), 4), loss, steps=4)
    with pytest.raises(ValueError, match="not finite in iteration 1"):
        sfw_init(model, opt, batches(), lambda m, b: loss(m, b) * float("nan"), steps=4)


def test_the_trainer_learns_scales_before_it_trains(tmp_path):
    runs = [train(tmp_path / str(i), tiny_resnet(), radius="init:20", sfw_init_steps=5) for i in range(2)]
    plain = train(tmp_path / "plain", tiny_resnet(), radius="init:20")
    states = [run.model.state_dict() for run in (*runs, plain)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])  # the seed decides all
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    again = train(tmp_path / "same", tiny_resnet(), radius="init:20", sfw_init_steps=5, sfw_init_learning_rate=1e-12)
    # With scales of 1 the training is the one without SFW-Init: its batches and random numbers are not touched.
    for name, value in again.model.state_dict().items():
        torch.testing.assert_close(value, states[2][name], rtol=1e-4, atol=1e-5)
