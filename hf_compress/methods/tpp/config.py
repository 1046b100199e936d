"""The flags of TPP."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ...training import CompressionArguments
from .penalty import GRAM_SCALES
from .schedule import PROFILES, GrowingSchedule
from .selection import Rule

PENALTIES = ("trainability", "growing_l2", "kernel_orthogonality", "none")
_GRAM_WEIGHTS = {"mean": 1000.0, "n": 16.0, "sum": 1.0}


@dataclass
class TPPConfig(CompressionArguments):
    """Arguments of `TPPTrainer`: those of `transformers.TrainingArguments` and `CompressionArguments`, and these.

    A run has up to four parts: a training of the dense model (`dense_epochs`), the regularisation, the removal, and
    the retraining, which learning rate, schedule, epochs and steps are for. Only the retraining loads a best model.

    Args:
        patterns: what is removed: filters:SHARE, neurons:SHARE or heads:SHARE from all layers that can lose them, or
            from those that a glob matches, as in "*layer1.*.conv1=filters:0.5"; the last match counts.
        speed_up: multiply all shares by one number, so that the multiplications fall to 1 / speed_up.
        penalty: "trainability" is TPP. "growing_l2" has its growing decay without the Gram term, "kernel_orthogonality"
            makes the rows of these layers orthonormal instead, "none" trains on; all choose by L1.
        profile: schedule of the penalty: "short" (3,000 steps), "paper" (110,000, for CIFAR) or "paper_imagenet"
            (90,000); `grow_steps`, `stabilize_steps`, `grow_every` and `zero_every` replace its parts.
        grow_steps: until the penalty is at its ceiling.
        stabilize_steps: at the ceiling, while one layer after the other is set to zero.
        grow_every: steps between one growth of the penalty and the next.
        ceiling: the largest strength of the penalty.
        zero_every: steps from one layer set to zero to the next; 0 spreads them over half of `stabilize_steps`.
        regularize_learning_rate: constant, while the penalty works; a tenth of `learning_rate` by default.
        gram_weight: of the Gram term, or of the kernel orthogonality; 1000 for "mean", 16 for "n", 1 for "sum" and
            0.1 for kernel orthogonality by default.
        gram_scale: see `TrainabilityPenalty`; "mean" for filters alone and "n" with neurons or heads by default.
        decoupled: step down the penalty beside the optimizer, which is what Adam needs; by default for all but SGD.
        penalty_rate: of decoupled steps.
        dense_epochs: train the dense model for so many epochs first, with the schedule of the retraining.
        dense_learning_rate: of these epochs, `learning_rate` by default.
        trainability_samples: training samples for the mean Jacobian singular value, which is logged; 0 for none.
    """

    patterns: list[str] = field(
        default_factory=lambda: ["filters:0.5"],
        metadata={"help": "What is removed, such as filters:0.5 or *layer1.*.conv1=filters:0.5."},
    )
    speed_up: float | None = field(
        default=None, metadata={"help": "Multiply all shares so that multiplications fall to 1 / speed_up."}
    )
    penalty: str = field(default="trainability", metadata={"help": f"One of {', '.join(PENALTIES)}."})
    profile: str = field(default="short", metadata={"help": f"Schedule of the penalty: {', '.join(PROFILES)}."})
    grow_steps: int | None = field(default=None, metadata={"help": "Steps until the penalty is at its ceiling."})
    stabilize_steps: int | None = field(default=None, metadata={"help": "Steps at the ceiling."})
    grow_every: int | None = field(default=None, metadata={"help": "Steps between two growths of the penalty."})
    ceiling: float = field(default=1.0, metadata={"help": "The largest strength of the penalty."})
    zero_every: int | None = field(default=None, metadata={"help": "Steps from one zeroed layer to the next."})
    regularize_learning_rate: float | None = field(
        default=None, metadata={"help": "Constant, while the penalty works; a tenth of learning_rate by default."}
    )

    gram_weight: float | None = field(default=None, metadata={"help": "Of the Gram term; published: 1000."})
    gram_scale: str | None = field(default=None, metadata={"help": f"One of {', '.join(GRAM_SCALES)}."})
    decoupled: bool | None = field(default=None, metadata={"help": "Step down the penalty beside the optimizer."})
    penalty_rate: float = field(default=0.01, metadata={"help": "Of decoupled steps."})
    dense_epochs: float = field(default=0.0, metadata={"help": "Train the dense model for so many epochs first."})
    dense_learning_rate: float | None = field(
        default=None, metadata={"help": "Of these epochs; learning_rate by default."}
    )
    trainability_samples: int = field(
        default=8, metadata={"help": "Training samples for the mean Jacobian singular value; 0 for none."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.patterns = [str(Rule.parse(text)) for text in _texts(self.patterns)]
        for name, allowed in (("penalty", PENALTIES), ("profile", tuple(PROFILES))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.gram_scale is not None and self.gram_scale not in GRAM_SCALES:
            raise ValueError(f"gram_scale is one of {', '.join(GRAM_SCALES)}, got {self.gram_scale!r}")
        if type(self.trainability_samples) is not int or self.trainability_samples < 0:
            raise ValueError(f"trainability_samples is a whole number, 0 for none, got {self.trainability_samples!r}")
        of_rates = ("regularize_learning_rate", "dense_learning_rate", "penalty_rate")
        for name in (*of_rates, "gram_weight", "dense_epochs"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if self.speed_up is not None and not (math.isfinite(self.speed_up) and self.speed_up > 1):
            raise ValueError(f"speed_up must be above 1, got {self.speed_up!r}")
        self.schedule()

    def schedule(self, num_layers: int = 1) -> GrowingSchedule:
        """The schedule of the penalty for a model of so many layers."""
        given = {name: getattr(self, name) for name in PROFILES["short"]}
        own = {name: value for name, value in given.items() if value is not None}
        return GrowingSchedule(**{**PROFILES[self.profile], **own}, ceiling=self.ceiling, num_layers=num_layers)

    def gram(self) -> dict[str, Any]:
        """Scale and weight of the Gram term."""
        is_of_filters = all(Rule.parse(text).pattern.name == "filters" for text in self.patterns)
        scale = self.gram_scale or ("mean" if is_of_filters else "n")
        weight = _GRAM_WEIGHTS[scale] if self.gram_weight is None else self.gram_weight
        return {"gram_scale": scale, "gram_weight": 0.0 if self.penalty == "growing_l2" else weight}


def _texts(value: Any) -> list[Any]:
    texts = [value] if isinstance(value, str) else list(value)
    if not texts:
        raise ValueError("patterns is empty; name what is removed, such as filters:0.5")
    return texts
