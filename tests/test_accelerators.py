"""What shows on accelerators alone, as far as a CPU, tensors without numbers and settings can show it."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hf_compress as hfc
from hf_compress.family.footprint import count_macs
from hf_compress.methods.cram import CrAM
from hf_compress.methods.lilnetx import LilNetXConfig, latent_layers, reparametrize
from hf_compress.methods.lilnetx.regularization import Regularization
from hf_compress.methods.sfw import SFW, KSparsePolytope, create_sfw
from hf_compress.methods.sfw.init import sfw_init
from hf_compress.selection import _is_for_the_cpu
from tests.conftest import image_samples, text_samples, tiny_bert, tiny_resnet
from tests.methods.cram.test_trainer import config


def sgd_trainer(folder):
    arguments = config(folder, max_steps=1, optim="sgd", optim_args="momentum=0.9")
    return hfc.CrAMTrainer(model=tiny_resnet(), args=arguments, train_dataset=image_samples())


def test_sgd_is_not_fused_where_losses_are_scaled(tmp_path):
    """Its kernel leaves unset memory as momentum where the first step overflows."""
    trainer = sgd_trainer(tmp_path)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    assert not trainer.create_optimizer().defaults["fused"]


def test_fused_sgd_takes_weights_whose_first_gradient_comes_late(tmp_path):
    optimizer = sgd_trainer(tmp_path).create_optimizer()
    fused = [p for group in optimizer.param_groups for p in group["params"]]
    plain = [p.detach().clone() for p in fused]
    left = iter(plain)
    parts = [list(itertools.islice(left, len(group["params"]))) for group in optimizer.param_groups]
    groups = [{**g, "params": part, "fused": False} for g, part in zip(optimizer.param_groups, parts, strict=True)]
    reference = torch.optim.SGD(groups)
    for step in range(3):
        for i, (a, b) in enumerate(zip(fused, plain, strict=True)):
            a.grad = torch.full_like(a, step + 1.0) if step or i % 2 else None
            b.grad = None if a.grad is None else a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a.detach(), b)


def test_sfw_takes_weights_whose_first_gradient_comes_late():
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = SFW([{"params": weights, "constraint": None}], lr=0.1, momentum=0.9)
    for step in range(2):
        weights[0].grad = torch.ones(3)
        weights[1].grad = torch.ones(3) if step else None
        optimizer.step()
    assert [round(float(w.detach()[0]), 4) for w in weights] == [0.71, 0.9]


def test_a_step_that_overflows_leaves_lilnetx_whole():
    """As under a scaler of gradients: infinite in the first step, which is left out, and finite from then on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    reparametrize(model)
    args = LilNetXConfig("out", use_cpu=True, entropy_fit_steps=0)
    terms, state = Regularization(model, args), SimpleNamespace(max_steps=40, num_train_epochs=4, global_step=0)
    terms.on_train_begin(args, state, None)
    latents, ratios = [layer.latent for layer in latent_layers(model)], []
    for step in range(12):
        state.global_step = step
        model.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        if step == 0:
            latents[0].grad[0, 0] = torch.inf
        task = torch.stack([latent.grad.norm() for latent in latents]).norm()
        terms.on_pre_optimizer_step(args, state, None)
        is_left_out = step == 0
        assert is_left_out or all(latent.grad.isfinite().all() for latent in latents)
        ratios.append(float(terms.logs()["rate_ratio"]))
        if step == 1:  # the first that counts gives the weight
            assert float(terms.rate_weight) > 0
            assert 2 * terms._numbers["task_norm"] == pytest.approx(float(task), rel=1e-5)
            assert ratios[-1] == pytest.approx(args.rate_ratio, rel=1e-5)
    assert all(ratio == ratio for ratio in ratios)


