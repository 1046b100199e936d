"""SFW in the Trainer: an optimizer of its own, a report of the start, and the Frank-Wolfe gap in the log."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from contextlib import closing
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.utils import logging

from ...targets import refuse_half_precision
from ...training import CompressionMixin, TrainingBatches
from .config import SFWConfig
from .factory import create_sfw
from .init import sfw_init
from .optimizer import SFW

logger = logging.get_logger(__name__)


class SFWMixin(CompressionMixin):
    """Makes any `Trainer` class train with SFW: `class MySFWTrainer(SFWMixin, MyTrainer)`.

    The log gets "fw_gap", which falls to 0 where no vertex is better.
    """

    method = "sfw"
    config_class = SFWConfig
    lr_scheduler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        found = self.optimizer if self.optimizer is not None else self.optimizer_cls_and_kwargs
        if found is not None and not isinstance(found, SFW):
            raise ValueError(
                f"SFW is an optimizer itself, and was given another one ({found!r:.80}); leave it out, or pass what "
                "create_sfw makes"
            )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """`SFW` with the regions that the arguments name."""
        self._refuse_what_hides_weights()
        if self.optimizer is not None:
            return self.optimizer
        args = self.args
        self.optimizer = create_sfw(
            self.accelerator.unwrap_model(self.model if model is None else model),
            args.constraint,
            lr=args.learning_rate,
            momentum=args.momentum,
            dampening=args.dampening,
            rescale=args.rescale,
            scope=args.scope,
            group_by=args.group_by,
            include=args.include,
            exclude=args.exclude,
            free=args.free,
            free_lr=args.free_learning_rate,
            weight_decay=args.weight_decay,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            shrink=False,
        )
        if args.sfw_init_steps and not self._is_resumed:
            self._learn_scales(self.optimizer)
        if args.shrink and not self._is_resumed:
            self._shrink(self.optimizer)
        return self.optimizer

    def _learn_scales(self, optimizer: SFW) -> None:
        model = self.accelerator.unwrap_model(self.model)

        def loss(called: Any, batch: Any) -> torch.Tensor:
            value: Any = self.compute_loss(called, self._prepare_inputs(batch))
            return value

        with closing(self._endless_batches()) as batches:  # the generators are as they were when it is closed
            steps, lr = self.args.sfw_init_steps, self.args.sfw_init_learning_rate
            scales = sfw_init(model, optimizer, batches, loss, steps, lr)
        for name, scale in scales.items():
            logger.info(f"{name}: SFW-Init scaled it by {scale:.3f}")

    def _endless_batches(self) -> Generator[Any]:
        """Batches of training data in an order that the seed and the rank choose."""
        args, rank = self.args, self.accelerator.process_index
        for epoch in itertools.count():
            yield from TrainingBatches(self, args.seed + 1000 * epoch + rank)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The scheduler of the arguments, or drops of the learning rate where `lr_drops` says so."""
        if self.args.lr_drops is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        drops = [share * num_training_steps for share in self.args.lr_drops]
        optimizer = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = LambdaLR(optimizer, lambda step: 0.1 ** sum(step >= drop for drop in drops))
        self._created_lr_scheduler = True  # so that the Trainer makes a new one for the next training
        return self.lr_scheduler

    def _shrink(self, optimizer: SFW) -> None:
        groups = [g for g in optimizer.param_groups if g["constraint"] is not None]
        factors = [float(factor) for factor in optimizer.shrink_()]
        is_global = self.args.scope == "global"
        names = ["all weights" if is_global and g["params"][1:] else ", ".join(g["param_names"]) for g in groups]
        for name, group, factor in zip(names, groups, factors, strict=True):
            logger.info(f"{name}: in {group['constraint']}, scaled by {factor:.3f}")
        outside = sum(factor < 1 for factor in factors)
        if outside:
            smallest, name = min(zip(factors, names, strict=True))
            logger.warning(
                f"{outside} of {len(factors)} regions did not hold their weights, which were scaled down: the most "
                f"{name}, to {smallest:.2f} of what it was. A radius {1 / smallest:.1f} times as large holds them all, "
                "which matters for weights that were trained; for new ones shrinking is usual."
            )

    def _refuse_what_hides_weights(self) -> None:
        way_out = "launch it on one process, with DistributedDataParallel (accelerate launch --multi_gpu) or with FSDP2"
        if self.is_deepspeed_enabled:
            raise ValueError(f"SFW needs single weights, of which DeepSpeed makes one flat tensor; {way_out}")
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError(f"SFW needs single weights, which FSDP1 flattens into one; {way_out} (fsdp_version: 2)")
        if getattr(self.model, "is_quantized", False):
            raise ValueError("SFW moves weights, and this model's are quantized; load it without quantization")
        refuse_half_precision(self.model, "SFW")

    @property
    def sfw(self) -> SFW:
        """The `SFW` optimizer, without what Accelerate wraps around it."""
        return self.optimizer if isinstance(self.optimizer, SFW) else self.optimizer.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As of the class behind it; the gap is computed in the steps that are logged."""
        next_step = self.state.global_step + 1
        every = self.state.logging_steps if self.args.logging_strategy == "steps" else 1
        self.sfw.tracks_gap = next_step % max(every, 1) == 0 or next_step == self.state.max_steps
        return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds "fw_gap": <m, w - v> of the last step, summed over the regions."""
        if "loss" in logs and self.sfw.gap is not None:
            logs["fw_gap"] = self.sfw.gap.item()
        super().log(logs, *args, **kwargs)


class SFWTrainer(SFWMixin, Trainer):
    """`transformers.Trainer` that trains with SFW; takes an `SFWConfig` as `args`, everything else as usual.

    ```python
    args = SFWConfig("out", constraint="k_support", k="0.1", radius="init:10")
    trainer = SFWTrainer(model=model, args=args, train_dataset=..., eval_dataset=...)
    trainer.train()
    family = trainer.build_family(["unstructured:0.9", "unstructured:0.95"])
    ```
    """
