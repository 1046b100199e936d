"""CrAM in the Trainer: a second sweep over the accumulation window, and nothing of the loop is overridden."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from transformers import Trainer

from ...distributed import total_norm
from ...training import CompressionMixin
from .config import CrAMConfig
from .optimizer import CrAM


class CrAMMixin(CompressionMixin):
    """Makes any `Trainer` class train with CrAM: `class MyCrAMTrainer(CrAMMixin, MyTrainer)`.

    `training_step` of the class behind it runs twice for every batch. The log gets "compressed_loss" beside "loss".
    """

    method = "cram"
    config_class = CrAMConfig
    _cutting_flags = ("eval_patterns", "variants", "patterns")
    _window: list[Any]
    _compressed_loss: torch.Tensor | None = None
    _num_second_sweeps = 0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, wrapped in `CrAM`."""
        self._refuse_what_hides_gradients()
        optimizer = super().create_optimizer(model)
        if not isinstance(getattr(optimizer, "optimizer", optimizer), CrAM) and not isinstance(optimizer, CrAM):
            args = self.args
            self.optimizer = CrAM(
                optimizer,
                self.accelerator.unwrap_model(self.model),
                patterns=args.patterns,
                rho=args.rho,
                plus=args.plus,
                mask_gradient=args.mask_gradient,
                plus_reduction=args.plus_reduction,
                normalize=args.normalize,
                every=args.every,
                include=args.include,
                exclude=args.exclude,
                seed=args.seed,
            )
        return self.optimizer

    def _refuse_what_hides_gradients(self) -> None:
        way_out = "launch it on one process, with DistributedDataParallel (accelerate launch --multi_gpu) or with FSDP2"
        if self.is_deepspeed_enabled:
            raise ValueError(f"CrAM needs the gradients of single weights, which DeepSpeed keeps to itself; {way_out}")
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError(f"CrAM needs single weights, which FSDP1 flattens into one; {way_out} (fsdp_version: 2)")
        if getattr(self.model, "is_quantized", False):
            raise ValueError("CrAM perturbs weights, and this model's are quantized; load it without quantization")
        optim = str(getattr(self.args.optim, "value", self.args.optim))
        if "lomo" in optim or optim.endswith("layerwise"):
            raise ValueError(f"--optim {optim} steps inside the backward pass; take one that does not, as adamw_torch")

    @property
    def cram(self) -> CrAM:
        """The `CrAM` optimizer, without what Accelerate wraps around it."""
        return self.optimizer if isinstance(self.optimizer, CrAM) else self.optimizer.optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Remembers the batches of the accumulation window, which the second sweep replays."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._window = batches
        return batches, num_items

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The first sweep's step; the last one of a window is followed by the whole second sweep."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            # Saving and loading a sharded state takes empty steps of the optimizer, and forgets its counter.
            self.cram.num_steps = self.state.global_step
            if self.cram.needs_second_gradient:
                self._second_sweep(model, num_items_in_batch)
        return loss

    def _second_sweep(self, model: Any, num_items_in_batch: Any) -> None:
        scale = 1.0
        if self.accelerator.scaler is not None:
            scale = self.accelerator.scaler.get_scale()
            if not self._gradients_are_finite():
                return  # an overflow: the scaler skips this step
        window = self._window
        if self.args.second_share < 1:
            window = [_first_share(batch, self.args.second_share) for batch in window]
            num_items_in_batch = self._get_num_items_in_batch(window, self.args.device)
        with self.cram.compressed(grad_scale=scale), self._unrecorded():
            for i, batch in enumerate(window):
                is_last = i == len(window) - 1
                with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                    loss = super().training_step(model, batch, num_items_in_batch)
                self._compressed_loss = loss if self._compressed_loss is None else self._compressed_loss + loss
        self._num_second_sweeps += 1

    def _gradients_are_finite(self) -> bool:
        return bool(total_norm([p.grad for p in self.model.parameters() if p.grad is not None]).isfinite())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean loss at compressed weights since the last log, over all ranks."""
        if "loss" in logs and self._compressed_loss is not None:
            total = self.accelerator.reduce(self._compressed_loss, reduction="mean")
            logs["compressed_loss"] = total.item() / self._num_second_sweeps
            self._compressed_loss, self._num_second_sweeps = None, 0
        super().log(logs, *args, **kwargs)


def _first_share(batch: Any, share: float) -> Any:
    """The first samples of a batch, at least one."""
    if "position_ids" in batch and "attention_mask" not in batch:
        raise ValueError(
            "second_share takes the first samples of a batch, and packing and padding_free lay them all into one row; "
            "leave second_share at 1"
        )
    sizes = {v.shape[0] for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim}
    size = max(sizes)
    count = math.ceil(share * size)
    is_per_sample = lambda v: isinstance(v, torch.Tensor) and v.ndim and v.shape[0] == size  # noqa: E731
    return {k: v[:count] if is_per_sample(v) else v for k, v in batch.items()}


class CrAMTrainer(CrAMMixin, Trainer):
    """`transformers.Trainer` that trains with CrAM; takes a `CrAMConfig` as `args`, everything else as usual.

    After `train()`, `build_family` cuts variants from the one dense model:

    ```python
    trainer = CrAMTrainer(model=model, args=CrAMConfig("out", rho=0.05), train_dataset=..., eval_dataset=...)
    trainer.train()
    family = trainer.build_family(["unstructured:0.5", "unstructured:0.9", "2:4"])
    ```
    """
