"""What TPP refuses, by name: settings, models and checkpoints."""

from __future__ import annotations

import json
import math

import pytest
import torch

import hf_compress as hfc
from tests.conftest import image_samples, tiny_resnet
from tests.methods.tpp.runs import BLOCKS, config, make, train


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": ["2:4"]}, "'2:4' removes nothing; allowed: filters:SHARE"),
        ({"patterns": []}, "patterns is empty"),
        ({"penalty": "l3"}, "penalty is one of trainability, growing_l2, kernel_orthogonality, none, got 'l3'"),
        ({"profile": "long"}, "profile is one of paper, paper_imagenet, short, got 'long'"),
        ({"gram_scale": "max"}, "gram_scale is one of mean, n, sum, got 'max'"),
        ({"speed_up": 1.0}, "speed_up must be above 1, got 1.0"),
        ({"grow_steps": -1}, "grow_steps is a whole number of at least 0, got -1"),
        ({"ceiling": math.nan}, "ceiling must be a number of at least 0, got nan"),
        ({"multiple_of": 0}, "multiple_of must be at least 1, got 0"),
        ({"penalty_rate": -1.0}, "penalty_rate must be a number of at least 0, got -1.0"),
        ({"trainability_samples": -1}, "trainability_samples is a whole number, 0 for none, got -1"),
    ],
)
def test_wrong_settings_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_what_does_not_fit_the_model_is_named_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="setting 7 layers to zero, one every 100 steps, takes 701 steps, more than"):
        train(tmp_path, zero_every=100, stabilize_steps=700)
    with pytest.raises(ValueError, match="matches no layer with filters"):
        train(tmp_path, patterns=["conv9=filters:0.5"])
    with pytest.raises(ValueError, match=r"filters:0.5 and filters:0.5 have the same revision filters-0.50"):
        train(tmp_path, variants=["filters:0.5"], dense_epochs=1)
    with pytest.raises(ValueError, match=r"weights are torch.bfloat16, which rounds the small steps of TPP away"):
        train(tmp_path, tiny_resnet().bfloat16())
    with pytest.raises(
        ValueError, match="are frozen, so that no penalty could make it needless; unfreeze them, or set"
    ):
        train(tmp_path, tiny_resnet().requires_grad_(False))
    assert not list(tmp_path.glob("**/checkpoint-*"))
    optimizers = torch.optim.SGD(tiny_resnet().parameters(), 0.1), None
    with pytest.raises(ValueError, match="TPP makes new parameters, which an optimizer or scheduler that is passed"):
        hfc.TPPTrainer(model=tiny_resnet(), args=config(tmp_path), train_dataset=image_samples(), optimizers=optimizers)


@pytest.mark.parametrize(
    "changes",
    [
        {"phase": "prune"},
        {"pruned": {f"{BLOCKS[0]}.convolution": ["0"]}},
        {"pruned": [1]},
        {"pattern": 5},
        {"state": 1, "phase": None},
    ],
)
def test_a_state_that_was_edited_is_refused(tmp_path, changes):
    train(tmp_path, save_strategy="steps", save_steps=4)
    path = tmp_path / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["TPPProgress"]["attributes"].update(changes)
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="checkpoint-4 has a trainer_state.json that no TPPTrainer wrote"):
        make(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    args = hfc.CrAMConfig(
        str(tmp_path), max_steps=2, save_steps=2, save_strategy="steps", use_cpu=True, disable_tqdm=True, optim="sgd"
    )
    hfc.CrAMTrainer(model=tiny_resnet(), args=args, train_dataset=image_samples()).train()
    with pytest.raises(ValueError, match="checkpoint-2 is no checkpoint of a TPPTrainer"):
        make(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        make(tmp_path / "empty").train(resume_from_checkpoint=True)
