"""The lock: zeros stay zero whatever trains, are found again after a resume, and are checked at every save."""

from __future__ import annotations

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerCallback

import hf_compress as hfc
from tests.callbacks import runs
from tests.callbacks.runs import ADAMW, Damage, Watch, changed, count, same, zeros
from tests.conftest import tiny_bert, tiny_resnet, tiny_vit

WEIGHT = "vit.layers.0.mlp.fc1.weight"


@pytest.mark.parametrize(
    ("kind", "pattern", "options"),
    [
        (runs.stock, "unstructured:0.7", {}),
        (runs.stock, "2:4", ADAMW),
        (runs.stock, "unstructured:0.9:layer", {**ADAMW, "optim": "adamw_torch_fused"}),
        (runs.stock, "2:4", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}),
        (runs.stock, "2:4", {**ADAMW, "bf16": True}),
        (runs.cram, "unstructured:0.7", {}),
        (runs.cram, "2:4", ADAMW),
    ],
    ids=["momentum", "adamw", "fused", "accumulation", "bf16", "cram-momentum", "cram-adamw"],
)
def test_200_steps_leave_every_zero(tmp_path, kind, pattern, options):
    model = runs.pruned_vit(pattern)
    before, weights = zeros(model), {n: p.clone() for n, p in model.named_parameters()}
    watch = Watch()
    kind(tmp_path, model, [hfc.SparsityLock(), watch], max_steps=200, **options).train()
    assert len(watch.steps) == 200
    assert all(changed(before, after) == 0 for after in watch.steps.values())
    assert count(zeros(model)) == count(before) > 1500  # nothing else became zero
    assert all(not torch.equal(p, weights[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("kind", [runs.stock, runs.cram])
def test_without_the_lock_zeros_are_lost(tmp_path, kind):
    """The negative control of the test above."""
    model = runs.pruned_vit()
    before = zeros(model)
    kind(tmp_path, model, max_steps=5).train()
    assert changed(before, zeros(model)) > 0.9 * count(before)


def test_what_is_not_zero_trains_as_it_would_without_the_lock(tmp_path):
    """One step from the same weights: zeros aside, the lock changes no bit."""
    free, locked = runs.pruned_vit(), runs.pruned_vit()
    mask = zeros(free)
    runs.stock(tmp_path, free, max_steps=1).train()
    runs.stock(tmp_path, locked, [hfc.SparsityLock()], max_steps=1).train()
    live = dict(locked.named_parameters())
    for name, parameter in free.named_parameters():
        wanted = parameter.masked_fill(mask[name], 0) if name in mask else parameter
        assert torch.equal(live[name], wanted)


def test_a_class_will_do_and_a_second_training_finds_the_zeros_anew(tmp_path):
    model = runs.pruned_vit()
    trainer = runs.stock(tmp_path, model, [hfc.SparsityLock], max_steps=5)
    trainer.train()
    hfc.compress(model, "unstructured:0.9")
    more = zeros(model)
    trainer.train()
    assert zeros(model).keys() == more.keys()
    assert changed(more, zeros(model)) == 0


def test_a_convolutional_net(tmp_path):
    model = tiny_resnet()
    hfc.compress(model, "2:4")
    before = zeros(model)
    runs.stock(tmp_path, model, [hfc.SparsityLock()]).train()
    assert changed(before, zeros(model)) == 0


def test_globs_choose_what_is_locked(tmp_path):
    """A head is a target only where `include` names it."""
    model = tiny_vit()
    hfc.compress(model, "unstructured:0.5", include=["*"])
    before = zeros(model, include=["*"])
    runs.stock(tmp_path, model, [hfc.SparsityLock(include=["*fc1*", "classifier"], exclude=["*layers.1*"])]).train()
    after = zeros(model, include=["*"])
    kept = {name for name in before if not (before[name] & ~after[name]).any()}
    assert kept == {WEIGHT, "classifier.weight"}
    with pytest.raises(ValueError, match=r"include='\*attnetion\*' matches no weight"):
        runs.stock(tmp_path, model, [hfc.SparsityLock(include=["*attnetion*"])]).train()


def test_nothing_to_lock_says_so(tmp_path):
    with pytest.raises(ValueError, match="ViTForImageClassification has no zero in its 13 targets.*hfc.compress"):
        runs.stock(tmp_path, tiny_vit(), [hfc.SparsityLock()]).train()
    lock = hfc.SparsityLock()
    with pytest.raises(ValueError, match="LayerNorm has no weight that SparsityLock could hold"):
        lock.on_train_begin(None, None, None, model=nn.LayerNorm(4))


@pytest.mark.parametrize(
    ("kind", "dense", "options"),
    [(runs.bert, tiny_bert, ADAMW), (runs.bert, tiny_bert, {}), (runs.cram, tiny_vit, ADAMW)],
    ids=["stock-adamw", "stock-momentum", "cram-adamw"],
)
def test_a_resumed_run_equals_the_uninterrupted_one_and_starts_from_any_weights(tmp_path, kind, dense, options):
    """The model of the resumed run is dense: the zeros are those of the checkpoint."""
    options = {**options, "save_strategy": "steps", "save_steps": 8}
    whole = dense()
    hfc.compress(whole, "2:4")
    before = zeros(whole)
    kind(tmp_path, whole, [hfc.SparsityLock()], **options).train()
    resumed = dense()
    assert count(zeros(resumed)) == 0
    trainer = kind(tmp_path / "again", resumed, [hfc.SparsityLock()], **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert same(whole, resumed)
    assert changed(before, zeros(resumed)) == 0


class ZeroedByChance(TrainerCallback):
    """A weight that is no zero of the lock happens to be zero when step 8 is saved."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 8:
            with torch.no_grad():
                weight = next(iter(hfc.find_targets(model).values())).parameter
                weight.view(-1)[weight.view(-1).nonzero()[:5]] = 0


def test_what_is_zero_in_a_checkpoint_stays_zero_in_both_runs(tmp_path):
    options = {**ADAMW, "save_strategy": "steps", "save_steps": 8}
    whole = runs.pruned_bert()
    before = count(zeros(whole))
    runs.bert(tmp_path, whole, [hfc.SparsityLock(), ZeroedByChance()], **options).train()
    resumed = tiny_bert()
    trainer = runs.bert(tmp_path / "again", resumed, [hfc.SparsityLock()], **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert same(whole, resumed)
    assert count(zeros(whole)) == before + 5


def test_the_best_model_comes_back_with_the_zeros_that_it_had(tmp_path):
    """It is that of step 4, before a weight became zero by chance."""
    options = {**ADAMW, "load_best_model_at_end": True, "metric_for_best_model": "first", "greater_is_better": True}
    schedule = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    scores = iter([1.0, 0.0, 0.0, 0.0, 0.0])
    model = runs.pruned_bert()
    before = count(zeros(model))
    trainer = runs.bert(tmp_path, model, [hfc.SparsityLock(), ZeroedByChance()], **options, **schedule)
    trainer.compute_metrics = lambda _: {"first": next(scores)}
    trainer.train()
    assert count(zeros(model)) == before
    assert count(zeros(type(model).from_pretrained(tmp_path / "checkpoint-8"))) == before + 5


@pytest.mark.parametrize("event", ["on_step_end", "on_optimizer_step"])
def test_a_zero_that_another_callback_undoes_is_found_at_the_save(tmp_path, event):
    model = runs.pruned_vit()
    number = int(zeros(model)[WEIGHT][0].sum())
    assert number > 5
    step = 4 if event == "on_step_end" else 3  # the Trainer counts a step between the two
    callbacks = [hfc.SparsityLock(), Damage(WEIGHT, event, step)]
    trainer = runs.stock(tmp_path, model, callbacks, save_strategy="steps", save_steps=4)
    with pytest.raises(RuntimeError, match=f"{number} zeros of '{WEIGHT}' are lost at step 4: .*SparsityLock"):
        trainer.train()
    assert trainer.state.global_step == 4


def test_damage_in_several_weights_is_counted(tmp_path):
    other = "vit.layers.1.mlp.fc2.weight"
    damage = [Damage(name, "on_step_end", 4) for name in (other, WEIGHT)]
    trainer = runs.stock(
        tmp_path, runs.pruned_vit(), [hfc.SparsityLock(), *damage], save_strategy="steps", save_steps=4
    )
    with pytest.raises(RuntimeError, match=f"zeros of '{WEIGHT}' .and more in 1 other weights. are lost"):
        trainer.train()


def test_damage_before_the_lock_or_between_saves_is_repaired(tmp_path):
    model = runs.pruned_vit()
    before = zeros(model)
    early, between = Damage(WEIGHT, "on_optimizer_step", 3), Damage(WEIGHT, "on_step_end", 6)
    runs.stock(tmp_path, model, [early, hfc.SparsityLock(), between], save_strategy="steps", save_steps=4).train()
    assert changed(before, zeros(model)) == 0


def test_damage_after_the_last_save_is_found_at_the_end(tmp_path):
    trainer = runs.stock(tmp_path, runs.pruned_vit(), [hfc.SparsityLock(), Damage(WEIGHT, "on_step_end", 20)])
    with pytest.raises(RuntimeError, match="are lost at step 20"):
        trainer.train()


def test_a_weight_that_was_replaced_is_found_too(tmp_path):
    """The check looks at the weights that the model has then, not at those that it had in the beginning."""

    class Replace(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                layer = model.vit.layers[0].mlp.fc1
                layer.weight = nn.Parameter(torch.ones_like(layer.weight))

    trainer = runs.stock(
        tmp_path, runs.pruned_vit(), [hfc.SparsityLock(), Replace()], save_strategy="steps", save_steps=4
    )
    with pytest.raises(RuntimeError, match=f"zeros of '{WEIGHT}' are lost at step 4"):
        trainer.train()


def test_no_step_looks_at_a_number():
    """Tensors without values raise where one is asked for."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    lock = hfc.SparsityLock()
    lock.targets = hfc.find_targets(model)
    lock.hold()
    assert [m.shape for m in lock.masks.values()] == [(16, 8), (4, 16)]
    lock.on_optimizer_step(None, None, None)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        lock.num_zeros()


def test_deepspeed_is_refused_before_the_first_step(tmp_path):
    trainer = runs.stock(tmp_path, runs.pruned_vit(), [hfc.SparsityLock()])
    trainer.args.deepspeed_plugin = object()
    with pytest.raises(ValueError, match=r"DeepSpeed steps copies of its own; run on .*FSDP2"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_flattened_weights_are_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        model = FullyShardedDataParallel(runs.pruned_vit(), device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match="FSDP1 flattens into one"):
            hfc.SparsityLock().on_train_begin(None, None, None, model=model)
    finally:
        dist.destroy_process_group()


def test_adapters_train_and_the_frozen_base_keeps_its_zeros(tmp_path):
    """LoRA begins with a factor of zeros, which must not be locked; a copied head trains whole."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"])
    model = peft.get_peft_model(runs.pruned_vit(), config)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    runs.stock(tmp_path, model, [hfc.SparsityLock()], save_strategy="steps", save_steps=4).train()
    after = dict(model.named_parameters())
    factors = [n for n in before if "lora_B" in n]
    assert len(factors) == 4
    assert not any(before[n].any() for n in factors)
    assert all(after[n].count_nonzero() == after[n].numel() for n in factors)
    assert not torch.equal(
        after["base_model.model.classifier.modules_to_save.default.weight"],
        before["base_model.model.classifier.modules_to_save.default.weight"],
    )
    frozen = [n for n in before if "base_layer.weight" in n]
    assert all(torch.equal(before[n], after[n]) for n in frozen)
    assert sum(int((before[n] == 0).sum()) for n in frozen) > 500
