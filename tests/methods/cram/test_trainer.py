"""CrAM in the Trainer: accumulation, batch norm, logging, resume, and classes of the user's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

import hf_compress as hfc
from hf_compress.methods.cram import CrAM
from tests.conftest import ROOT, image_samples, text_samples, tiny_bert, tiny_resnet, tiny_vit

WORKER = Path(__file__).parents[2] / "distributed" / "train_tiny.py"


def config(folder, **overrides):
    fields = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 16,
        "learning_rate": 0.05,
        "optim": "sgd",
        "patterns": ["unstructured:0.5", "2:4"],
        "rho": 0.1,
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return hfc.CrAMConfig(**{**fields, **overrides})


def train(folder, model, trainer_class=hfc.CrAMTrainer, **overrides):
    trainer = trainer_class(model=model, args=config(folder, **overrides), train_dataset=image_samples())
    trainer.train()
    return trainer


def largest_difference(a, b):
    states = a.state_dict(), b.state_dict()
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(*(s.values() for s in states), strict=True))


class LastBatchOnly(hfc.CrAMTrainer):
    """The mistake that the accumulation test must see: the second sweep replays one micro-batch only."""

    def get_batch_samples(self, *args, **kwargs):
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._window = batches[-1:]
        return batches, num_items


@pytest.mark.parametrize("steps", [4, 2])
def test_accumulation_equals_one_large_batch(tmp_path, steps):
    whole = train(tmp_path, tiny_vit()).model
    parts = {"per_device_train_batch_size": 16 // steps, "gradient_accumulation_steps": steps}
    assert largest_difference(whole, train(tmp_path, tiny_vit(), **parts).model) < 1e-6
    assert largest_difference(whole, train(tmp_path, tiny_vit(), LastBatchOnly, **parts).model) > 1e-5


def test_a_head_that_ignores_the_number_of_items_is_corrected(tmp_path, caplog):
    """transformers#47688: the stock loop multiplies the loss of this head by the accumulation steps."""
    models, losses, warned = {}, {}, {}
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    for name, options in {"whole": {}, "parts": parts, "stock": {**parts, "check_loss_scaling": False}}.items():
        trainer = hfc.CrAMTrainer(model=tiny_bert(), args=config(tmp_path, **options), train_dataset=text_samples())
        caplog.clear()
        trainer.train()
        warned[name] = "ignores num_items_in_batch" in caplog.text
        models[name], losses[name] = trainer.model, trainer.state.log_history[0]["loss"]
    assert warned == {"whole": False, "parts": True, "stock": False}  # only where something is corrected
    assert largest_difference(models["whole"], models["parts"]) < 1e-6
    assert losses["parts"] == pytest.approx(losses["whole"], abs=1e-3)
    assert losses["stock"] == pytest.approx(4 * losses["whole"], abs=1e-2)
    assert largest_difference(models["whole"], models["stock"]) > 1e-3


def test_a_head_that_divides_by_them_is_left_alone(tmp_path):
    trainer = train(tmp_path, tiny_vit())
    assert trainer.model_accepts_loss_kwargs


def test_the_second_gradient_on_a_share_of_the_batch(tmp_path):
    """The compressed loss is that of the first samples, divided by as many."""
    sizes = []

    class Watching(hfc.CrAMTrainer):
        def compute_loss(self, model, inputs, *args, num_items_in_batch=None, **kwargs):
            if model.training:
                sizes.append((len(inputs["labels"]), int(num_items_in_batch)))
            return super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)

    train(tmp_path, tiny_vit(), Watching, second_share=0.3, max_steps=2)
    assert sizes == [(16, 16), (5, 5)] * 2
    with pytest.raises(ValueError, match="second_share must be above 0"):
        config(tmp_path, second_share=0.0)


def test_every_second_step(tmp_path):
    steps = []

    class Watching(hfc.CrAMTrainer):
        def _second_sweep(self, *args):
            steps.append(self.state.global_step)
            super()._second_sweep(*args)

    trainer = train(tmp_path, tiny_vit(), Watching, every=2)
    assert steps == [0, 2]
    assert ["compressed_loss" in row for row in trainer.state.log_history if "loss" in row] == [True, False] * 2


