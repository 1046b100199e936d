"""The flags of SFW."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...training import CompressionArguments
from .factory import GROUPINGS, SCOPES, check_grouping, region_of
from .optimizer import FREE, RESCALES


@dataclass
class SFWConfig(CompressionArguments):
    """Arguments of `SFWTrainer`: those of `transformers.TrainingArguments` and `CompressionArguments`, and these.

    Three defaults differ from TrainingArguments. `learning_rate` is 0.1: with gradient rescaling a step is as long as
    one of SGD with momentum. `max_grad_norm` is 0: clipping would shorten steps, whose direction it cannot change.
    `weight_decay` (0) and the fields of Adam concern only parameters without constraint: in a region the step towards
    a vertex is the decay. `optim` is not looked at.

    Args:
        constraint: region of every target, by name or as text: l1, l2, linf, lp, k_sparse, k_support,
            group_k_support, nuclear, spectral_k_sparse or spectral_k_support.
        k: how many entries, groups or singular values a vertex has: a count ("21"), or a share ("0.05", the default).
        radius: of the region, "init:15" by default: a number, "init:VALUE" (VALUE times the norm that torch's
            initialisation gives) or "weights:VALUE" (VALUE times the norm of the weights at the start, for pretrained
            models).
        diameter: of the region, instead of the radius.
        scope: "tensor" for a region of each weight, "global" for one that holds them all.
        group_by: what a group of group_k_support is: "filters", "neurons" of feed-forward pairs or "heads" of
            attentions. Weights that share neurons or heads lie in one ball, all other targets in L2 balls.
        momentum: in [0, 1).
        dampening: 0 for heavy ball; the value of momentum averages gradients.
        rescale: "none", "diameter", "gradient" or "fast_gradient": what the learning rate is multiplied by.
        free: optimizer of the parameters without constraint, "sgd" or "adamw".
        free_learning_rate: theirs; learning_rate by default.
        shrink: scale weights that lie outside their region into it at the start.
        sfw_init_steps: iterations of SFW-Init before the training, 390 as published; 0 for none.
        sfw_init_learning_rate: of the scales that SFW-Init learns.
        lr_drops: shares of the run at which the learning rate is divided by 10, in place of lr_scheduler_type.
    """

    learning_rate: float = field(default=0.1, metadata={"help": "Learning rate; a step is as long as one of SGD."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clipping; it would shorten the steps."})
    constraint: str = field(default="k_sparse", metadata={"help": "Region of every target, by name or as text."})
    k: str | None = field(default=None, metadata={"help": "Entries, groups or ranks of a vertex: 21, or 0.05."})
    radius: str | None = field(default=None, metadata={"help": "A number, init:VALUE or weights:VALUE."})
    diameter: float | None = field(default=None, metadata={"help": "Of the region, instead of the radius."})
    scope: str = field(default="tensor", metadata={"help": " | ".join(SCOPES)})
    group_by: str = field(default="filters", metadata={"help": "Of group_k_support: " + " | ".join(GROUPINGS)})
    momentum: float = field(default=0.9, metadata={"help": "Of the gradient, in [0, 1)."})
    dampening: float = field(default=0.0, metadata={"help": "0, or the value of momentum to average gradients."})
    rescale: str = field(default="gradient", metadata={"help": " | ".join(RESCALES)})
    free: str = field(default="sgd", metadata={"help": "Optimizer of the other parameters: " + " | ".join(FREE)})
    free_learning_rate: float | None = field(default=None, metadata={"help": "Of the other parameters."})
    shrink: bool = field(default=True, metadata={"help": "Scale weights into their region at the start."})
    sfw_init_steps: int = field(default=0, metadata={"help": "Iterations of SFW-Init before the training."})
    sfw_init_learning_rate: float = field(default=1e-3, metadata={"help": "Of the scales that SFW-Init learns."})
    lr_drops: list[float] | None = field(
        default=None, metadata={"help": "Shares of the run at which the learning rate is divided by 10."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.k = None if self.k is None else str(self.k)
        region = region_of(self.constraint, self.k_value, self.radius, self.diameter)
        check_grouping(region, self.scope, self.group_by)
        self.constraint = str(region)
        if not isinstance(self.sfw_init_steps, int) or self.sfw_init_steps < 0:
            raise ValueError(f"sfw_init_steps must be a whole number of at least 0, got {self.sfw_init_steps!r}")
        for share in self.lr_drops or []:
            if not 0 < share < 1:
                raise ValueError(f"lr_drops are shares of the run between 0 and 1, got {share}")

    @property
    def k_value(self) -> float | None:
        """`k` as a number: "21" is a count, "0.05" a share."""
        if self.k is None:
            return None
        try:
            return int(self.k) if self.k.isdigit() else float(self.k)
        except ValueError as error:
            raise ValueError(f"k is a count such as 21, or a share such as 0.05; got {self.k!r}") from error
