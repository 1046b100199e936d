"""Short trainings that the tests of callbacks share: the stock Trainer and ours, pruned models, watching callbacks."""

from __future__ import annotations

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_compress as hfc
from tests.conftest import image_samples, text_samples, tiny_bert, tiny_vit

MOMENTUM = {"optim": "sgd", "optim_args": "momentum=0.9,weight_decay=0.1", "learning_rate": 0.05}
ADAMW = {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 1e-2}


def arguments(folder, kind=TrainingArguments, **overrides):
    fields = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 16,
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        **MOMENTUM,
    }
    return kind(**{**fields, **overrides})


def stock(folder, model, callbacks=(), data=None, **overrides):
    data = data or image_samples()
    args = arguments(folder, **overrides)
    return Trainer(model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=[*callbacks])


def cram(folder, model, callbacks=(), **overrides):
    args = arguments(folder, hfc.CrAMConfig, patterns=["unstructured:0.9", "2:4"], rho=0.1, **overrides)
    return hfc.CrAMTrainer(model=model, args=args, train_dataset=image_samples(), callbacks=[*callbacks])


def bert(folder, model, callbacks=(), **overrides):
    """Names of this model are the same on disk, so that the stock Trainer can resume it."""
    return stock(folder, model, callbacks, text_samples(), **overrides)


def pruned_vit(pattern="unstructured:0.7"):
    model = tiny_vit()
    hfc.compress(model, pattern)
    return model


def pruned_bert(pattern="unstructured:0.7"):
    model = tiny_bert()
    hfc.compress(model, pattern)
    return model


def zeros(model, **globs):
    """Where the targets are zero."""
    return {n: t.parameter.detach() == 0 for n, t in hfc.find_targets(model, **globs).items()}


def count(masks):
    return sum(int(mask.sum()) for mask in masks.values())


def changed(before, after):
    """Zeros that are none any more."""
    return sum(int((before[n] & ~after[n]).sum()) for n in before)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Watch(TrainerCallback):
    """Zeros after every step."""

    def __init__(self):
        self.steps = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps[state.global_step] = zeros(model)


class Damage(TrainerCallback):
    """Writes ones into the first row of a weight, at one event of one step."""

    def __init__(self, weight, event, step):
        self.weight, self.step = weight, step
        setattr(self, event, self.strike)

    def strike(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.get_parameter(self.weight)[0] = 1.0
