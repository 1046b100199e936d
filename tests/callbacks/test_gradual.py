"""Gradual pruning: the cubic schedule step by step, exact counts at its end, and resumes in its middle."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

import hf_compress as hfc
from hf_compress.patterns.base import count_pruned
from tests.callbacks import runs
from tests.callbacks.runs import ADAMW, Damage, Watch, changed, count, same, zeros
from tests.conftest import ROOT, tiny_bert, tiny_resnet, tiny_vit

SAVES = {**ADAMW, "save_strategy": "steps"}


def cubic(final, begin, end, step):
    """Equation 1 of Zhu and Gupta for a dense start."""
    return final + (0 - final) * (1 - (step - begin) / (end - begin)) ** 3


def renewals(begin, end, every):
    return sorted({*range(begin, end + 1, every), end})


def watched(folder, pruning, kind=runs.stock, model=None, **options):
    watch = Watch()
    model = model or tiny_vit()
    kind(folder, model, [pruning, watch], **options).train()
    return model, watch.steps


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_share_follows_the_cubic_schedule_at_every_renewal(tmp_path, scope, every):
    """18 steps from dense to 0.8, in steps of 4 with a shorter last one."""
    begin, end = 4, 22
    pattern = hfc.Unstructured(0.8, scope)
    model, steps = watched(tmp_path, hfc.GradualPruning(pattern, begin, end, every), max_steps=30)
    sizes = {n: t.parameter.numel() for n, t in hfc.find_targets(model).items()}
    groups = [list(sizes)] if scope == "global" else [[n] for n in sizes]
    last = {0: begin}
    for step, masks in steps.items():
        last[step] = max([r for r in renewals(begin, end, every) if r <= step], default=begin)
        for names in groups:
            total, found = sum(sizes[n] for n in names), sum(int(masks[n].sum()) for n in names)
            if step >= end:
                assert found == count_pruned(0.8, total)
            else:
                assert found == math.floor(cubic(0.8, begin, end, last[step]) * total)
        if step > 1:
            assert changed(steps[step - 1], masks) == 0
    assert len({count(m) for m in steps.values()}) >= len(renewals(begin, end, every)) - 1
    assert count(steps[begin]) == 0 < count(steps[begin + every])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_groups_lose_one_weight_after_the_other(tmp_path, n, m):
    begin, end = 2, 18
    model, steps = watched(tmp_path, hfc.GradualPruning(f"{n}:{m}", begin, end, every=2), max_steps=24)
    targets = hfc.find_targets(model)
    seen = set()
    for step, masks in steps.items():
        last = max([r for r in renewals(begin, end, 2) if r <= step], default=begin)
        wanted = m - n if step >= end else math.floor(cubic(m - n, begin, end, last))
        seen.add(wanted)
        for name, mask in masks.items():
            if targets[name].parameter.shape[1] % m == 0:
                assert (mask.unflatten(1, (-1, m)).sum(2) == wanted).all()
            else:
                assert not mask.any()
    assert seen == set(range(m - n + 1))


@pytest.mark.parametrize("kind", [runs.stock, runs.cram])
@pytest.mark.parametrize("text", ["unstructured:0.9", "unstructured:0.77:layer", "2:4", "4:8"])
def test_the_model_ends_with_exactly_the_pattern(tmp_path, kind, text):
    """Trained for some steps behind the end, it is what the pattern alone would keep of its weights."""
    pattern = hfc.parse_pattern(text)
    model, steps = watched(tmp_path, hfc.GradualPruning(text, 0.0, 0.5, every=3), kind)
    targets = hfc.find_targets(model)
    for name, mask in pattern.masks(targets).items():
        assert torch.equal(~mask, zeros(model)[name])
    assert count(steps[10]) == count(steps[20]) > 1000
    assert count(steps[9]) < count(steps[10])
    if text == "unstructured:0.9":
        assert count(steps[20]) == count_pruned(0.9, sum(t.parameter.numel() for t in targets.values()))


def test_a_chain_of_two_that_prune(tmp_path):
    """Single weights and groups together: at the end there is nothing left for it to do."""
    model, steps = watched(tmp_path, hfc.GradualPruning("unstructured:0.6+2:4", 0.0, 0.5, every=3))
    before, final = {n: p.clone() for n, p in model.named_parameters()}, zeros(model)
    hfc.compress(model, "unstructured:0.6+2:4")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert count(final) > 0.6 * sum(mask.numel() for mask in final.values())
    assert count(steps[9]) < count(steps[10]) == count(final)


def test_weights_that_are_zero_already_are_the_first_to_go(tmp_path):
    model = runs.pruned_vit("unstructured:0.3")
    before = zeros(model)
    pruning = hfc.GradualPruning("unstructured:0.9", 0, 10, every=1)
    model, steps = watched(tmp_path, pruning, model=model, learning_rate=0.0)
    small = [s for s in steps if cubic(0.9, 0, 10, min(s, 10)) < 0.3]
    assert small
    assert all(count(steps[s]) == count(before) for s in small)
    assert count(steps[20]) > 2 * count(before)
    assert changed(before, steps[20]) == 0


def test_what_begins_at_zero_learns_until_the_first_removal(tmp_path):
    """A layer that is initialised with zeros is not pruned, and not in a run that is resumed before the removal."""
    model, again = tiny_bert(), tiny_bert()
    for each in (model, again):
        torch.nn.init.zeros_(each.bert.encoder.layer[0].output.dense.weight)
    options = {"save_steps": 2, **SAVES}
    _, steps = watched(tmp_path, hfc.GradualPruning("unstructured:0.3", 4, 16, 4), runs.bert, model, **options)
    assert [count(steps[step]) for step in (1, 2, 4, 7)] == [0] * 4
    assert count(steps[8]) > 0
    trainer = runs.bert(tmp_path / "again", again, [hfc.GradualPruning("unstructured:0.3", 4, 16, 4)], **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(model, again)


def test_rounding_waits_for_the_end_of_the_training(tmp_path):
    model, steps = watched(
        tmp_path, hfc.GradualPruning("2:4+int8", 2, 10, every=2), max_steps=15, save_strategy="steps", save_steps=15
    )
    last = type(model).from_pretrained(tmp_path / "checkpoint-15")
    assert count(steps[15]) == count(zeros(last)) > 1500
    final = {n: t.parameter.detach().clone() for n, t in hfc.find_targets(model).items()}
    assert any(not torch.equal(t.parameter, final[n]) for n, t in hfc.find_targets(last).items())
    hfc.compress(last, "2:4+int8")
    assert all(torch.equal(t.parameter, final[n]) for n, t in hfc.find_targets(last).items())


def test_without_the_callback_the_model_stays_dense(tmp_path):
    """The negative control of all counts above."""
    model = tiny_vit()
    runs.stock(tmp_path, model).train()
    assert count(zeros(model)) == 0


def test_a_convolutional_net_whose_first_layer_has_no_groups(tmp_path):
    model, _ = watched(tmp_path, hfc.GradualPruning("2:4", 2, 12, every=2), model=tiny_resnet())
    report = hfc.compress(model, "2:4")
    assert report.skipped
    found = zeros(model)
    assert all(found[n].any() == (n not in report.skipped) for n in found)


@pytest.mark.parametrize("cut", [2, 6, 9, 14, 18])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, cut):
    """Before the first removal, at a renewal (6, 14), between two, and behind the end."""
    whole, resumed = tiny_bert(), tiny_bert()
    make = lambda: hfc.GradualPruning("unstructured:0.8", 0.1, 0.7, every=4)  # noqa: E731
    watch = Watch()
    runs.bert(tmp_path, whole, [make(), watch], save_steps=cut, **SAVES).train()
    trainer = runs.bert(tmp_path / "again", resumed, [make()], save_steps=cut, **SAVES)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{cut}"))
    assert same(whole, resumed)
    assert (count(watch.steps[cut]) > 0) == (cut >= 6)
    assert (count(watch.steps[cut]) == count(zeros(whole))) == (cut >= 14)


def test_a_resume_without_the_callback_loses_zeros(tmp_path):
    """The negative control of the test above."""
    whole, resumed = tiny_bert(), tiny_bert()
    pruning = hfc.GradualPruning("unstructured:0.8", 0.1, 0.7, every=4)
    runs.bert(tmp_path, whole, [pruning], save_steps=16, **SAVES).train()
    runs.bert(tmp_path / "again", resumed, **SAVES).train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    assert changed(zeros(whole), zeros(resumed)) > 100


def run_worker(folder, *flags, kill_at=None):
    """Train in a process of its own; SIGKILL while it pauses behind the checkpoint of that step.

    The names of BERT are the same on disk: the stock Trainer resumes no other ones (transformers#43701).
    """
    worker = ROOT / "tests" / "distributed" / "train_pruned.py"
    process = subprocess.Popen(
        [sys.executable, str(worker), str(folder), "gradual", "--bert", "--save_steps", "7", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if kill_at is not None:
        state = folder / "gradual" / f"checkpoint-{kill_at}" / "trainer_state.json"
        while not state.is_file() and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, process.stdout.read().decode()
        process.send_signal(signal.SIGKILL)
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == (0 if kill_at is None else -signal.SIGKILL), output


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(tmp_path):
    run_worker(tmp_path / "whole")
    run_worker(tmp_path / "cut", "--pause_after_save", "60", kill_at=7)
    assert not (tmp_path / "cut" / "gradual.pt").exists()
    run_worker(tmp_path / "cut", "--resume_step", "7")
    whole, cut = (torch.load(tmp_path / d / "gradual.pt", weights_only=True) for d in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert sum(int((w == 0).sum()) for w in whole.values()) > 1000


def test_a_zero_that_another_callback_undoes_is_found_at_the_save(tmp_path):
    weight = "vit.layers.0.mlp.fc1.weight"
    callbacks = [hfc.GradualPruning("unstructured:0.8", 0, 6, every=2), Damage(weight, "on_step_end", 8)]
    trainer = runs.stock(tmp_path, tiny_vit(), callbacks, save_strategy="steps", save_steps=8)
    with pytest.raises(RuntimeError, match=f"zeros of '{weight}' are lost at step 8: .*GradualPruning"):
        trainer.train()


def test_no_renewal_looks_at_a_number():
    """Tensors without values raise where one is asked for."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    for text in ("unstructured:0.8", "unstructured:0.8:layer", "2:4"):
        pruning = hfc.GradualPruning(text, 0, 10, every=1)
        pruning._first, pruning._last, pruning.targets = 0, 10, hfc.find_targets(model)
        for step in (5, 10):
            pruning._renew(step)
            assert [m.shape for m in pruning.masks.values()] == [(16, 8), (4, 16)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("int8", 0, 10), "int8 cannot be reached little by little.*chain such as 2:4[+]int8"),
        (("low_rank:0.5", 0, 10), "low_rank:0.5.* (no masks|no pattern)"),
        (("3:2", 0, 10), "is no pattern"),
        ((124, 0, 10), 'write "2:4"'),
        (("2:4", -1, 10), "begin=-1 is no moment of a run: give a whole number of optimizer steps"),
        (("2:4", 0, 1.5), r"end=1.5 is no moment of a run.*or a share of the run in \[0.0, 1.0\]"),
        (("2:4", float("nan"), 10), "begin=nan is no moment"),
        (("2:4", True, 10), "begin=True is no moment"),
        (("2:4", "0.1", 10), "begin='0.1' is no moment"),
        (("2:4", 0, 10, 0), "every must be a whole number of at least 1, got 0"),
        (("2:4", 0, 10, 2.5), "every must be a whole number of at least 1, got 2.5"),
    ],
)
def test_wrong_schedules_fail_at_once(fields, message):
    with pytest.raises(ValueError, match=message):
        hfc.GradualPruning(*fields)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        (("2:4", 5, 21, 1), {}, "from step 5 to step 21 every 1 does not fit into a run of 20 steps"),
        (("2:4", 0.5, 0.5, 1), {}, "from step 10 to step 10"),
        (("2:4", 12, 0.5, 1), {}, "from step 12 to step 10"),
        (("2:4", 0, 10, 10), {}, "more than `every` steps after begin"),
        (("3:7", 0, 10, 2), {}, "3:7 leaves all 13 targets dense: the first, because its reduction axis of 3"),
        (("2:4", 0, 10, 2), {"load_best_model_at_end": True}, 'set eval_strategy="steps" and eval_delay=10'),
        (("2:4", 0, 10, 2), {"load_best_model_at_end": True, "eval_delay": 9}, "from before step 10"),
    ],
)
def test_what_does_not_fit_into_the_run_fails_before_the_first_step(tmp_path, fields, options, message):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, **options}
    trainer = runs.stock(tmp_path, tiny_vit(), [hfc.GradualPruning(*fields)], **options)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_best_model_from_behind_the_end_may_come_back(tmp_path):
    model = tiny_bert()
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "eval_delay": 10, **SAVES}
    trainer = runs.bert(tmp_path, model, [hfc.GradualPruning("2:4", 0, 10, 2)], load_best_model_at_end=True, **options)
    trainer.train()
    assert count(zeros(model)) == sum(t.parameter.numel() for t in hfc.find_targets(model).values()) // 2


