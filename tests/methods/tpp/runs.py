"""A tiny training with TPP, and what is compared after it."""

from __future__ import annotations

import torch
from transformers import TrainerCallback

import hf_compress as hfc
from tests.conftest import image_samples, tiny_resnet

BLOCKS = [f"resnet.encoder.stages.{stage}.layers.0.layer.0" for stage in (0, 1)]


def config(folder, **overrides):
    fields = {
        "output_dir": str(folder),
        "patterns": ["filters:0.5"],
        "grow_steps": 8,
        "stabilize_steps": 4,
        "grow_every": 2,
        "max_steps": 4,
        "per_device_train_batch_size": 16,
        "learning_rate": 0.05,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "trainability_samples": 2,
    }
    return hfc.TPPConfig(**{**fields, **overrides})


def make(folder, model=None, data=None, **overrides):
    data = image_samples() if data is None else data
    return hfc.TPPTrainer(
        model=tiny_resnet() if model is None else model,
        args=config(folder, **overrides),
        train_dataset=data,
        eval_dataset=data,
    )


def train(folder, model=None, **overrides):
    trainer = make(folder, model, **overrides)
    trainer.train()
    return trainer


def equal(a, b):
    states = a.state_dict(), b.state_dict()
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(x, y) for x, y in zip(*(s.values() for s in states), strict=True))


class Snapshots(TrainerCallback):
    """The weights after every step."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.states.append({name: p.detach().clone() for name, p in model.named_parameters()})
