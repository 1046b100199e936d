"""The CrAM wrapper in a bare loop, against a second implementation written from the formulas."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import hf_compress as hfc
from hf_compress.methods.cram import CrAM
from tests.methods.cram.reference import OPTIMIZERS, data, loss_of, make_net, reference_step


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize(("plus", "mask_gradient"), list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("text", ["unstructured:0.7", "unstructured:0.6:layer", "2:4", "int8", "2:4+int8", None])
def test_four_steps_equal_the_formulas(net, optimizer, plus, mask_gradient, text):
    ours, theirs = make_net(net), make_net(net)
    patterns = [text] if text else []
    opt = CrAM(
        OPTIMIZERS[optimizer](ours.parameters()), ours, patterns, rho=0.05, plus=plus, mask_gradient=mask_gradient
    )
    other = OPTIMIZERS[optimizer](theirs.parameters())
    for batch in data():
        loss_of(ours, batch).backward()
        with opt.compressed():
            loss_of(ours, batch).backward()
        opt.step()
        opt.zero_grad()
        reference_step(theirs, other, batch, text, 0.05, plus, mask_gradient)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"plus_reduction": "mean"}, {"mean": True}),
        ({"normalize": True}, {"normalize": True}),
        ({"normalize": True, "plus": False, "patterns": []}, {"normalize": True, "plus": False, "text": None}),
        ({"patterns": ["2:4", "unstructured:0.7"]}, {"text": ["2:4", "unstructured:0.7"]}),
        ({"every": 2}, {}),
    ],
    ids=["mean", "normalised", "SAM", "mix", "every second step"],
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_options_equal_the_formulas(optimizer, options, reference):
    ours, theirs = make_net("cnn"), make_net("cnn")
    opt = CrAM(OPTIMIZERS[optimizer](ours.parameters()), ours, **{"patterns": ["2:4"], "rho": 0.05, **options})
    other = OPTIMIZERS[optimizer](theirs.parameters())
    arguments = {"text": "2:4", "rho": 0.05, "plus": True, "mask_gradient": True, **reference}
    drawn = set()
    for i, batch in enumerate(data(6)):
        text = arguments["text"]
        if isinstance(text, list):
            text = str(opt.pattern)
            drawn.add(text)
        loss_of(ours, batch).backward()
        with opt.compressed():
            loss_of(ours, batch).backward()
        opt.step()
        opt.zero_grad()
        if options.get("every", 1) == 2 and i % 2:
            loss_of(theirs, batch).backward()
            other.step()
            other.zero_grad()
        else:
            reference_step(theirs, other, batch, **{**arguments, "text": text})
    assert not isinstance(arguments["text"], list) or drawn == set(arguments["text"])
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


def test_half_precision_weights_are_selected_in_float32():
    """rho * g is below half a step of bfloat16 here, and still decides."""
    net = nn.Linear(64, 64, bias=False).bfloat16()
    with torch.no_grad():
        net.weight.fill_(1.0)
    opt = CrAM(torch.optim.SGD(net.parameters(), lr=0.0), net, ["unstructured:0.5"], rho=1e-4)
    gradient = torch.randn(64, 64).bfloat16()
    net.weight.grad = gradient.clone()
    kept = hfc.Unstructured(0.5).masks({"w": 1.0 + 1e-4 * gradient.float()})["w"]
    with opt.compressed():
        assert torch.equal(net.weight != 0, kept)
    assert net.weight.eq(1).all()


def test_copies_pickles_and_hooks_are_those_of_an_optimizer():
    import pickle

    net = make_net("mlp")
    opt = CrAM(OPTIMIZERS["adamw"](net.parameters()), net, ["unstructured:0.5"])
    calls = []
    opt.register_step_post_hook(lambda *_: calls.append("step"))
    opt.register_state_dict_pre_hook(lambda *_: calls.append("state"))
    for twin in (copy.deepcopy(opt), opt):
        loss_of(twin.model, data()[0]).backward()
        with twin.compressed():
            loss_of(twin.model, data()[0]).backward()
        twin.step()
        twin.state_dict()
    assert calls.count("step") >= 1
    assert "state" in calls
    bare = CrAM(OPTIMIZERS["adamw"](net.parameters()), net, ["2:4"])
    assert str(pickle.loads(pickle.dumps(bare)).pattern) == "2:4"
    assert not hasattr(bare, "train")


@pytest.mark.parametrize("plus", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_ascent_and_pattern_it_is_the_wrapped_optimizer_bit_for_bit(optimizer, plus):
    ours, theirs = make_net("cnn"), make_net("cnn")
    opt = CrAM(OPTIMIZERS[optimizer](ours.parameters()), ours, patterns=[], rho=0.0, plus=plus)
    other = OPTIMIZERS[optimizer](theirs.parameters())
    for batch in data():
        loss_of(ours, batch).backward()
        with opt.compressed():
            loss_of(ours, batch).backward()
        opt.step()
        opt.zero_grad()
        loss_of(theirs, batch).backward()
        other.step()
        other.zero_grad()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_inside_the_block_weights_are_the_compressed_perturbed_ones():
    net = make_net("cnn")
    opt = CrAM(torch.optim.SGD(net.parameters(), lr=0.1), net, ["unstructured:0.6"], rho=0.3)
    loss_of(net, data()[0]).backward()
    expected = copy.deepcopy(net)
    with torch.no_grad():
        for p, q in zip(expected.parameters(), net.parameters(), strict=True):
            p.add_(q.grad, alpha=0.3)
    hfc.compress(expected, "unstructured:0.6")
    with opt.compressed() as pattern:
        assert str(pattern) == "unstructured:0.6"
        for p, q in zip(expected.parameters(), net.parameters(), strict=True):
            assert torch.equal(p, q)


class Failure(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_weights_come_back_bit_for_bit(fails):
    net = make_net("cnn")
    opt = CrAM(torch.optim.SGD(net.parameters(), lr=0.0), net, ["unstructured:0.9", "2:4"], rho=10.0)
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in net.named_parameters()}
    for batch in data():
        loss_of(net, batch).backward()
        try:
            with opt.compressed():
                loss_of(net, batch).backward()
                if fails:
                    raise Failure
        except Failure:
            pass
        for name, parameter in net.named_parameters():
            assert parameter.data_ptr() == before[name][0]
            assert torch.equal(parameter, before[name][1])
            assert not parameter._backward_hooks
        assert net[1].track_running_stats
        opt.step()  # a failed block is over: nothing is locked
        opt.zero_grad()


def test_batch_norm_counts_a_batch_once():
    ours, plain = make_net("cnn"), make_net("cnn")
    opt = CrAM(torch.optim.SGD(ours.parameters(), lr=0.0), ours, ["unstructured:0.9"])
    for batch in data():
        loss_of(ours, batch).backward()
        with opt.compressed():
            loss_of(ours, batch).backward()
        opt.step()
        opt.zero_grad()
        plain(batch[0])
    assert ours[1].num_batches_tracked == 4
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, ours.get_buffer(name))


def test_instance_norms_count_a_batch_once_too():
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    ours = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(16, 2))
    plain, x = copy.deepcopy(ours), torch.randn(4, 3, 4, 4)
    opt = CrAM(torch.optim.SGD(ours.parameters(), lr=0.0), ours, ["unstructured:0.9"])
    ours(x).square().sum().backward()
    with opt.compressed():
        ours(x).square().sum().backward()
    plain(x)
    assert ours[1].momentum == 0.1
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, ours.get_buffer(name))


def test_a_parameter_whose_first_gradient_is_the_second_counts_in_the_mean():
    net = make_net("mlp")
    late = nn.Parameter(torch.ones(()))
    opt = CrAM(torch.optim.SGD([*net.parameters(), late], lr=0.1), net, ["unstructured:0.5"], plus_reduction="mean")
    loss_of(net, data()[0]).backward()
    with opt.compressed():
        (2 * late).backward()
    assert late.grad == 1


def test_a_weight_that_another_name_shares_is_compressed():
    net = make_net("mlp")
    tied = nn.Module()
    tied.early, tied.net = net[1].weight, net
    opt = CrAM(torch.optim.SGD(tied.parameters(), lr=0.1), tied, ["unstructured:0.9"])
    loss_of(net, data()[0]).backward()
    with opt.compressed():
        assert (net[1].weight == 0).float().mean() > 0.5


def test_draws_depend_on_seed_and_step_alone_and_reach_every_pattern():
    patterns = ["unstructured:0.5", "unstructured:0.7", "2:4"]
    drawn = {}
    for seed in (0, 1):
        net = make_net("mlp")
        opt = CrAM(torch.optim.SGD(net.parameters(), lr=0.0), net, patterns, seed=seed)
        drawn[seed] = []
        for batch in data(60):
            torch.randn(3)  # the global generator plays no part
            drawn[seed].append(str(opt.pattern))
            assert drawn[seed][-1] == str(opt.pattern)
            loss_of(net, batch).backward()
            opt.step()
            opt.zero_grad()
        assert set(drawn[seed]) == set(patterns)
    assert drawn[0] != drawn[1]
    assert min(drawn[0].count(p) for p in patterns) >= 10


def test_state_is_the_wrapped_optimizers_and_the_step():
    runs = []
    for interrupted in (False, True):
        net = make_net("mlp")
        opt = CrAM(OPTIMIZERS["adamw"](net.parameters()), net, ["unstructured:0.5", "2:4"], rho=0.1)
        for i, batch in enumerate(data(6)):
            if interrupted and i == 3:
                saved = copy.deepcopy((net.state_dict(), opt.state_dict()))
                net = make_net("mlp")
                opt = CrAM(OPTIMIZERS["adamw"](net.parameters()), net, ["unstructured:0.5", "2:4"], rho=0.1)
                net.load_state_dict(saved[0])
                opt.load_state_dict(saved[1])
            loss_of(net, batch).backward()
            with opt.compressed():
                loss_of(net, batch).backward()
            opt.step()
            opt.zero_grad()
        runs.append(net.state_dict())
        state, inner = opt.state_dict(), opt.optimizer.state_dict()
        assert state.pop("step") == 6
        assert state.keys() == inner.keys()
        assert opt.param_groups is opt.optimizer.param_groups
        assert opt.state is opt.optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values(), strict=True))


def test_state_goes_through_a_safe_load(tmp_path):
    net = make_net("mlp")
    opt = CrAM(OPTIMIZERS["adamw"](net.parameters()), net)
    loss_of(net, data()[0]).backward()
    opt.step()
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    opt.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    opt.load_state_dict(opt.optimizer.state_dict())  # of a run without CrAM
    assert opt.state_dict()["step"] == 0


def test_schedulers_clipping_and_groups_work_as_with_any_optimizer():
    net = make_net("mlp")
    groups = [{"params": net[1].parameters(), "lr": 0.5}, {"params": net[3].parameters()}]
    opt = CrAM(torch.optim.SGD(groups, lr=0.1), net, ["unstructured:0.5"])
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, start_factor=1.0, end_factor=0.1, total_iters=4)
    for batch in data():
        loss_of(net, batch).backward()
        with opt.compressed():
            loss_of(net, batch).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        scheduler.step()
        opt.zero_grad()
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([0.05, 0.01])
    assert isinstance(opt, torch.optim.Optimizer)
    assert "SGD" in repr(opt.optimizer)


def test_the_threshold_is_over_all_groups_and_frozen_targets_count():
    net = make_net("mlp")
    net[3].weight.requires_grad_(False)
    opt = CrAM(torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1), net, ["unstructured:0.5"])
    before = net[3].weight.clone()
    loss_of(net, data()[0]).backward()
    with opt.compressed():
        zeros = sum(int((net[i].weight == 0).sum()) for i in (1, 3))
        assert zeros == (net[1].weight.numel() + net[3].weight.numel()) // 2
        loss_of(net, data()[0]).backward()
    assert torch.equal(net[3].weight, before)


def test_parameters_unused_in_the_second_pass_keep_the_first_gradient():
    net = make_net("mlp")
    opt = CrAM(torch.optim.SGD(net.parameters(), lr=0.1), net, ["unstructured:0.5"])
    loss_of(net, data()[0]).backward()
    first, weights = net[1].weight.grad.clone(), net[1].weight.detach().clone()
    with opt.compressed():
        pass
    assert torch.equal(net[1].weight.grad, first)
    assert torch.equal(net[1].weight, weights)


def test_a_scaled_gradient_gives_the_same_step():
    states = []
    for scale in (1.0, 2.0**16):
        net = make_net("cnn")
        opt = CrAM(torch.optim.SGD(net.parameters(), lr=0.1), net, ["unstructured:0.5"], rho=0.1)
        for batch in data():
            (loss_of(net, batch) * scale).backward()
            with opt.compressed(grad_scale=scale):
                (loss_of(net, batch) * scale).backward()
            for parameter in net.parameters():
                parameter.grad /= scale
            opt.step()
            opt.zero_grad()
        states.append(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_wrong_use():
    net = make_net("mlp")
    opt = CrAM(torch.optim.SGD(net.parameters(), lr=0.1), net)
    with pytest.raises(RuntimeError, match="needs gradients: call backward"), opt.compressed():
        pass
    loss_of(net, data()[0]).backward()
    with opt.compressed():
        with pytest.raises(RuntimeError, match="entered twice"), opt.compressed():
            pass
        with pytest.raises(RuntimeError, match="leave the block first"):
            opt.step()


@pytest.mark.parametrize(
    ("options", "message"), [({"every": 0}, "every must be"), ({"plus_reduction": "max"}, "must be 'sum' or 'mean'")]
)
def test_wrong_options(mlp, options, message):
    with pytest.raises(ValueError, match=message):
        CrAM(torch.optim.SGD(mlp.parameters(), lr=0.1), mlp, **options)


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf"), "0.1", None, [1]])
def test_wrong_rho(mlp, rho):
    with pytest.raises(ValueError, match="rho must be a finite number"):
        CrAM(torch.optim.SGD(mlp.parameters(), lr=0.1), mlp, rho=rho)


def test_nothing_to_compress(mlp):
    for parameter in mlp.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no weight of Sequential .* is trained"):
        CrAM(torch.optim.SGD(mlp.parameters(), lr=0.1), mlp)


def test_nan_gradients_restore_the_weights():
    net = make_net("mlp")
    opt = CrAM(torch.optim.SGD(net.parameters(), lr=0.1), net, ["unstructured:0.5"])
    before = [p.detach().clone() for p in net.parameters()]
    (loss_of(net, data()[0]) * float("nan")).backward()
    with pytest.raises(ValueError, match="a weight is NaN"), opt.compressed():
        pass
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
