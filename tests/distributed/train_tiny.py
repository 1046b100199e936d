"""A short training that any launcher can start; it writes its weights and what every rank saw."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from transformers import TrainerCallback

import hf_compress as hfc
from hf_compress.distributed import gathered, local
from tests.conftest import image_samples, text_samples, tiny_bert, tiny_vit
from tests.distributed.launch import end


class Recording:
    """Keeps the labels of the batches that this rank trained on."""

    only_last = False

    def get_batch_samples(self, *args, **kwargs):
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.seen = [
            *getattr(self, "seen", []),
            *(b[self.model.main_input_name].double().sum().item() for b in batches),
        ]
        if self.only_last:
            self._window = batches[-1:]
        return batches, num_items


class Recorder(Recording, hfc.CrAMTrainer):
    pass


class SFWRecorder(Recording, hfc.SFWTrainer):
    pass


class TPPRecorder(Recording, hfc.TPPTrainer):
    pass


class LilNetXRecorder(Recording, hfc.LilNetXTrainer):
    pass


class Sharding:
    """Accelerate enters FSDP from GPU-like launches only; a test on the CPU has to pretend."""

    def create_accelerator_and_postprocess(self):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


class Sharded(Sharding, Recorder):
    pass


class SFWSharded(Sharding, SFWRecorder):
    pass


class TPPSharded(Sharding, TPPRecorder):
    pass


class LilNetXSharded(Sharding, LilNetXRecorder):
    pass


class Pause(TrainerCallback):
    def __init__(self, seconds):
        self.seconds = seconds

    def on_save(self, args, state, control, **kwargs):
        time.sleep(self.seconds)


def parsed():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--max_steps", type=int, default=4)
    parser.add_argument("--save_steps", type=int, default=0)
    parser.add_argument("--optim", default="sgd")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--resume")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--pause_after_save", type=float, default=0.0)
    parser.add_argument("--only_last", action="store_true")
    parser.add_argument("--family", action="store_true")
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--bucket_view", action="store_true")
    parser.add_argument("--model", default="vit")
    parser.add_argument("--no_check", action="store_true")
    parser.add_argument("--method", default="cram", choices=list(TRAINERS))
    parser.add_argument("--constraint")
    parser.add_argument("--only_rank_0", action="store_true")
    return parser.parse_args()


TRAINERS = {
    "cram": (Recorder, Sharded),
    "sfw": (SFWRecorder, SFWSharded),
    "tpp": (TPPRecorder, TPPSharded),
    "lilnetx": (LilNetXRecorder, LilNetXSharded),
}


def method_of(options):
    """Its class of arguments, and its own ones."""
    short = {"grow_steps": 4, "grow_every": 1, "stabilize_steps": 4}
    coding = {"rate_weight": 0.3, "slice_weight": 0.1, "rate_latents": 400, "include": ["*vit.*"], "linear_slice": 4}
    return {
        "cram": (hfc.CrAMConfig, {"rho": 0.1, "patterns": ["unstructured:0.5", "2:4"]}),
        "sfw": (hfc.SFWConfig, {"constraint": options.constraint}),
        "tpp": (hfc.TPPConfig, {"patterns": ["neurons:0.5", "heads:0.5"], **short}),
        "lilnetx": (hfc.LilNetXConfig, coding),
    }[options.method]


def arguments(options):
    config_class, method = method_of(options)
    sharding = {}
    if options.fsdp:
        sharding = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["ViTLayer"]}}
    return config_class(
        output_dir=str(options.output_dir),
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=0.05 if options.optim == "sgd" else 1e-2,
        optim=options.optim,
        seed=options.seed,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        check_loss_scaling=not options.no_check,
        **method,
        **sharding,
    )


def make_trainer(options):
    if options.model == "bert":
        model, data = tiny_bert(), text_samples()
    else:
        model = tiny_vit(hidden_dropout_prob=options.dropout, attention_probs_dropout_prob=options.dropout)
        data = image_samples()
    args = arguments(options)
    trainer = TRAINERS[options.method][options.fsdp](
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        callbacks=[Pause(options.pause_after_save)],
    )
    trainer.only_last = options.only_last
    if options.only_rank_0 and options.method == "lilnetx":  # noise of its own on every process
        args.seed += trainer.accelerator.process_index
    elif options.only_rank_0:  # the penalty reaches one process alone
        trainer.regularization.strength = lambda step: float(trainer.accelerator.process_index == 0)
    if options.bucket_view:
        trainer.accelerator.ddp_handler = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    return trainer


def main():
    options = parsed()
    trainer = make_trainer(options)
    trainer.train(resume_from_checkpoint=options.resume)
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    options.output_dir.mkdir(exist_ok=True, parents=True)
    facts = {
        "world": world,
        "rank": rank,
        "seen": trainer.seen,
        "ddp": type(trainer.model_wrapped).__name__,
        "log": [row for row in trainer.state.log_history if "loss" in row],
        "kinds": sorted({type(p).__name__ for p in trainer.model.parameters()}),
        "bucket_view": getattr(trainer.model_wrapped, "gradient_as_bucket_view", None),
        "rows": [local(p).shape[0] for p in trainer.model.parameters()],
    }
    if options.family:
        family = trainer.build_family(["unstructured:0.5", "2:4"])
        facts["variants"] = [v.pattern for v in family.variants]
        facts["metrics"] = [v.metrics for v in (family.dense, *family.variants)]
    (options.output_dir / f"rank{rank}.json").write_text(json.dumps(facts))
    live = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    weights = {n: gathered(p).detach().clone() for n, p in live}
    torch.save(weights, options.output_dir / ("weights.pt" if rank == 0 else f"weights{rank}.pt"))
    end()


if __name__ == "__main__":
    main()