def test_the_best_model_is_loaded_whole(tmp_path):
    """The stock Trainer leaves weights as they are whose names on disk are not the live ones (transformers#43701)."""
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    schedule = {"save_steps": 1, "eval_steps": 1, "metric_for_best_model": "first", "greater_is_better": True}
    steps = iter([1.0, 0.0, 0.0, 0.0])
    trainer = hfc.CrAMTrainer(
        model=tiny_vit(),
        args=config(tmp_path, **options, **schedule),
        train_dataset=image_samples(),
        eval_dataset=image_samples(),
        compute_metrics=lambda _: {"first": next(steps)},
    )
    trainer.train()
    best = type(trainer.model).from_pretrained(tmp_path / "checkpoint-1")
    last = type(trainer.model).from_pretrained(tmp_path / "checkpoint-4")
    assert largest_difference(trainer.model, best) == 0.0
    assert largest_difference(trainer.model, last) > 1e-3


def test_an_incomplete_checkpoint_is_not_resumed(tmp_path):
    from safetensors.torch import load_file, save_file

    train(tmp_path, tiny_vit(), save_strategy="steps", save_steps=2)
    weights = tmp_path / "checkpoint-2" / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop("vit.embeddings.cls_token")
    save_file(tensors, weights, {"format": "pt"})
    trainer = hfc.CrAMTrainer(model=tiny_vit(), args=config(tmp_path), train_dataset=image_samples())
    with pytest.raises(ValueError, match=r"checkpoint-2 is incomplete: it lacks 1 weights, first vit\.embeddings"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_an_uneven_last_window_replays_what_it_has(tmp_path):
    """48 samples in windows of 4 x 5: the last window of the epoch has two batches, the last batch three samples."""
    windows = []

    class Watching(hfc.CrAMTrainer):
        def _second_sweep(self, *args):
            windows.append([len(batch["labels"]) for batch in self._window])
            super()._second_sweep(*args)

    train(tmp_path, tiny_vit(), Watching, per_device_train_batch_size=5, gradient_accumulation_steps=4, max_steps=3)
    assert windows == [[5] * 4, [5] * 4, [5, 3]]


def test_batch_norm_at_learning_rate_zero_is_that_of_a_plain_run(tmp_path):
    """Weights and statistics: a batch is counted once, and compressed activations are not counted."""
    states = []
    for trainer_class, args in (
        (hfc.CrAMTrainer, config(tmp_path, learning_rate=0.0, gradient_accumulation_steps=2)),
        (
            Trainer,
            TrainingArguments(
                str(tmp_path),
                max_steps=4,
                per_device_train_batch_size=16,
                learning_rate=0.0,
                optim="sgd",
                disable_tqdm=True,
                use_cpu=True,
                save_strategy="no",
                gradient_accumulation_steps=2,
            ),
        ),
    ):
        trainer = trainer_class(model=tiny_resnet(), args=args, train_dataset=image_samples())
        trainer.train()
        states.append(trainer.model.state_dict())
    assert states[0]["resnet.embedder.embedder.normalization.num_batches_tracked"] > 0
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_without_ascent_and_pattern_it_is_the_stock_trainer_bit_for_bit(tmp_path):
    ours = train(tmp_path, tiny_resnet(), rho=0.0, patterns=[], optim="adamw_torch").model
    args = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=16,
        learning_rate=0.05,
        optim="adamw_torch",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    stock = Trainer(model=tiny_resnet(), args=args, train_dataset=image_samples())
    stock.train()
    assert largest_difference(ours, stock.model) == 0.0


def test_the_log_has_the_clean_and_the_compressed_loss(tmp_path):
    """At a learning rate of 0 the clean loss of the one batch is known, and the compressed one is larger."""
    model = tiny_vit()
    batch = image_samples()
    pixels, labels = torch.stack([s["pixel_values"] for s in batch]), torch.stack([s["labels"] for s in batch])
    with torch.no_grad():
        clean = model(pixel_values=pixels, labels=labels).loss.item()
    options = {"learning_rate": 0.0, "per_device_train_batch_size": 12, "gradient_accumulation_steps": 4}
    trainer = train(tmp_path, model, rho=0.0, patterns=["unstructured:0.9"], max_steps=2, logging_steps=2, **options)
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logs) == 1
    assert logs[0]["loss"] == pytest.approx(clean, abs=1e-4)
    hfc.compress(model, "unstructured:0.9")
    with torch.no_grad():
        compressed = model(pixel_values=pixels, labels=labels).loss.item()
    assert logs[0]["compressed_loss"] == pytest.approx(compressed, abs=1e-4)
    assert abs(clean - compressed) > 5e-4


