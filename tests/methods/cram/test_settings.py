"""CrAM under the settings of the Trainer: half precision, compilation, checkpointed activations, refusals."""

from __future__ import annotations

import pytest
import torch

import hf_compress as hfc
from tests.conftest import image_samples, tiny_vit
from tests.methods.cram.test_trainer import config, largest_difference, train


class WithScaler(hfc.CrAMTrainer):
    """Accelerate refuses float16 on a CPU; this puts a scaler in its place, and can let a loss overflow."""

    scale = 2.0**16
    overflow = None  # (step, sweep)
    calls = 0

    def _prepare_for_training(self, *args, **kwargs):
        from accelerate.optimizer import patch_optimizer_step

        prepared = super()._prepare_for_training(*args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"
        wrapper = self.optimizer
        wrapper.scaler = self.accelerator.scaler
        wrapper._accelerate_step_called = False
        wrapper._optimizer_original_step_method = wrapper.optimizer.step
        wrapper._optimizer_patched_step_method = patch_optimizer_step(wrapper, wrapper.optimizer.step)
        return prepared

    def compute_loss(self, model, *args, **kwargs):
        loss = super().compute_loss(model, *args, **kwargs)
        if not model.training or self.overflow is None:
            return loss
        self.calls += 1
        is_now = self.state.global_step == self.overflow[0] and self.cram._is_compressed == (self.overflow[1] == 2)
        return loss * float("inf") if is_now else loss


@pytest.fixture
def reset_accelerate():
    """The pretended precision must not reach other tests of this process."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("reset_accelerate")
def test_a_scale_of_two_to_the_sixteenth_changes_no_bit(tmp_path):
    """Powers of two scale exactly; clipping is off because Accelerate's order of unscaling is its own."""
    options = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}
    plain = train(tmp_path, tiny_vit(), **options)
    scaled = train(tmp_path, tiny_vit(), WithScaler, **options)
    assert scaled.accelerator.scaler.get_scale() == 2.0**16
    assert largest_difference(plain.model, scaled.model) == 0.0


@pytest.mark.usefixtures("reset_accelerate")
@pytest.mark.parametrize("sweep", [1, 2])
def test_an_overflow_in_either_pass_skips_the_step(tmp_path, sweep):
    """The weights after step 2 are those after step 1, the scale is halved, and the run goes on."""
    weights = []

    class Overflowing(WithScaler):
        overflow = (1, sweep)

        def log(self, logs, *args, **kwargs):
            weights.append({n: p.detach().clone() for n, p in self.model.named_parameters()})
            super().log(logs, *args, **kwargs)

    trainer = train(tmp_path, tiny_vit(), Overflowing, optim="adamw_torch")
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert any(not torch.equal(weights[1][n], weights[2][n]) for n in weights[0])
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert trainer.accelerator.scaler.get_scale() == 2.0**15
    assert trainer.state.global_step == 4


@pytest.mark.parametrize(
    "options",
    [
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"gradient_checkpointing": True},
        {"optim": "adamw_torch_fused", "learning_rate": 1e-3},
    ],
    ids=["compiled", "checkpointed", "fused"],
)
def test_settings_that_change_nothing(tmp_path, options):
    plain = {"optim": "adamw_torch", "learning_rate": 1e-3} if "optim" in options else {}
    wanted = train(tmp_path, tiny_vit(), **plain).model
    found = train(tmp_path, tiny_vit(), **options)
    assert largest_difference(wanted, found.accelerator.unwrap_model(found.model)) < 2e-6


def test_bfloat16_autocast_trains_and_keeps_float32_weights(tmp_path):
    trainer = train(tmp_path, tiny_vit(), bf16=True)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert largest_difference(trainer.model, train(tmp_path, tiny_vit()).model) < 1e-2


def test_clipping_is_of_the_combined_gradient(tmp_path):
    """The norm that is logged is that of what the optimizer steps with."""
    model = tiny_vit()
    trainer = train(tmp_path, model, max_grad_norm=1e-3, max_steps=1, learning_rate=1.0)
    moved = [(a - b).detach().norm() for a, b in zip(model.parameters(), tiny_vit().parameters(), strict=True)]
    assert torch.stack(moved).norm() == pytest.approx(1e-3, rel=1e-3)
    assert trainer.state.log_history[0]["grad_norm"] > 1e-2


def test_tied_and_unused_parameters(tmp_path):
    """Weights that are used twice, and some that the second pass does not reach."""
    model = tiny_vit()
    model.vit.layers[1].mlp.fc1.weight = model.vit.layers[0].mlp.fc1.weight
    model.unused = torch.nn.Linear(4, 4)
    unused = model.unused.weight.detach().clone()
    trainer = train(tmp_path, model)
    assert trainer.model.vit.layers[1].mlp.fc1.weight is trainer.model.vit.layers[0].mlp.fc1.weight
    assert torch.equal(model.unused.weight, unused)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda t: setattr(t, "is_deepspeed_enabled", True), "DeepSpeed keeps to itself"),
        (lambda t: setattr(t, "is_fsdp_enabled", True), "FSDP1 flattens"),
        (lambda t: setattr(t.model, "is_quantized", True), "are quantized; load it without"),
        (lambda t: setattr(t.args, "optim", "lomo"), "steps inside the backward pass"),
        (lambda t: setattr(t.args, "optim", "galore_adamw_layerwise"), "steps inside the backward pass"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path, prepare, message):
    trainer = hfc.CrAMTrainer(model=tiny_vit(), args=config(tmp_path), train_dataset=image_samples())
    prepare(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.create_optimizer()
