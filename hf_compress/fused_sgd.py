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

    Not under FSDP, whose sharded weights that kernel does not take, not with fp16, where it would keep what happens to
    be in memory as the momentum of a first step that overflows, and not on devices without it.
    """

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, Any]:  # type: ignore[override]
        """As of every Trainer, "fused" among the arguments of SGD."""
        kind, options = super().get_optimizer_cls_and_kwargs(args, model)
        is_able = not self.is_fsdp_enabled and args.device.type in ("cpu", "cuda")
        if kind is torch.optim.SGD and is_able and self.accelerator.scaler is None and not options.get("dampening"):
            options = {"fused": True, **options}
        return kind, options

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As of every Trainer; a fused SGD is ready for weights that have their first gradient in a later step."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["fused"]:
            optimizer.register_step_pre_hook(_make_momentum)
        return optimizer


def _make_momentum(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Zeros where a weight has none yet: the kernel wants it of all weights, or of none."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
