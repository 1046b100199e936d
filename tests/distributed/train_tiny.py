"""A short CrAM training that any launcher can start; it writes its weights and what every rank saw."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

import hf_compress as hfc
from tests.conftest import image_samples, tiny_vit


class Recorder(hfc.CrAMTrainer):
    """Keeps the labels of the batches that this rank trained on."""

    only_last = False

    def get_batch_samples(self, *args, **kwargs):
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.seen = [*getattr(self, "seen", []), *(b["pixel_values"].sum().item() for b in batches)]
        if self.only_last:
            self._window = batches[-1:]
        return batches, num_items


class Pause(TrainerCallback):
    def __init__(self, seconds):
        self.seconds = seconds

    def on_save(self, args, state, control, **kwargs):
        time.sleep(self.seconds)


def main():
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
    options = parser.parse_args()
    model = tiny_vit(hidden_dropout_prob=options.dropout, attention_probs_dropout_prob=options.dropout)
    args = hfc.CrAMConfig(
        output_dir=str(options.output_dir),
        rho=0.1,
        patterns=["unstructured:0.5", "2:4"],
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
    )
    data = image_samples()
    trainer = Recorder(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        callbacks=[Pause(options.pause_after_save)],
    )
    trainer.only_last = options.only_last
    trainer.train(resume_from_checkpoint=options.resume)
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    options.output_dir.mkdir(exist_ok=True, parents=True)
    facts = {
        "world": world,
        "rank": rank,
        "seen": trainer.seen,
        "ddp": type(trainer.model_wrapped).__name__,
        "log": [row for row in trainer.state.log_history if "compressed_loss" in row],
    }
    if options.family:
        family = trainer.build_family(["unstructured:0.5", "2:4"])
        facts["metrics"] = [v.metrics for v in (family.dense, *family.variants)]
    (options.output_dir / f"rank{rank}.json").write_text(json.dumps(facts))
    weights = {n: p.detach().clone() for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}
    torch.save(weights, options.output_dir / ("weights.pt" if rank == 0 else f"weights{rank}.pt"))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
