"""Losses that ignore by how many items they should be divided, which the stock Trainer scales wrongly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

if TYPE_CHECKING:
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object

logger = logging.get_logger(__name__)


class LossScalingMixin(_TrainerBase):
    """Goes before a `Trainer` class: whether a loss heeds `num_items_in_batch` is tried, not believed."""

    args: Any
    model: Any
    _loss_scaling_is_unknown = True
    _unrecorded: Any

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of an accumulation window, and by how many items their loss is divided."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if self._loss_scaling_is_unknown and batches:
            self._loss_scaling_is_unknown = False
            believes = num_items is not None and self.compute_loss_func is None
            if believes and self.args.check_loss_scaling and not self._loss_is_divided_by_items(batches[0]):
                if self.args.gradient_accumulation_steps * self.args.world_size > 1:
                    logger.warning(
                        f"The loss of {type(self.accelerator.unwrap_model(self.model)).__name__} ignores "
                        "num_items_in_batch: the Trainer would multiply it by the accumulation steps and by the number "
                        "of processes. It is corrected; --no_check_loss_scaling leaves it as it is."
                    )
                self.model_accepts_loss_kwargs = False
                num_items = None
        return batches, num_items

    @torch.no_grad()
    def _loss_is_divided_by_items(self, batch: Any) -> bool:
        """Whether twice the items halve the loss; tried in eval mode, which draws no random number."""
        model = self.model if self.args.n_gpu > 1 else self.model_wrapped  # DataParallel deals no 0-dim tensors
        modes = {module: module.training for module in model.modules()}
        model.eval()
        losses: list[Any] = []
        try:
            for count in (1.0, 2.0):
                items = torch.tensor(count, device=self.args.device)
                with self.compute_loss_context_manager(), self._unrecorded():
                    losses.append(self.compute_loss(model, self._prepare_inputs(batch), num_items_in_batch=items))
        finally:
            for module, training in modes.items():
                module.training = training
        one, two = losses
        return bool((one - 2 * two).abs() <= 1e-3 * one.abs() + 1e-6)
