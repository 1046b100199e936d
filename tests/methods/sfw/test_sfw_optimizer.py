"""Steps of SFW against a second implementation, and what keeps weights and state sound."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from hf_compress.methods.sfw import SFW, KSparsePolytope, KSupportBall, parse_constraint
from tests.methods.sfw import reference

REGIONS = {
    "l1": ("lp", {"p": 1, "radius": 3.0}),
    "l1.5": ("lp", {"p": 1.5, "radius": 2.0}),
    "l2": ("lp", {"p": 2, "radius": 2.0}),
    "l4": ("lp", {"p": 4, "radius": 1.0}),
    "linf": ("lp", {"p": math.inf, "radius": 0.3}),
    "k_sparse": ("k_sparse", {"k": 7, "radius": 0.5}),
    "k_support": ("k_support", {"k": 7, "radius": 2.0}),
    "group": ("group_k_support", {"k": 2, "radius": 2.0}),
    "nuclear": ("nuclear", {"radius": 3.0}),
    "spectral_k_sparse": ("spectral_k_sparse", {"k": 2, "radius": 1.0}),
    "spectral_k_support": ("spectral_k_support", {"k": 2, "radius": 2.0}),
}
MODES = list(itertools.product(("none", "diameter", "gradient", "fast_gradient"), ((0.0, 0.0), (0.9, 0.0), (0.9, 0.9))))


def text_of(region, arguments):
    return f"{region}({', '.join(f'{key}={value}' for key, value in arguments.items())})"


def problem(dtype=torch.float64):
    """A weight, and gradients of least squares on other data in every step."""
    generator = torch.Generator().manual_seed(3)
    weight = 0.2 * torch.randn(6, 8, generator=generator, dtype=torch.float64)
    data = torch.randn(4, 32, 8, generator=generator, dtype=torch.float64)
    target = torch.randn(4, 32, 6, generator=generator, dtype=torch.float64)
    return weight.to(dtype), [slope_of(x.numpy(), y.numpy()) for x, y in zip(data, target, strict=True)]


def slope_of(x, y):
    """The gradient of the mean squared error, as a function of the weight."""
    return lambda w: 2 * (x @ w.T - y).T @ x / y.size


@pytest.mark.parametrize(("rescale", "momentum"), MODES, ids=str)
@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)], ids=["f32", "f64"])
def test_four_steps_equal_a_second_implementation(name, rescale, momentum, dtype, tolerance):
    region, arguments = REGIONS[name]
    weight, slopes = problem(dtype)
    mu, dampening = momentum
    wanted = reference.train(weight.numpy(), slopes, region, 0.1, mu, dampening, rescale, **arguments)
    w = weight.clone().requires_grad_()
    group = {"params": [w], "constraint": text_of(region, arguments)}
    opt = SFW([group], lr=0.1, momentum=mu, dampening=dampening, rescale=rescale)
    for slope, expected in zip(slopes, wanted, strict=True):
        w.grad = torch.from_numpy(slope(w.detach().double().numpy())).to(dtype)
        opt.step()
        np.testing.assert_allclose(w.detach().numpy(), expected, rtol=0, atol=tolerance)
    # The control: another learning rate is another way.
    other = reference.train(weight.numpy(), slopes, region, 0.11, mu, dampening, rescale, **arguments)
    assert np.abs(other[-1] - wanted[-1]).max() > 1e-4


@pytest.mark.parametrize("name", REGIONS)
def test_weights_stay_inside_and_the_gap_falls_to_zero(name):
    region, arguments = REGIONS[name]
    weight, slopes = problem()
    w = weight.clone().requires_grad_()
    opt = SFW([{"params": [w], "constraint": text_of(region, arguments)}], lr=1.0, momentum=0.0, rescale="none")
    opt.shrink_()
    opt.tracks_gap = True
    ball = opt.param_groups[0]["constraint"]
    gaps = []
    for step in range(400):
        w.grad = torch.from_numpy(slopes[0](w.detach().numpy()))
        opt.param_groups[0]["lr"] = 2 / (step + 2)
        opt.step()
        gaps.append(float(opt.gap))
        assert ball.gauge([w.detach()]) <= ball.size.value * (1 + 1e-5)
    assert min(gaps) >= -1e-9
    assert min(gaps[-50:]) < 0.05 * gaps[0]


def test_a_step_is_as_long_as_one_of_sgd():
    weight, slopes = problem()
    w = weight.clone().requires_grad_()
    opt = SFW([{"params": [w], "constraint": KSupportBall(k=9, radius=5.0)}], lr=0.01, rescale="gradient")
    for slope in slopes:
        before = w.detach().clone()
        w.grad = torch.from_numpy(slope(w.detach().numpy()))
        opt.step()
        length = (w.detach() - before).norm()
        momentum = opt.state[w]["momentum_buffer"].norm()
        torch.testing.assert_close(length, 0.01 * momentum, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("rescale", "momentum"), MODES, ids=str)
@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf, 1e-42])
def test_a_bad_gradient_leaves_weights_alone_and_poisons_nothing(name, rescale, momentum, value):
    weight, slopes = problem(torch.float32)
    w = weight.clone().requires_grad_()
    group = {"params": [w], "constraint": text_of(*REGIONS[name])}
    opt = SFW([group], lr=0.3, momentum=momentum[0], dampening=momentum[1], rescale=rescale)
    w.grad = torch.full_like(w, value) if value in (0.0, 1e-42) else torch.zeros_like(w)
    w.grad[0, 0] = value
    opt.step()
    assert torch.equal(w, weight)
    opt.tracks_gap = True
    w.grad = torch.from_numpy(slopes[0](w.detach().double().numpy())).float()
    opt.step()
    assert w.isfinite().all()
    assert not torch.equal(w, weight)
    assert opt.gap.isfinite()


@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize("scale", [1e-25, 1e18])
def test_tiny_and_huge_gradients_point_to_the_same_vertex(name, scale):
    weight, slopes = problem(torch.float32)
    gradient = torch.from_numpy(slopes[0](weight.double().numpy())).float()
    ends = []
    for factor in (1.0, scale):
        w = weight.clone().requires_grad_()
        w.grad = gradient * factor
        SFW([{"params": [w], "constraint": text_of(*REGIONS[name])}], lr=0.5, momentum=0.0, rescale="none").step()
        ends.append(w.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_one_ball_over_several_weights_is_the_ball_of_their_concatenation():
    whole, slopes = problem()
    gradient = torch.from_numpy(slopes[0](whole.numpy()))
    for text in ("k_sparse(k=7, radius=0.5)", "k_support(k=7, radius=2)", "l1(radius=3)", "l2(radius=2)"):
        one = whole.clone().requires_grad_()
        one.grad = gradient.clone()
        SFW([{"params": [one], "constraint": text}], lr=0.3).step()
        parts = [whole[:2].clone().requires_grad_(), whole[2:].clone().requires_grad_()]
        for part, piece in zip(parts, (gradient[:2], gradient[2:]), strict=True):
            part.grad = piece.clone()
        SFW([{"params": parts, "constraint": text}], lr=0.3).step()
        torch.testing.assert_close(torch.cat([p.detach() for p in parts]), one.detach(), rtol=1e-12, atol=1e-14)


def test_a_weight_without_gradient_stays_in_its_own_ball_and_counts_as_zero_in_a_common_one():
    w, idle = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    before = idle.detach().clone()
    opt = SFW([{"params": [w], "constraint": "l2(radius=1)"}, {"params": [idle], "constraint": "l2(radius=9)"}], lr=0.5)
    w.grad = torch.randn(4, 4)
    opt.step()
    assert torch.equal(idle, before)
    both = SFW([{"params": [w, idle], "constraint": "k_sparse(k=3, radius=0.2)"}], lr=0.5, rescale="none")
    both.step()
    torch.testing.assert_close(idle.detach(), before * 0.5)


@pytest.mark.parametrize("free", ["sgd", "adamw"])
def test_parameters_without_constraint_take_the_steps_of_torch(free):
    torch.manual_seed(0)
    start = [torch.randn(5), torch.randn(3, 2)]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    opt = SFW([{"params": ours, "constraint": None}], lr=0.05, free=free, weight_decay=0.1)
    kind = torch.optim.SGD if free == "sgd" else torch.optim.AdamW
    extra = {"momentum": 0.9} if free == "sgd" else {}
    other = kind(theirs, lr=0.05, weight_decay=0.1, **extra)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        opt.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_resume_is_bit_equal_and_another_region_is_refused(tmp_path):
    weight, slopes = problem(torch.float32)

    def make(w, k=7):
        groups = [{"params": [w], "constraint": KSparsePolytope(k=k, radius="weights:0.5")}]
        return SFW(groups, lr=0.3, momentum=0.9)

    def walk(w, opt, some):
        for slope in some:
            w.grad = torch.from_numpy(slope(w.detach().double().numpy())).float()
            opt.step()

    straight = weight.clone().requires_grad_()
    opt = make(straight)
    walk(straight, opt, slopes[:2])
    torch.save({"w": straight.detach(), "opt": opt.state_dict()}, tmp_path / "half.pt")
    walk(straight, opt, slopes[2:])
    half = torch.load(tmp_path / "half.pt", weights_only=True)
    # "weights:0.5" is taken of the weights of the start, so that the optimizer is made before they are replaced.
    resumed = weight.clone().requires_grad_()
    again = make(resumed)
    resumed.data.copy_(half["w"])
    again.load_state_dict(half["opt"])
    walk(resumed, again, slopes[2:])
    assert torch.equal(resumed, straight)
    with pytest.raises(ValueError, match=r"was trained in k_sparse\(k=7, .* now to be trained in k_sparse\(k=8"):
        make(weight.clone().requires_grad_(), k=8).load_state_dict(half["opt"])


@pytest.mark.parametrize(
    ("group", "settings", "message"),
    [
        ({"constraint": "k_sparse(k=21, radius=1)"}, {}, "keeps 21 entries, but the tensors that it covers have 16"),
        ({"constraint": "k_sparse(k=3, radius=0)"}, {}, "radius must be a positive number"),
        ({"constraint": "k_sparse(k=3, radius=-2)"}, {}, "radius must be"),
        ({"constraint": "k_sparse(k=3)"}, {}, "takes either radius"),
        ({"constraint": "ksparse(k=3, radius=1)"}, {}, "is no constraint; there are l1, l2, linf, lp, k_sparse"),
        ({"constraint": "l2(k=3, radius=1)"}, {}, "l2 has no argument 'k'"),
        ({"constraint": "l2(radius=1)"}, {"rescale": "none", "lr": 1.5}, "at most 1; got 1.5"),
        ({"constraint": "l2(radius=1)"}, {"lr": -0.1}, "lr must be at least 0"),
        ({"constraint": "l2(radius=1)"}, {"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ({"constraint": "l2(radius=1)"}, {"rescale": "fast"}, "rescale must be one of none, diameter"),
        ({"constraint": None}, {"free": "adam"}, "free must be one of sgd, adamw"),
        ({"constraint": "l2(radius=weights:2)", "zero": True}, {}, "the norm of the weights, which is 0"),
    ],
)
def test_wrong_settings_say_what_is_allowed(group, settings, message):
    weight = torch.randn(4, 4) * (0 if group.pop("zero", False) else 1)
    with pytest.raises(ValueError, match=message):
        SFW([{"params": [weight.requires_grad_()], **group}], **settings)


def test_a_zero_learning_rate_is_legal_and_changes_nothing():
    w = torch.randn(4, 4, requires_grad=True)
    before = w.detach().clone()
    opt = SFW([{"params": [w], "constraint": "k_support(k=3, radius=9)"}], lr=0.0)
    w.grad = torch.randn(4, 4)
    opt.step()
    assert torch.equal(w, before)
    assert parse_constraint("k_support(k=3, radius=9)") == opt.param_groups[0]["constraint"]