class TwoReplicas(nn.DataParallel):
    """What DataParallel does with two devices, on a CPU."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module

    def forward(self, **inputs):
        parts = {k: v.chunk(2) if isinstance(v, torch.Tensor) else (v, v) for k, v in inputs.items()}
        first, second = (self.module(**{k: v[i] for k, v in parts.items()}) for i in range(2))
        join = {k: (torch.stack if v.ndim == 0 else torch.cat)((v, second[k])) for k, v in first.items()}
        return type(first)(join)


@pytest.mark.parametrize(("trainer", "options"), [(hfc.CrAMTrainer, hfc.CrAMConfig), (hfc.SFWTrainer, hfc.SFWConfig)])
def test_several_devices_without_a_launcher(trainer, options, tmp_path, monkeypatch):
    arguments = options(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[], logging_steps=1
    )
    built = trainer(model=tiny_bert(), args=arguments, train_dataset=text_samples())
    arguments._n_gpu = 2
    monkeypatch.setattr(nn, "DataParallel", TwoReplicas)
    built.train()
    losses = [row["loss"] for row in built.state.log_history if "loss" in row]
    assert isinstance(built.model_wrapped, TwoReplicas)
    assert len(losses) == 2
    assert all(loss == pytest.approx(math.log(3), abs=0.1) for loss in losses)  # and not twice that


@pytest.mark.parametrize("precision", ["tf32", "ieee", "none"])
def test_filters_are_removed_whatever_the_precision_of_products(precision):
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = precision
    try:
        found = [torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision]
        report = hfc.compress(tiny_resnet(), "filters:0.5", remove=True, example_inputs=torch.randn(1, 3, 16, 16))
        assert report.parameters_removed > 0
        assert found == [torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision]
    finally:
        torch.backends.fp32_precision = before


def test_the_count_of_steps_is_resumed_beside_its_weight():
    """The Trainer loads optimizers to the CPU, and torch leaves the count there."""
    regions = [{"params": [nn.Parameter(torch.ones(4))], "constraint": None, "free": "adamw"}]
    optimizer = SFW(regions, lr=0.1)
    regions[0]["params"][0].grad = torch.ones(4)
    optimizer.step()
    elsewhere = SFW([{**regions[0], "params": [nn.Parameter(torch.ones(4, device="meta"))]}], lr=0.1)
    elsewhere.load_state_dict(optimizer.state_dict())
    (state,) = elsewhere.state.values()
    assert {name: value.device.type for name, value in state.items()} == dict.fromkeys(state, "meta")


def test_one_autocast_around_both_passes():
    """Autocast keeps copies of weights in half precision, which do not follow edits in place."""
    losses = {}
    for is_around in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
        cram = CrAM(torch.optim.SGD(model.parameters(), lr=0.1), model, ["unstructured:0.9"], rho=0.5)
        x, found = torch.randn(16, 32), []
        around, inside = (torch.autocast("cpu", torch.bfloat16, enabled=on) for on in (is_around, True))

        def loss(model=model, x=x, found=found, inside=inside):
            with inside:
                value = model(x).float().square().mean()
            found.append(value.item())
            return value

        with around:
            loss().backward()
            with cram.compressed():
                loss().backward()
            loss()
        losses[is_around] = found
    assert losses[True] == losses[False]
    assert losses[True][0] == losses[True][2] != losses[True][1]


def test_sfw_init_with_the_default_attention():
    model = tiny_bert()
    assert model.config._attn_implementation == "sdpa"
    optimizer = create_sfw(model, "k_support", k=0.3, radius=3.0)
    batch = {name: torch.stack([sample[name] for sample in text_samples()[:4]]) for name in text_samples()[0]}
    found = sfw_init(model, optimizer, itertools.repeat(batch), lambda model, batch: model(**batch).loss, steps=2)
    assert len(found) > 0


def test_weights_of_several_devices():
    here, there = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4, device="meta"))
    assert _is_for_the_cpu([here, there], 32)
    assert not _is_for_the_cpu([there, there], 32)
    with pytest.raises(ValueError, match=r"lie on cpu, meta; scope='tensor'"):
        SFW([{"params": [here, there], "constraint": KSparsePolytope(3, 1.0)}])
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].to("meta")
    with pytest.raises(ValueError, match=r"layers on cpu, meta cannot share a decoder"):
        reparametrize(model)


def test_multiplications_of_attention_are_counted_on_every_device():
    """Fused attention of a CPU is unknown to the counter, and that of a GPU is not."""

    class Net(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert count_macs(Net(), {"x": torch.randn(3, 2, 5, 8)}) == 2 * 3 * 2 * 5 * 5 * 8
