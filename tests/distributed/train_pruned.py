"""Trainings of pruned models that any launcher can start; each leaves its weights and what every rank saw."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainerCallback

import hf_compress as hfc
from hf_compress.distributed import gathered, local
from tests.callbacks.runs import ADAMW, MOMENTUM, arguments
from tests.conftest import image_samples, text_samples, tiny_bert, tiny_vit
from tests.distributed.launch import end

WEIGHT = "vit.layers.1.mlp.fc2.weight"


class Recorder(Trainer):
    """Keeps the sums of the batches that this rank trained on."""

    sharded = False

    def create_accelerator_and_postprocess(self):
        if self.sharded:  # Accelerate enters FSDP from GPU-like launches only; a test on the CPU has to pretend
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()

    def get_batch_samples(self, *args, **kwargs):
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.seen = [
            *getattr(self, "seen", []),
            *(b[self.model.main_input_name].double().sum().item() for b in batches),
        ]
        return batches, num_items


class Watch(TrainerCallback):
    """Zeros on this rank after every step: how many there are, and how many of the step before are none any more."""

    def __init__(self):
        self.counts, self.lost, self.before = [], [], None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        zeros = {n: local(t.parameter.detach()) == 0 for n, t in hfc.find_targets(model).items()}
        self.counts.append({n: int(z.sum()) for n, z in zeros.items()})
        if self.before is not None:
            self.lost.append(sum(int((self.before[n] & ~zeros[n]).sum()) for n in zeros))
        self.before = zeros


class Damage(TrainerCallback):
    """Undoes the zeros of one weight after step 4, on the last rank alone where each rank has a part."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weight = model.get_parameter(WEIGHT)
        if state.global_step == 4 and (not hasattr(weight, "to_local") or args.process_index == args.world_size - 1):
            with torch.no_grad():
                local(weight).fill_(1.0)


class Pause(TrainerCallback):
    def __init__(self, seconds):
        self.seconds = seconds

    def on_save(self, args, state, control, **kwargs):
        time.sleep(self.seconds)


def gradual(text):
    return hfc.GradualPruning(text, 0.1, 0.7, every=4)


def one_zero(model):
    """In the first row of one weight: sharded, the other rank has none."""
    with torch.no_grad():
        model.get_parameter(WEIGHT)[0, 0] = 0.0


def pruned(text):
    return lambda model: hfc.compress(model, text)


EVALUATED = {"eval_strategy": "steps", "eval_steps": 5}  # after which FSDP2 shows some weights whole
SCENARIOS = {  # what is done before the training, callbacks, arguments
    "lock": (pruned("unstructured:0.7"), lambda: [hfc.SparsityLock()], {"max_steps": 200}),
    "lock_adamw": (
        pruned("2:4"),
        lambda: [hfc.SparsityLock()],
        {**ADAMW, **EVALUATED, "save_strategy": "steps", "save_steps": 5, "gradient_accumulation_steps": 2},
    ),
    "free": (pruned("unstructured:0.7"), list, {}),
    "damaged": (pruned("2:4"), lambda: [hfc.SparsityLock(), Damage()], {"save_strategy": "steps", "save_steps": 4}),
    "dense": (None, lambda: [hfc.SparsityLock()], {}),
    "corner": (one_zero, lambda: [hfc.SparsityLock()], {"max_steps": 5}),
    "gradual": (None, lambda: [gradual("unstructured:0.8")], {**ADAMW, **EVALUATED}),
    "gradual_layer": (None, lambda: [gradual("unstructured:0.77:layer")], {}),
    "gradual_groups": (None, lambda: [gradual("2:4+int8")], {}),
}


def train(name, options):
    prepare, callbacks, overrides = SCENARIOS[name]
    model, data = (tiny_bert(), text_samples()) if options.bert else (tiny_vit(), image_samples())
    if prepare:
        prepare(model)
    if options.fsdp:
        overrides = {**overrides, "fsdp": True}
        overrides["fsdp_config"] = {"version": 2, "transformer_layer_cls_to_wrap": ["ViTLayer"]}
    if options.save_steps:
        overrides = {**overrides, "save_strategy": "steps", "save_steps": options.save_steps}
    watch = Watch()
    folder = options.output_dir / name
    Recorder.sharded = options.fsdp
    trainer = Recorder(
        model=model,
        args=arguments(folder, **{**MOMENTUM, "per_device_train_batch_size": 8, **overrides}),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[*callbacks(), watch, Pause(options.pause_after_save)],
    )
    facts = {"error": None}
    resume = None if options.resume_step is None else str(folder / f"checkpoint-{options.resume_step}")
    try:
        trainer.train(resume_from_checkpoint=resume)
    except (RuntimeError, ValueError) as error:
        facts["error"] = f"{type(error).__name__}: {error}"
    live = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    facts |= {
        "rank": trainer.accelerator.process_index,
        "world": trainer.accelerator.num_processes,
        "wrapper": type(trainer.model_wrapped).__name__,
        "kinds": sorted({type(p).__name__ for p in live.values()}),
        "rows": {n: local(p).shape[0] for n, p in live.items()},
        "seen": getattr(trainer, "seen", []),
        "step": trainer.state.global_step,
        "counts": watch.counts,
        "lost": watch.lost,
    }
    weights = {n: gathered(p).detach().clone() for n, p in live.items()}
    return facts, weights


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("scenarios", nargs="+", choices=SCENARIOS)
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--bert", action="store_true")
    parser.add_argument("--save_steps", type=int, default=0)
    parser.add_argument("--resume_step", type=int)
    parser.add_argument("--pause_after_save", type=float, default=0.0)
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    facts = {}
    for name in options.scenarios:
        facts[name], weights = train(name, options)
        rank = facts[name]["rank"]
        torch.save(weights, options.output_dir / (f"{name}.pt" if rank == 0 else f"{name}{rank}.pt"))
    (options.output_dir / f"rank{rank}.json").write_text(json.dumps(facts))
    end()


if __name__ == "__main__":
    main()
