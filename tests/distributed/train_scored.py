"""Trainings with compressed evaluations and with a teacher, which any launcher can start."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

import hf_compress as hfc
from hf_compress.distributed import gathered, local, reshard
from tests.conftest import image_samples, tiny_resnet, tiny_vit
from tests.distributed.launch import end

PATTERNS = ["unstructured:0.9", "unstructured:0.8:layer", "2:4+int8", "neurons:0.5", "heads:0.5", "low_rank:0.5"]
FAILS_AT = 3  # the second pattern of the first evaluation
SCENARIOS = {  # patterns, whether there is a teacher
    "plain": (None, False),
    "scored": (PATTERNS, False),
    "taught": (None, True),
    "failing": (PATTERNS, False),
    "resnet": (["filters:0.5", "2:4"], False),
}


class Sharding:
    """Accelerate enters FSDP from GPU-like launches only; a test on the CPU has to pretend."""

    sharded = False

    def create_accelerator_and_postprocess(self):
        if self.sharded:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


class CrAM(Sharding, hfc.CrAMTrainer):
    pass


class SFW(Sharding, hfc.SFWTrainer):
    pass


def strong(model):
    """What a pattern changes is then seen in the loss."""
    with torch.no_grad():
        for target in hfc.find_targets(model).values():
            target.parameter.mul_(8)
    return model


def scorer(name, seen):
    def metrics(prediction):
        seen.append(1)
        if name == "failing" and len(seen) == FAILS_AT:
            raise ArithmeticError("no such metric")
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    return metrics


def train(name, options):
    patterns, is_taught = SCENARIOS[name]
    kinds = {
        "cram": (CrAM, hfc.CrAMConfig, {"optim": "sgd", "rho": 0.1}),
        "sfw": (SFW, hfc.SFWConfig, {"free": "adamw", "free_learning_rate": 1e-7}),
    }
    trainer_class, config_class, fields = kinds[options.method]
    if options.fsdp:
        sharding = {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["ViTLayer"],
            "reshard_after_forward": False,  # gathered weights stay, and must not be taken for the edited ones
            "cpu_ram_efficient_loading": is_taught,  # a teacher must be there on every rank
        }
        fields |= {"fsdp": True, "fsdp_config": sharding}
    Sharding.sharded = options.fsdp
    data = image_samples()
    args = config_class(
        output_dir=str(options.output_dir / name),
        max_steps=1 if name == "resnet" else 2,
        per_device_train_batch_size=16 if name == "resnet" else options.batch,  # of its calibration too
        gradient_accumulation_steps=options.accumulation,
        learning_rate=0.0 if name == "resnet" else 0.05,  # its batch norms see other batches on other ranks
        save_strategy="no",
        logging_steps=1,
        eval_strategy="no" if name in ("resnet", "failing") else "steps",
        eval_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        eval_patterns=patterns,
        teacher=options.teacher if is_taught else None,
        **fields,
    )
    trainer = trainer_class(
        model=strong(tiny_resnet() if name == "resnet" else tiny_vit()),
        args=args,
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=scorer(name, []),
    )
    facts = {"teacher": trainer.teacher and sum(p.double().sum().item() for p in trainer.teacher.parameters())}
    trainer.train()
    if name == "resnet":
        trainer.evaluate()
    if name == "failing":
        facts |= fail(trainer)
    reshard(trainer.accelerator.unwrap_model(trainer.model))
    live = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    facts |= {
        "rank": trainer.accelerator.process_index,
        "wrapper": type(trainer.model_wrapped).__name__,
        "kinds": sorted({type(p).__name__ for p in live.values()}),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "scores": [row for row in trainer.state.log_history if "eval_loss" in row],
    }
    return facts, {n: gathered(p).detach().clone() for n, p in live.items()}


def fail(trainer):
    """The weights and where they lie, before an evaluation that fails and after."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    reshard(model)
    before = {n: (local(p).data_ptr(), local(p).detach().clone()) for n, p in model.named_parameters()}
    error = None
    try:
        trainer.evaluate()
    except ArithmeticError as raised:
        error = str(raised)
    reshard(model)
    after = {n: local(p) for n, p in model.named_parameters()}
    same = all(
        after[n].data_ptr() == pointer and torch.equal(after[n], value) for n, (pointer, value) in before.items()
    )
    return {"error": error, "same": same}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("scenarios", nargs="+", choices=SCENARIOS)
    parser.add_argument("--method", default="cram")
    parser.add_argument("--teacher")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--fsdp", action="store_true")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if options.fsdp:  # as accelerate launch --use_fsdp sets them
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    facts = {}
    for name in options.scenarios:
        facts[name], weights = train(name, options)
        rank = facts[name]["rank"]
        torch.save(weights, options.output_dir / f"{name}{rank}.pt")
    (options.output_dir / f"rank{rank}.json").write_text(json.dumps(facts))
    end()


if __name__ == "__main__":
    main()
