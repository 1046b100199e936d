"""TPP in the Trainer: against an independent loop, resumed in every part, in a family, and refused by name."""

from __future__ import annotations

import copy
import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForImageClassification, EarlyStoppingCallback, TrainerCallback

import hf_compress as hfc
from hf_compress.methods.tpp import GrowingSchedule
from tests.conftest import image_samples, text_samples, tiny_bert, tiny_resnet, tiny_vit
from tests.methods.tpp.runs import BLOCKS, Snapshots, config, equal, make, train


def penalty_by_definition(model, pruned):
    """With full Gram matrices and masks, for autograd."""
    total = 0
    for path, rows in pruned.items():
        block = model.get_submodule(path.removesuffix(".convolution"))
        w, norm = block.convolution.weight.flatten(1), block.normalization
        stays = torch.ones(len(w))
        stays[rows] = 0
        gram = (w @ w.T) * (1 - stays[:, None] * stays[None])
        total = total + 1000 * gram.square().mean()
        total = total + sum(p[rows].square().sum() for p in (w, norm.weight, norm.bias)) / 2
    return total


def test_regularization_equals_an_independent_loop(tmp_path):
    """All 48 samples in a batch: 12 steps of SGD with momentum; clipping is of the task alone."""
    start = tiny_resnet()
    trainer = make(tmp_path, copy.deepcopy(start), per_device_train_batch_size=48, max_grad_norm=0.5)
    snapshots = Snapshots()
    trainer.add_callback(snapshots)
    trainer.train()
    pruned, layers = trainer.progress.pruned, [n for n, m in start.named_modules() if hasattr(m, "in_channels")]
    batch = {k: torch.stack([s[k] for s in image_samples()]) for k in ("pixel_values", "labels")}
    optimizer = torch.optim.SGD(start.parameters(), lr=0.005, momentum=0.9)
    start.train()
    for step in range(12):
        strength = min(step // 2 * 2 / 8, 1.0)
        optimizer.zero_grad()
        start(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(start.parameters(), 0.5)
        (strength * penalty_by_definition(start, pruned)).backward()
        optimizer.step()
        for path, rows in pruned.items():
            every = 4 / (2 * (len(layers) + 1))  # the classifier is a layer too
            if step - 8 >= (layers.index(path) + 1) * every:
                block = start.get_submodule(path.removesuffix(".convolution"))
                for p in (block.convolution.weight, block.normalization.weight, block.normalization.bias):
                    p.data[rows] = 0
        for name, p in start.named_parameters():
            assert (snapshots.states[step][name] - p).abs().max() < 2e-6, (step, name)


def test_the_task_part_of_a_step_is_what_it_is_without_a_penalty(tmp_path):
    """Clipping 1.0 and strength 1e3: the step differs by the penalty alone, 1000 times what clipping lets pass."""
    steps = {}
    options = {"max_grad_norm": 1.0, "grow_steps": 0, "stabilize_steps": 1, "zero_every": 0, "ceiling": 1e3}
    data = [{**sample, "pixel_values": sample["pixel_values"].double()} for sample in image_samples()]
    for penalty in ("none", "trainability"):
        model = tiny_resnet().double()
        trainer = make(tmp_path, model, data, penalty=penalty, max_steps=-1, num_train_epochs=0, **options)
        snapshots = Snapshots()
        trainer.add_callback(snapshots)
        trainer.train()
        steps[penalty] = snapshots.states[0]
    start = tiny_resnet().double()
    (1e3 * penalty_by_definition(start, trainer.progress.pruned)).backward()
    largest = 0.0
    for name, p in start.named_parameters():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        difference = steps["none"][name] - steps["trainability"][name]
        assert torch.allclose(difference, 0.005 * gradient, rtol=1e-9, atol=1e-12), name
        largest = max(largest, gradient.norm().item())
    assert largest > 1e3


def test_the_log_and_the_shapes(tmp_path):
    trainer = train(tmp_path)
    log = trainer.state.log_history
    assert log[0]["e_folds"] == pytest.approx(0.05 * sum(GrowingSchedule(8, 4, 2).strength(t) for t in range(12)))
    assert log[0]["speed_up"] == trainer.progress.speed_up > 1.1
    regularized, retrained = ([r for r in log if "loss" in r and ("penalty_norm" in r) is w] for w in (True, False))
    assert [row["penalty_strength"] for row in regularized] == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1, 1, 1]
    assert regularized[0]["penalty_norm"] == 0 < regularized[2]["penalty_norm"]
    assert [row["learning_rate"] for row in regularized] == [0.005] * 12
    assert [row["learning_rate"] for row in retrained] == [0.05] * 4
    removal = next(row for row in log if "trainability_before_removal" in row)
    assert removal["trainability"] == pytest.approx(removal["trainability_before_removal"], rel=1e-4)
    assert [trainer.model.get_submodule(f"{block}.convolution").out_channels for block in BLOCKS] == [4, 6]


@pytest.mark.parametrize(
    ("checkpoint", "options"),
    [
        ("dense/checkpoint-3", {"dense_epochs": 2}),
        ("regularized/checkpoint-4", {"dense_epochs": 1}),
        ("regularized/checkpoint-10", {}),
        ("regularized/checkpoint-13", {"stabilize_steps": 5}),  # the last, within an epoch
        ("dense/checkpoint-2", {"dense_epochs": 0.5}),
        ("checkpoint-2", {}),
        ("checkpoint-2", {"dense_epochs": 1, "restore_callback_states_from_checkpoint": True}),
    ],
)
def test_resumed_in_every_part_it_ends_bit_for_bit_alike(tmp_path, checkpoint, options):
    """Checkpoints that a killed run would not have are deleted; nothing is chosen anew."""
    options = {**options, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear"}
    whole = train(tmp_path, **options)
    folder, step = (tmp_path / checkpoint).parent, int(checkpoint.rpartition("-")[2])
    for path in tmp_path.glob("**/checkpoint-*"):
        is_later = path.parent == folder and int(path.name[11:]) > step
        if is_later or (path.parent == tmp_path and folder != tmp_path) or (folder.name == "dense" != path.parent.name):
            shutil.rmtree(path)
    trainer = make(tmp_path, **options)
    trainer.train(resume_from_checkpoint=True)
    assert equal(trainer.model, whole.model)
    assert trainer.progress.pruned == whole.progress.pruned
    assert equal(trainer._dense, whole._dense)


def test_the_selection_of_a_checkpoint_is_never_made_anew(tmp_path):
    train(tmp_path, save_strategy="steps", save_steps=4)
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    progress = state["stateful_callbacks"]["TPPProgress"]["attributes"]
    assert progress["phase"] == "retrain"
    for path in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(path)
    before = tmp_path / "regularized" / "checkpoint-4" / "trainer_state.json"
    state = json.loads(before.read_text())
    chosen = state["stateful_callbacks"]["TPPProgress"]["attributes"]["pruned"]
    chosen[f"{BLOCKS[0]}.convolution"] = [0]
    before.write_text(json.dumps(state))
    trainer = make(tmp_path)
    trainer.train(resume_from_checkpoint=str(before.parent))
    assert trainer.model.get_submodule(f"{BLOCKS[0]}.convolution").out_channels == 7


def test_accumulation_equals_one_large_batch(tmp_path):
    whole = train(tmp_path, tiny_vit(), patterns=["neurons:0.5"]).model
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    split = train(tmp_path, tiny_vit(), patterns=["neurons:0.5"], **parts).model
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-5


def test_under_adam_rows_shrink_by_decoupled_steps(tmp_path):
    """Decay alone: by the factor that strengths and rate give, and not by what Adam makes of a gradient."""
    options = {
        "optim": "adamw_torch",
        "optim_args": None,
        "learning_rate": 0.0,
        "weight_decay": 0.0,
        "gram_weight": 0.0,
    }
    trainer = make(tmp_path, penalty_rate=0.02, stabilize_steps=0, **options)
    snapshots = Snapshots()
    trainer.add_callback(snapshots)
    trainer.train()
    path = f"{BLOCKS[0]}.convolution"
    rows = trainer.progress.pruned[path]
    factor = math.prod(1 - 0.02 * GrowingSchedule(8, 0, 2).strength(step) for step in range(8))
    start = tiny_resnet().get_parameter(f"{path}.weight")[rows]
    assert torch.allclose(snapshots.states[7][f"{path}.weight"][rows], factor * start, rtol=1e-5)
    kept = [i for i in range(8) if i not in rows]
    assert torch.equal(snapshots.states[7][f"{path}.weight"][kept], tiny_resnet().get_parameter(f"{path}.weight")[kept])


@pytest.mark.parametrize("penalty", ["growing_l2", "kernel_orthogonality", "none"])
def test_the_baselines_choose_and_remove_alike(tmp_path, penalty):
    trainer, ours = train(tmp_path, penalty=penalty), train(tmp_path)
    assert trainer.progress.pruned == ours.progress.pruned
    assert not equal(trainer.model, ours.model)


def test_l1_alone_removes_at_once(tmp_path):
    trainer = train(tmp_path, penalty="none", grow_steps=0, stabilize_steps=0)
    kept = [i for i in range(8) if i not in trainer.progress.pruned[f"{BLOCKS[0]}.convolution"]]
    assert (
        kept
        == tiny_resnet()
        .get_parameter(f"{BLOCKS[0]}.convolution.weight")
        .abs()
        .mean((1, 2, 3))
        .argsort()[4:]
        .sort()
        .values.tolist()
    )
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [1, 2, 3, 4]


def test_a_family_of_the_dense_model_and_the_smaller_one(tmp_path):
    trainer = train(tmp_path, dense_epochs=1)
    family = trainer.build_family(["filters:0.25"])
    assert [(v.pattern, v.made_by) for v in family.variants] == [
        ("filters:0.5", "trained"),
        ("filters:0.25", "one_shot"),
    ]
    variant = family["filters:0.5"]
    assert variant.parameters_removed == family.dense.parameters - variant.parameters > 0
    assert family.dense.macs / variant.macs == pytest.approx(trainer.progress.speed_up, rel=1e-3)
    loaded = AutoModelForImageClassification.from_pretrained(family.path_to("filters:0.5"))
    assert equal(loaded, trainer.model)
    assert not equal(trainer._dense, tiny_resnet())
    with pytest.raises(ValueError, match="have the same revision filters-0.50"):
        trainer.build_family(["filters:0.5"])


def test_a_family_before_the_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing has been removed yet; call train"):
        make(tmp_path).build_family()


def test_a_text_model_without_gradients_of_its_inputs(tmp_path):
    options = {"patterns": ["neurons:0.5", "heads:0.5"], "optim": "adamw_torch", "optim_args": None}
    trainer = train(tmp_path, tiny_bert(), data=text_samples(), **options)
    assert trainer.progress.pattern == "neurons:0.5+heads:0.5"
    assert trainer.model.bert.encoder.layer[0].intermediate.dense.out_features == 12
    assert not any("trainability" in row for row in trainer.state.log_history)


def test_all_parts_train_in_mixed_precision_and_removal_is_checked_without_it(tmp_path):
    """In bfloat16 the smaller model and the one with zeros may differ by rounding."""
    found = []

    class Watching(hfc.TPPTrainer):
        def training_step(self, *args, **kwargs):
            with self.model.get_submodule("vit.layers.0.mlp.fc1").register_forward_hook(
                lambda module, inputs, output: found.append((self.progress.phase, output.dtype))
            ):
                return super().training_step(*args, **kwargs)

    args = config(tmp_path, patterns=["neurons:0.5", "heads:0.5"], bf16=True, dense_epochs=1)
    trainer = Watching(model=tiny_vit(), args=args, train_dataset=image_samples(), eval_dataset=image_samples())
    trainer.train()
    assert set(found) == {(phase, torch.bfloat16) for phase in ("dense", "regularize", "retrain")}
    assert trainer.model.vit.layers[0].mlp.fc1.out_features == 12
    assert "forward" not in vars(trainer._dense)
    assert trainer.build_family().variants[0].parameters_removed > 0


def test_a_second_training_of_one_object_is_refused(tmp_path):
    """The model that it has is not the one at the start any more."""
    trainer = train(tmp_path, save_strategy="steps", save_steps=4)
    for resume in (None, True):
        with pytest.raises(
            ValueError, match="a TPPTrainer trains once, .* make a new TPPTrainer with the model at the s"
        ):
            trainer.train(resume_from_checkpoint=resume)


def test_early_stopping_waits_for_the_retraining(tmp_path):
    """A metric that falls from the first evaluation on; nothing is evaluated before the second step."""
    falling = iter(range(100, 0, -1))
    args = config(
        tmp_path,
        max_steps=8,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer = hfc.TPPTrainer(
        model=tiny_resnet(),
        args=args,
        train_dataset=image_samples(),
        eval_dataset=image_samples(),
        compute_metrics=lambda _: {"score": next(falling)},
        callbacks=[EarlyStoppingCallback(3)],
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.model.get_submodule(f"{BLOCKS[0]}.convolution").out_channels == 4
    assert len(list((tmp_path / "regularized").glob("checkpoint-*"))) == 12


def test_a_training_that_is_stopped_removes_nothing(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    trainer = make(tmp_path)
    trainer.add_callback(Stop())
    trainer.train()
    assert trainer.model.get_submodule(f"{BLOCKS[0]}.convolution").out_channels == 8
    with pytest.raises(ValueError, match="nothing has been removed: the regularization was stopped in step 5"):
        trainer.build_family()