def test_a_training_that_stops_early_says_that_the_pattern_is_not_reached(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    model = tiny_vit()
    runs.stock(tmp_path, model, [hfc.GradualPruning("2:4+int8", 0, 10, 2), Stop()]).train()
    assert "ended at step 5, before step 10 in which GradualPruning would have reached 2:4+int8" in caplog.text
    assert 0 < count(zeros(model)) < 1500


def test_filters_go_with_their_biases_and_none_comes_back(tmp_path):
    """So that what is evaluated in the training is the model that the training leaves."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(2))
    net(torch.zeros(1, 3, 8, 8))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = net

        def forward(self, pixel_values, labels=None):
            logits = self.layers(pixel_values)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    nn.init.constant_(net[0].bias, 0.5)
    data = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 2} for i in range(32)]
    seen = []

    class Biases(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(net[0].bias.detach().clone())

    pruning = hfc.GradualPruning("filters:0.5", begin=0, end=10, every=2)
    runs.stock(tmp_path, Net(), [pruning, Biases()], data, max_steps=20).train()
    assert [int((bias == 0).sum()) for bias in seen[10:]] == [4] * 10
    assert torch.equal(seen[-1], net[0].bias)
    gone = net[0].weight.detach().flatten(1).eq(0).all(1)
    assert torch.equal(gone, net[0].bias == 0)
