"""The fused kernel of SGD, which the Trainer does not ask for: one pass over the weights where there would be four."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object


class FusedSGDMixin(_TrainerBase):
    """Goes before a `Trainer` class: `--optim sgd` is fused, as `adamw_torch_fused` is by default.

    Not under FSDP, whose sharded weights that kernel does not take, and not on devices without it.
    """

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, Any]:  # type: ignore[override]
        """As of every Trainer, "fused" among the arguments of SGD."""
        kind, options = super().get_optimizer_cls_and_kwargs(args, model)
        if kind is torch.optim.SGD and not self.is_fsdp_enabled and args.device.type in ("cpu", "cuda"):
            options = {"fused": True, **options}
        return kind, options
