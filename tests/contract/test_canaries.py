"""One test for each interface of another library that is not promised; the upper bounds in pyproject.toml name them."""

from __future__ import annotations

import inspect

from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, Trainer


def test_trainer_calls_the_hooks_that_a_second_sweep_needs():
    loop = inspect.getsource(Trainer._run_epoch)
    order = ["self.get_batch_samples(", "_set_sync_gradients(", "self.training_step(", "self._clip_grad_norm("]
    positions = [loop.index(word) for word in order]
    assert positions == sorted(positions)
    assert "self.optimizer.step()" in loop
    assert list(inspect.signature(Trainer.training_step).parameters) == [
        "self",
        "model",
        "inputs",
        "num_items_in_batch",
    ]


def test_trainer_has_the_collator_without_unused_columns():
    assert list(inspect.signature(Trainer._get_collator_with_removed_columns).parameters)[:2] == [
        "self",
        "data_collator",
    ]


def test_trainer_evaluates_self_model():
    assert "self._wrap_model(self.model, training=False" in inspect.getsource(Trainer.evaluation_loop)
    assert hasattr(Trainer, "callback_handler") or "self.callback_handler" in inspect.getsource(Trainer.__init__)


def test_trainer_restores_weights_in_two_places():
    assert "self._load_from_checkpoint(" in inspect.getsource(Trainer.train)
    assert list(inspect.signature(Trainer._load_from_checkpoint).parameters) == [
        "self",
        "resume_from_checkpoint",
        "model",
    ]
    assert "self._load_best_model()" in inspect.getsource(Trainer)


def test_timm_wrapper_saves_native_names_with_a_prefix_change(tmp_path):
    from safetensors import safe_open
    from transformers.core_model_loading import PrefixChange

    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnet10t", num_labels=3, model_args={}))
    model._weight_conversions = [PrefixChange(prefix_to_add="timm_model")]
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "conv1.0.weight" in set(file.keys())
