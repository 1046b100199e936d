"""Zeros that stay zero while a Trainer trains: written again after every optimizer step, checked at every save."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerCallback

from ..distributed import dealt_like, is_sharded, local, reshard, sharded_like, total_norm
from ..patterns.masking import zero_
from ..structure import find_coupled_targets
from ..targets import Target, unwrap


class HeldZeros(TrainerCallback):
    """What the lock and gradual pruning share: zeros of the targets that no step of the optimizer undoes.

    `on_optimizer_step` is the event right after the step: nothing is evaluated, logged or saved before it.
    """

    def __init__(self, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None) -> None:
        self.include, self.exclude = include, exclude
        self.targets: dict[str, Target] = {}
        self.masks: dict[str, torch.Tensor] = {}  # of the part of a weight on this rank, False where zero is held
        self.bias_masks: dict[str, torch.Tensor] = {}  # of its bias, False where the whole output is held at zero

    def find(self, args: Any, model: nn.Module) -> None:
        """Look the targets up as the optimizer steps them; ValueError where single weights are out of reach."""
        name, way_out = type(self).__name__, "run on one process, with DistributedDataParallel or with FSDP2"
        if getattr(args, "deepspeed_plugin", None) is not None:
            raise ValueError(f"{name} writes zeros into weights, of which DeepSpeed steps copies of its own; {way_out}")
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise ValueError(f"{name} needs single weights, which FSDP1 flattens into one; {way_out} (fsdp_version: 2)")
        self.targets = _live_targets(model, self.include, self.exclude)
        self.masks, self.bias_masks = {}, {}
        if not self.targets:
            raise ValueError(
                f"{type(unwrap(model)).__name__} has no weight that {name} could hold: Linear, Conv and Conv1D layers "
                "are targets, embeddings, norms, biases and task heads are not"
            )

    def hold(self) -> None:
        """From now on, what is zero stays zero, also the biases of outputs that are zero as a whole."""
        self.masks = {name: local(target.parameter) != 0 for name, target in self.targets.items()}
        biases = {name: target.bias for name, target in self.targets.items() if target.bias is not None}
        self.bias_masks = {n: (local(b) != 0) | _outputs_left(self.targets[n], b) for n, b in biases.items()}

    def num_zeros(self) -> int:
        """Zeros in all targets together, equal on all ranks; ValueError under tensor parallelism."""
        return _count((local(t.parameter) == 0, t.parameter) for t in self.targets.values())

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, mask in self.masks.items():
            parameter = self.targets[name].parameter
            if parameter.requires_grad:
                zero_(local(parameter), mask)
        for name, mask in self.bias_masks.items():
            bias: Any = self.targets[name].bias
            if bias.requires_grad:
                zero_(local(bias), mask)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check(kwargs["model"], state.global_step)
        if self.masks:  # a resumed run holds every zero of its checkpoint, so that this one does it too
            self.hold()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not (args.load_best_model_at_end and state.best_model_checkpoint):  # which was checked when it was saved
            self._check(kwargs["model"], state.global_step)
        self.targets, self.masks, self.bias_masks = {}, {}, {}

    def _check(self, model: nn.Module, step: int) -> None:
        """RuntimeError if a held zero is none any more in the weights that the model has now."""
        live = {n: t.parameter for n, t in _live_targets(model, self.include, self.exclude).items() if n in self.masks}
        flags = {name: (local(weight) != 0) & ~self.masks[name] for name, weight in live.items()}
        if not flags or not _count((flag, live[name]) for name, flag in flags.items()):
            return
        lost = {name: number for name, flag in flags.items() if (number := _count([(flag, live[name])]))}
        name, number = next(iter(lost.items()))
        others = f" (and more in {len(lost) - 1} other weights)" if len(lost) > 1 else ""
        raise RuntimeError(
            f"{number} zeros of {name!r}{others} are lost at step {step}: something changed weights after "
            f"{type(self).__name__} had run, such as a callback behind it; what is saved at this step is not pruned"
        )


class SparsityLock(HeldZeros):
    """Keeps every zero of a pruned model zero while any Trainer fine-tunes it.

    ```python
    hfc.compress(model, "2:4")
    trainer = Trainer(model=model, args=args, train_dataset=train, callbacks=[hfc.SparsityLock()])
    ```

    The zeros of the targets are found when the training begins (in a resumed one in the weights of the checkpoint),
    written again after every optimizer step, whatever weight decay or momentum made of them, and checked at every save
    and at the end. Biases of outputs that are zero as a whole stay zero too. Memory: a byte for each weight of a
    target. No step waits for the device. Weights that are sharded (FSDP2) are handled by each rank for its part, frozen
    ones are only checked, and adapters of PEFT are no targets.

    Args:
        include: globs on names, see `find_targets`; they bring in a task head that was pruned too.
        exclude: globs on names, see `find_targets`.

    Raises:
        ValueError: when the training begins with a model without zeros or targets, with a wrong glob, or under FSDP1,
            DeepSpeed or tensor parallelism.
        RuntimeError: at a save or at the end, naming a weight, if something else has undone zeros.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the zeros."""
        self.find(args, kwargs["model"])
        if not self.num_zeros():
            raise ValueError(
                f"{type(unwrap(kwargs['model'])).__name__} has no zero in its {len(self.targets)} targets, so that "
                'there is nothing to lock; prune it first, as with hfc.compress(model, "2:4")'
            )
        self.hold()


def _live_targets(model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None) -> dict[str, Target]:
    """The targets that a model shows now, without PEFT's adapters, some of which begin at zero."""
    reshard(model)
    inner: Any = unwrap(model)
    peft: Any = sys.modules.get("peft")
    if peft and isinstance(inner, peft.PeftModel):
        inner = inner.get_base_model()
    tuner: Any = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", ())
    adapters: set[int] = set()
    for module in inner.modules():
        if isinstance(module, tuner):
            adapters |= {id(p) for p in module.parameters()} - {id(p) for p in module.get_base_layer().parameters()}
    return {n: t for n, t in find_coupled_targets(inner, include, exclude).items() if id(t.parameter) not in adapters}


def _outputs_left(target: Target, bias: torch.Tensor) -> torch.Tensor:
    """Which outputs have a weight that is not zero, for the part of the bias on this rank."""
    weight = target.parameter.detach()
    nonzero: Any = (weight != 0).sum([dim for dim in range(weight.ndim) if dim != target.output_dim])
    return local(dealt_like(nonzero.full_tensor() if is_sharded(weight) else nonzero, bias)) != 0


def _count(flags: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """How many flags are set, each given with the weight whose part on this rank it describes; over all parts."""
    return round(total_norm(sharded_like(flag.float(), weight) for flag, weight in flags).item() ** 2)
