"""The penalty at work in a Trainer: a callback, so that clipping concerns the gradients of the task alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ...targets import find_targets, unwrap
from .config import TPPConfig
from .orthogonality import KernelOrthogonality
from .penalty import TrainabilityPenalty, gradient_norm
from .schedule import GrowingSchedule


class TPPProgress(TrainerCallback, ExportableState):
    """What a checkpoint must say beside weights: the part of the run, and what was chosen before it.

    Attributes:
        phase: one of "dense", "regularize" and "retrain".
        pruned: name of a layer to the indices of its outputs that go; empty as long as they are not chosen.
        pattern: which share of what they are.
        speed_up: by how much multiplications fall.
    """

    def __init__(self) -> None:
        self.phase = "dense"
        self.pruned: dict[str, list[int]] = {}
        self.pattern, self.speed_up = "", 1.0

    def state(self) -> dict[str, Any]:
        """As the Trainer writes it into trainer_state.json."""
        return {"args": {}, "attributes": dict(vars(self))}


class Regularization(TrainerCallback):
    """Adds the penalty to the gradients of every optimizer step, or steps down it, and sets rows to zero at the end.

    Args:
        on_train_begin: called when a training begins; it may call `begin`.
        on_step_begin: called before every step.

    Attributes:
        penalty: None before it begins, and for a method that has none.
        schedule: of its strength.
    """

    def __init__(self, on_train_begin: Callable[[], None], on_step_begin: Callable[[], None]) -> None:
        self._on_train_begin, self._on_step_begin = on_train_begin, on_step_begin
        self.penalty: TrainabilityPenalty | KernelOrthogonality | None = None
        self.schedule = GrowingSchedule(0, 0)
        self._zeroed: TrainabilityPenalty | None = None
        self._rate: float | None = None  # of decoupled steps
        self._place: dict[str, int] = {}  # of a layer that loses rows, among all

    def begin(
        self, model: nn.Module, args: TPPConfig, pruned: dict[str, list[int]], inputs: Any, optimizer: Any
    ) -> float:
        """Make the penalty for the rows that will go.

        Args:
            model: wrappers are looked through.
            args: of the run.
            pruned: see `TrainabilityPenalty`.
            inputs: see `TrainabilityPenalty`.
            optimizer: of the run, which says by its class whether steps are decoupled.

        Returns:
            By how many e-folds the schedule shrinks the rows.
        """
        layers = all_layers(model)
        self.schedule = args.schedule(len(layers))
        self._place = {path: layers.index(path) for path in pruned}
        optimizer = getattr(optimizer, "optimizer", optimizer)  # of Accelerate
        is_decoupled = not isinstance(optimizer, torch.optim.SGD) if args.decoupled is None else args.decoupled
        group = optimizer.param_groups[0]
        rate = args.penalty_rate if is_decoupled else group["lr"] / (1 - group.get("momentum", 0))
        self._rate = rate if is_decoupled else None
        self.penalty = self._zeroed = None
        if args.penalty == "kernel_orthogonality":
            weight = 0.1 if args.gram_weight is None else args.gram_weight
            self.penalty = KernelOrthogonality(model, pruned, weight)
        elif args.penalty != "none":
            self.penalty = self._zeroed = TrainabilityPenalty(model, pruned, inputs, **args.gram())
        return self.schedule.e_folds(rate) if self._zeroed is not None else 0.0

    def strength(self, step: int) -> float:
        """Of the penalty in an optimizer step: it grows where rows will be zero, and is constant otherwise."""
        return self.schedule.ceiling if self._zeroed is None else self.schedule.strength(step)

    def logs(self, step: int) -> dict[str, float]:
        """Strength and norm of the gradient of the penalty in an optimizer step."""
        if self.penalty is None:
            return {}
        strength = self.strength(step)
        return {"penalty_strength": strength, "penalty_norm": gradient_norm(self.penalty, strength).item()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Model and optimizer are as they will be."""
        self._on_train_begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All callbacks have begun, and may be given logs."""
        self._on_step_begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer has unscaled and clipped the gradients, which are alike on all ranks."""
        if self.penalty is not None and self._rate is None and (strength := self.strength(state.global_step)):
            self.penalty.add_gradients(strength)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Right after the step: what is decoupled, and what is zero from now on."""
        step = state.global_step
        if self.penalty is not None and self._rate is not None and (strength := self.strength(step)):
            self.penalty.decay_(strength, self._rate)
        if self._zeroed is not None:
            zeroed = [path for path, place in self._place.items() if self.schedule.is_zeroed(place, step)]
            if zeroed:
                self._zeroed.zero_(zeroed)

    def end(self) -> None:
        """Nothing is added from now on."""
        self.penalty = self._zeroed = None


def read_progress(checkpoint: str | Path) -> tuple[TPPProgress, bool]:
    """What a checkpoint says about the run, and whether it is the last one of its part.

    Raises:
        ValueError: for a checkpoint of another method, or one that was edited.
    """
    content: Any = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    progress = TPPProgress()
    try:
        found = content["stateful_callbacks"][TPPProgress.__name__]
        attributes = (found[0] if isinstance(found, list) else found)["attributes"]
        own = {name: attributes[name] for name in ("phase", "pruned", "pattern", "speed_up")}
        is_done = bool(content["global_step"] >= content["max_steps"])
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{checkpoint} is no checkpoint of a TPPTrainer; start without resume_from_checkpoint"
        ) from error
    is_indices = isinstance(own["pruned"], dict) and all(
        isinstance(rows, list) and all(type(row) is int for row in rows) for rows in own["pruned"].values()
    )
    if own["phase"] not in ("dense", "regularize", "retrain") or not is_indices or not isinstance(own["pattern"], str):
        raise ValueError(f"{checkpoint} has a trainer_state.json that no TPPTrainer wrote; take another checkpoint")
    vars(progress).update(own)
    return progress, is_done


def all_layers(model: nn.Module) -> list[str]:
    """All Linear layers and convolutions, in their order."""
    return [name.rpartition(".")[0] for name in find_targets(unwrap(model), include=["*"])]
