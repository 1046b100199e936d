"""`--eval_patterns`: scores of the compressed weights, of which the training and the model keep no trace."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import hf_compress as hfc
from tests.conftest import image_samples, text_samples, tiny_bert, tiny_resnet, tiny_vit

METHODS = {"cram": (hfc.CrAMTrainer, hfc.CrAMConfig), "sfw": (hfc.SFWTrainer, hfc.SFWConfig)}
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make(folder, method="cram", model=None, data=None, **options):
    trainer_class, config_class = METHODS[method]
    data = data or image_samples()
    given = {"compute_metrics": accuracy, "eval_dataset": data, "train_dataset": data, "callbacks": None}
    given |= {key: options.pop(key) for key in list(options) if key in given}
    fields = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "learning_rate": 0.05,
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "eval_patterns": ["unstructured:0.9", "2:4"],
    }
    return trainer_class(model=model or tiny_resnet(), args=config_class(**{**fields, **options}), **given)


def snapshot(model):
    return {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}


def assert_untouched(model, before):
    for name, tensor in model.state_dict().items():
        pointer, value = before[name]
        assert tensor.data_ptr() == pointer
        assert torch.equal(tensor, value), name


def generators():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [tiny_resnet, tiny_vit])
def test_scores_are_those_of_compressed_models(tmp_path, method, kind):
    """Compressed by hfc.compress, calibrated on the same batches, evaluated by a trainer without patterns."""
    patterns = [
        "unstructured:0.9",
        "2:4",
        "2:4+int8",
        "low_rank:0.5",
        *(["filters:0.5"] if kind is tiny_resnet else []),
    ]
    model = kind()
    with torch.no_grad():
        for target in hfc.find_targets(model).values():
            target.parameter.mul_(8)  # what a pattern changes is then seen in the loss
    trainer = make(tmp_path, method, model, eval_patterns=patterns)
    trainer.train()
    before = snapshot(trainer.model)
    found = trainer.evaluate()
    assert_untouched(trainer.model, before)
    assert set(trainer.state.log_history[-1]) - {"epoch", "step"} == set(found) - {"epoch"}
    losses = set()
    for pattern in map(hfc.parse_pattern, patterns):
        model = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model))
        by_hand = make(tmp_path, method, model, eval_patterns=None)
        hfc.compress(model, pattern)
        by_hand._recalibrate(model)
        wanted = by_hand.evaluate()
        assert found[f"eval_{pattern.revision}_accuracy"] == wanted["eval_accuracy"]
        assert found[f"eval_{pattern.revision}_loss"] == pytest.approx(wanted["eval_loss"], abs=1e-6)
        losses.add(round(wanted["eval_loss"], 5))
    assert round(found["eval_loss"], 5) not in losses
    assert len(losses) == len(patterns)


def test_times_are_those_of_the_dense_evaluation(tmp_path):
    found = make(tmp_path).evaluate()
    assert "eval_runtime" in found
    compressed = {key for key in found if "-" in key}
    assert compressed == {f"eval_{r}_{m}" for r in ("unstructured-0.90", "nm-2of4") for m in ("accuracy", "loss")}
    plain = make(tmp_path, eval_patterns=None).evaluate()
    assert set(plain) == set(found) - compressed


@pytest.mark.parametrize("method", METHODS)
def test_the_training_goes_on_as_without(tmp_path, method):
    """Dropout, shuffling and what augmentation draws come from the global generators."""
    ends = {}
    for patterns in (None, ["unstructured:0.9", "2:4"]):
        model = tiny_vit(hidden_dropout_prob=0.3)
        trainer = make(tmp_path, method, model, eval_patterns=patterns, max_steps=6, **EVERY_STEP)
        trainer.train()
        rows = [row for row in trainer.state.log_history if "eval_loss" in row]
        assert len(rows) == 6
        ends[bool(patterns)] = trainer.model.state_dict(), generators(), [row["eval_loss"] for row in rows]
    assert all(torch.equal(ends[True][0][name], tensor) for name, tensor in ends[False][0].items())
    assert ends[True][1:] == ends[False][1:]


def test_batch_norms_of_a_training_go_on_as_without(tmp_path):
    ends = []
    for patterns in (None, ["unstructured:0.9"]):
        trainer = make(tmp_path, eval_patterns=patterns, **EVERY_STEP)
        trainer.train()
        ends.append(trainer.model.state_dict())
    assert any("running_mean" in name for name in ends[0])
    assert all(torch.equal(ends[1][name], tensor) for name, tensor in ends[0].items())


def test_batch_norms_are_calibrated(tmp_path):
    """Without training data they stay as they were, and the loss is another one."""
    data = image_samples()
    model = tiny_resnet()
    calibrated = make(tmp_path, model=model).evaluate()
    as_they_were = make(tmp_path, model=model, train_dataset=None).evaluate(data)
    assert calibrated["eval_loss"] == as_they_were["eval_loss"]
    assert abs(calibrated["eval_nm-2of4_loss"] - as_they_were["eval_nm-2of4_loss"]) > 1e-4


@pytest.mark.parametrize("fails_at", [2, 3])
def test_weights_come_back_when_a_metric_fails(tmp_path, fails_at):
    calls = []

    def failing(prediction):
        calls.append(trainer.model.state_dict()[weight].eq(0).float().mean().item())
        if len(calls) == fails_at:
            raise ArithmeticError("no such metric")
        return {"accuracy": 1.0}

    trainer = make(tmp_path, compute_metrics=failing, eval_patterns=["unstructured:0.9:layer", "filters:0.5"])
    weight = next(iter(hfc.find_targets(trainer.model)))
    with torch.no_grad():  # zeros with a sign, which no comparison of values would see
        trainer.model.get_parameter(weight)[0].fill_(-0.0)
    before = snapshot(trainer.model)
    signs = trainer.model.get_parameter(weight).signbit().clone()
    state, callbacks = generators(), list(trainer.callback_handler.callbacks)
    with pytest.raises(ArithmeticError) as raised:  # whose traceback keeps every frame alive
        trainer.evaluate()
    assert raised.value.args == ("no such metric",)
    assert len(calls) == fails_at
    assert calls[1] > 0.85
    assert_untouched(trainer.model, before)
    assert torch.equal(trainer.model.get_parameter(weight).signbit(), signs)
    assert state[:2] == generators()[:2]
    assert trainer.callback_handler.callbacks == callbacks
    trainer.args.eval_patterns = None
    assert not [key for key in trainer.evaluate() if "-" in key]


def test_biases_of_removed_neurons_come_back(tmp_path):
    model = tiny_vit()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(0.5)
    trainer = make(tmp_path, model=model, eval_patterns=["neurons:0.5", "heads:0.5"])
    before = snapshot(model)
    found = trainer.evaluate()
    assert_untouched(model, before)
    assert len({found["eval_loss"], found["eval_neurons-0.50_loss"], found["eval_heads-0.50_loss"]}) == 3


def test_callbacks_see_the_merged_metrics_once(tmp_path):
    seen = {"evaluate": [], "steps": 0}

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen["evaluate"].append(dict(metrics))

        def on_prediction_step(self, *args, **kwargs):
            seen["steps"] += 1

    trainer = make(tmp_path, callbacks=[Watch()], max_steps=2, **EVERY_STEP)
    trainer.train()
    assert len(seen["evaluate"]) == 2
    assert all("eval_nm-2of4_accuracy" in metrics for metrics in seen["evaluate"])
    assert seen["steps"] == 2 * 3  # 48 samples, the dense weights alone


def test_several_evaluation_sets(tmp_path):
    data = image_samples()
    trainer = make(tmp_path, eval_dataset={"a": data[:16], "b": data[16:]}, eval_patterns=["2:4"])
    found = trainer.evaluate()
    assert found["eval_a_nm-2of4_loss"] != found["eval_b_nm-2of4_loss"]
    assert found["eval_a_nm-2of4_loss"] != found["eval_a_loss"]
    again = trainer.evaluate({"c": data[:16]}, metric_key_prefix="test")
    assert again["test_c_nm-2of4_loss"] == found["eval_a_nm-2of4_loss"]


def test_the_best_model_is_chosen_by_a_compressed_metric(tmp_path):
    """Told apart by the weights: the dense ones get better from step to step, the compressed ones are best at first."""
    ranks = {"dense": iter([0.1, 0.2, 0.3]), "compressed": iter([0.9, 0.8, 0.7])}

    def metrics(prediction):
        weights = [target.parameter for target in hfc.find_targets(trainer.model).values()]
        share = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        return {"accuracy": next(ranks["compressed" if share > 0.8 else "dense"])}

    saving = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    best = {"metric_for_best_model": "unstructured-0.90_accuracy", "eval_patterns": ["unstructured:0.9"]}
    trainer = make(tmp_path, model=tiny_vit(), compute_metrics=metrics, **saving, **EVERY_STEP, **best)
    trainer.train()
    assert trainer.state.best_metric == 0.9
    assert trainer.state.best_global_step == 1
    first = type(trainer.model).from_pretrained(tmp_path / "checkpoint-1").state_dict()
    assert all(torch.equal(first[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_a_loss_alone_and_half_precision(tmp_path):
    trainer = make(tmp_path, model=tiny_bert(), data=text_samples(), compute_metrics=None, bf16=True, **EVERY_STEP)
    trainer.train()
    before = snapshot(trainer.model)
    found = trainer.evaluate()
    assert_untouched(trainer.model, before)
    assert found["eval_nm-2of4_loss"] != found["eval_loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_patterns": ["2:5:3"]}, "'2:5:3' is no pattern; allowed"),
        ({"eval_patterns": ["unstructured:0.9", "unstructured:0.90"]}, "have the same revision unstructured-0.90"),
        ({"eval_patterns": [124]}, 'write "2:4"'),
        ({"metric_for_best_model": "nm-4of8_loss"}, "allowed of compressed weights: eval_unstructured-0.90_METRIC, ev"),
        ({"metric_for_best_model": "eval_unstructured:0.9_loss"}, "'eval_unstructured:0.9_loss' is of a pattern that"),
        ({"metric_for_best_model": "nm-2of4_loss", "eval_patterns": None}, "none, as eval_patterns is not set"),
        ({"eval_patterns": ["heads:0.5+int8"]}, "heads:0.5 leaves all 7 targets"),
        ({"eval_patterns": ["5:11"]}, "5:11 leaves all 7 targets of this model dense: the first, because its"),
    ],
)
def test_mistakes_fail_before_the_training(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


def test_metrics_of_the_users_own_may_be_the_best(tmp_path):
    for name in ("accuracy", "eval_nm-2of4_accuracy", "nm-2of4_loss"):
        assert make(tmp_path, metric_for_best_model=name).args.metric_for_best_model == name


def test_diverged_weights_are_named(tmp_path):
    trainer = make(tmp_path)
    name, target = next(iter(hfc.find_targets(trainer.model).items()))
    with torch.no_grad():
        target.parameter[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"weight '{name}' holds NaN"):
        trainer.evaluate()
