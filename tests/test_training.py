"""What all trainers share: families from a trainer, whatever its data sets, metrics and types."""

from __future__ import annotations

import random
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.utils.data import IterableDataset
from transformers import BertForSequenceClassification

import hf_compress as hfc
from tests.conftest import image_samples, text_samples, tiny_bert, tiny_resnet, tiny_vit
from tests.methods.cram.test_trainer import config


class Stream(IterableDataset):
    def __iter__(self):
        yield from image_samples()


def metrics(prediction):
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": right.mean(), "confusion": [[1, 2], [3, 4]], "count": len(right), "bad": float("nan")}


def make(folder, model=None, train=None, **options):
    data = image_samples()
    arguments = {
        "eval_dataset": data,
        "compute_metrics": metrics,
        **{k: options.pop(k) for k in ("eval_dataset",) if k in options},
    }
    return hfc.CrAMTrainer(
        model=model or tiny_resnet(), args=config(folder, **options), train_dataset=train or data, **arguments
    )


def test_a_family_of_a_trainer(tmp_path):
    trainer = make(tmp_path, max_steps=2)
    trainer.train()
    states = random.getstate(), torch.get_rng_state()
    logs = list(trainer.state.log_history)
    family = trainer.build_family(["unstructured:0.5", "2:4"], recipe={"rho": 0.1}, task="image-classification")
    assert family.folder == tmp_path / "_family"
    assert (family.method, family.task, family.recipe) == ("cram", "image-classification", {"rho": 0.1})
    assert set(family.dense.metrics) == {"loss", "accuracy", "count", "bad"}
    assert family.dense.metrics["bad"] is None
    assert trainer.state.log_history == logs
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert family.dense.metrics["accuracy"] == pytest.approx(trainer.evaluate()["eval_accuracy"])


def test_default_patterns_come_from_the_arguments(tmp_path):
    trainer = make(tmp_path, variants=["2:4"], max_steps=1)
    assert [v.pattern for v in trainer.build_family().variants] == ["2:4"]
    with pytest.raises(ValueError, match="no patterns: pass some"):
        make(tmp_path, max_steps=1).build_family()


def test_filters_of_variants_are_cut_out(tmp_path):
    trainer = make(tmp_path, variants=["filters:0.4", "2:4"], max_steps=1, remove=True, multiple_of=4)
    family = trainer.build_family()
    assert [v.parameters_removed > 0 for v in family.variants] == [True, False]
    kept = hfc.load_family(family.folder).path_to("filters:0.4")
    widths = {m.out_channels for m in type(trainer.model).from_pretrained(kept).modules() if hasattr(m, "out_channels")}
    assert widths == {8, 12}
    assert family["filters:0.4"].macs < family.dense.macs  # 5 of 8 are rounded up to 8, and 8 of 12 stay


def test_data_without_a_length(tmp_path):
    trainer = make(tmp_path, train=Stream(), max_steps=2)
    trainer.train()
    assert trainer.build_family(["2:4"])["2:4"].metrics["count"] == 48


def test_several_evaluation_sets_are_kept_apart(tmp_path):
    data = image_samples()
    options = {"dataloader_persistent_workers": True, "dataloader_num_workers": 1}
    trainer = make(tmp_path, eval_dataset={"a": data[:16], "b": data[16:24]}, max_steps=1, **options)
    found = trainer.build_family(["2:4"]).dense.metrics
    assert (found["a_count"], found["b_count"]) == (16, 8)
    assert found["a_loss"] != found["b_loss"]


def test_weights_in_half_precision(tmp_path):
    model = tiny_resnet().bfloat16()
    trainer = make(tmp_path, model=model, max_steps=1, bf16=True)
    trainer.train()
    family = trainer.build_family(["unstructured:0.5"])
    loaded = type(model).from_pretrained(family.path_to("unstructured:0.5"), dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert family["unstructured:0.5"].macs > 0


def test_evaluation_in_half_precision_changes_no_number_of_the_weights(tmp_path):
    """The Trainer then casts the model that it is given; counts belong to the checkpoint."""
    text = text_samples()
    arguments = config(tmp_path, max_steps=1, bf16_full_eval=True)
    trainer = hfc.CrAMTrainer(model=tiny_bert(), args=arguments, train_dataset=text, eval_dataset=text)
    with torch.no_grad():
        trainer.model.classifier.weight[0, 0] = 1e-45  # zero in bfloat16
    family = trainer.build_family(["2:4"])
    assert family.dense.nonzero == sum(int(p.count_nonzero()) for p in tiny_bert().parameters())


def test_a_recipe_that_is_no_json_fails_before_the_work(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        make(tmp_path).build_family(["2:4"], recipe={"path": tmp_path})
    assert not (tmp_path / "_family").exists()


def test_the_arguments_that_differ_are_the_recipe(tmp_path):
    recipe = make(tmp_path, max_steps=1).build_family(["2:4"]).recipe
    assert recipe["rho"] == 0.1
    assert recipe["optim"] == "sgd"
    assert "plus" not in recipe
    assert not any(str(tmp_path) in str(value) for value in recipe.values())


def test_a_vision_transformer_too(tmp_path):
    trainer = make(tmp_path, model=tiny_vit(), max_steps=1)
    assert trainer.build_family(["unstructured:0.9"])["unstructured:0.9"].loads_with == "transformers"


def test_sgd_is_fused_as_adamw_is(tmp_path):
    trainer = make(tmp_path, max_steps=1, optim="sgd", optim_args="momentum=0.9")
    assert trainer.create_optimizer().defaults["fused"] is True
    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args)
    assert (kind, options["momentum"]) == (torch.optim.SGD, 0.9)
    adamw = make(tmp_path / "adamw", max_steps=1)
    assert adamw.create_optimizer().defaults["fused"] is True  # the default of the Trainer


def test_a_mixin_behind_the_trainer_is_refused():
    """Its methods would be hidden, and the training plain."""
    with pytest.raises(TypeError, match=r"Wrong: CrAMMixin goes before the Trainer, as in class Mine\(CrAMMixin"):
        type("Wrong", (transformers.Trainer, hfc.CrAMMixin), {})
    right = type("Trainer", (hfc.CrAMMixin, transformers.Trainer), {})  # whatever its name
    assert type("Mine", (right,), {}).method == "cram"


@pytest.mark.parametrize("method", ["CrAM", "SFW", "TPP", "LilNetX"])
def test_adapters_of_peft_are_refused(tmp_path, method):
    """They are trained in place of the weights that a method compresses."""
    model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(r=2, target_modules=["query"]))
    args = getattr(hfc, f"{method}Config")(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=f"query has adapters of PEFT, which {method}Trainer would compress in place"):
        getattr(hfc, f"{method}Trainer")(model=model, args=args, train_dataset=text_samples())


class Headed(BertForSequenceClassification):
    """Made of more than its config."""

    def __init__(self, config, width):
        super().__init__(config)
        self.width = width


def test_the_best_model_of_a_class_that_takes_more_than_its_config_is_loaded(tmp_path):
    model = Headed(tiny_bert().config, 3)
    options = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1, "eval_steps": 1, "max_steps": 2}
    trainer = make(tmp_path, model, text_samples(), **options, load_best_model_at_end=True, eval_dataset=text_samples())
    trainer.train()
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in model.state_dict().items() if name in best)