def test_a_second_train_call_wraps_once(tmp_path):
    trainer = train(tmp_path, tiny_vit())
    trainer.train()
    assert isinstance(trainer.cram, CrAM)
    assert isinstance(trainer.cram.optimizer, torch.optim.SGD)


def test_an_optimizer_of_the_users_is_wrapped(tmp_path):
    model = tiny_vit()
    own = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(own, 1.0, 0.1, 4)
    trainer = hfc.CrAMTrainer(
        model=model, args=config(tmp_path), train_dataset=image_samples(), optimizers=(own, schedule)
    )
    trainer.train()
    assert trainer.cram.optimizer is own
    assert own.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_the_mixin_joins_a_trainer_of_the_users(tmp_path):
    class MyTrainer(Trainer):
        seen = 0

        def compute_loss(self, model, inputs, **kwargs):
            self.seen += 1
            return super().compute_loss(model, inputs, **kwargs)

    class MyCrAMTrainer(hfc.CrAMMixin, MyTrainer):
        pass

    trainer = train(tmp_path, tiny_vit(), MyCrAMTrainer)
    assert trainer.seen == 10  # two sweeps of 4 steps, and twice before the first to learn how the loss scales
    assert largest_difference(trainer.model, train(tmp_path, tiny_vit()).model) == 0.0
    with pytest.raises(ValueError, match="MyCrAMTrainer takes a CrAMConfig as `args`, got TrainingArguments"):
        MyCrAMTrainer(model=tiny_vit(), args=TrainingArguments(str(tmp_path), use_cpu=True))


def test_wrong_arguments_fail_before_the_training(tmp_path):
    with pytest.raises(ValueError, match="rho must be"):
        config(tmp_path, rho=-1.0)
    with pytest.raises(ValueError, match="'3:2' is no pattern|3:2 is no pattern"):
        config(tmp_path, patterns=["3:2"])
    with pytest.raises(ValueError, match='write "2:4"'):
        config(tmp_path, variants=[124])
    with pytest.raises(ValueError, match='write "2:4"'):
        config(tmp_path, patterns=124)
    assert config(tmp_path, patterns="2:4").patterns == ["2:4"]
    with pytest.raises(ValueError, match="calibration_samples must be at least 1"):
        config(tmp_path, calibration_samples=0)
    with pytest.raises(ValueError, match="include='\\*nothing\\*' matches no weight"):
        hfc.CrAMTrainer(model=tiny_vit(), args=config(tmp_path, include=["*nothing*"]))


def run_worker(folder, *flags, kill_at=None):
    """Train in a process of its own; SIGKILL when a checkpoint of that step lies there."""
    process = subprocess.Popen(
        [sys.executable, str(WORKER), "--output_dir", str(folder), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if kill_at is not None:
        # The loop pauses after each checkpoint, so that the kill falls between two saves.
        while not (folder / f"checkpoint-{kill_at}" / "trainer_state.json").is_file() and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, process.stdout.read().decode()
        process.send_signal(signal.SIGKILL)
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == (0 if kill_at is None else -signal.SIGKILL), output


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    """Dropout, Adam, drawn patterns, an epoch that is left in the middle."""
    flags = ["--max_steps", "8", "--save_steps", "4", "--dropout", "0.1", "--optim", "adamw_torch"]
    run_worker(tmp_path / "whole", *flags)
    run_worker(tmp_path / "cut", *flags, "--pause_after_save", "30", kill_at=4)
    assert not (tmp_path / "cut" / "weights.pt").exists()
    run_worker(tmp_path / "cut", *flags, "--resume", str(tmp_path / "cut" / "checkpoint-4"))
    whole, resumed = (torch.load(tmp_path / d / "weights.pt", weights_only=True) for d in ("whole", "cut"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    run_worker(tmp_path / "other", *flags, "--seed", "1")
    other = torch.load(tmp_path / "other" / "weights.pt", weights_only=True)
    assert any(not torch.equal(whole[name], other[name]) for name in whole)
