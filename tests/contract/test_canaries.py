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


def test_loading_asks_a_quantizer_for_the_type_of_every_tensor():
    from transformers.core_model_loading import (
        Chunk,
        WeightConverter,
        WeightRenaming,
        convert_and_load_state_dict_in_model,
    )
    from transformers.quantizers import HfQuantizer

    loop = inspect.getsource(convert_and_load_state_dict_in_model)
    assert "if hf_quantizer and hf_quantizer.pre_quantized:" in loop
    assert "_dtype = hf_quantizer.get_new_dtype(mapping, tensor, _dtype)" in loop
    assert "WeightRenaming(original_key, renamed_key)" in loop
    assert list(inspect.signature(HfQuantizer.get_new_dtype).parameters) == ["self", "converter", "param", "dtype"]
    name = "vit.layers.0.attention.q_proj.weight"
    renaming = WeightRenaming("encoder.layer.0.attention.query.weight", name)
    assert renaming.target_patterns == [name]
    assert not hasattr(renaming, "operations")
    assert WeightConverter("qkv", ["q", "k", "v"], [Chunk(dim=0)]).operations


def test_loading_hands_the_model_to_a_quantizer_before_and_after():
    from transformers import PreTrainedModel
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, get_hf_quantizer

    load = inspect.getsource(PreTrainedModel.from_pretrained)
    calls = ["config.distributed_config = ", "hf_quantizer.preprocess_model(", "cls._load_pretrained_model("]
    calls += ["accelerate_dispatch(model", "model.hf_quantizer = ", "hf_quantizer.postprocess_model("]
    positions = [load.index(call) for call in calls]
    assert positions == sorted(positions)
    assert "hf_quantizer.validate_environment(" in inspect.getsource(get_hf_quantizer)
    after = inspect.getsource(HfQuantizer.postprocess_model)
    assert 'self.pre_quantized and getattr(self.quantization_config, "dequantize", False)' in after
    assert after.index("self.remove_quantization_config(model)") < after.index("_process_model_after_weight_loading(")
    assert AUTO_QUANTIZER_MAPPING.keys() == AUTO_QUANTIZATION_CONFIG_MAPPING.keys()
