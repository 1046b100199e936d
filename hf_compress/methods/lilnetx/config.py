"""The flags of LilNetX."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ...patterns import Coded, parse_pattern
from ...training import CompressionArguments
from .parametrization import INITS, SHARING
from .priors import ORDERS


@dataclass
class LilNetXConfig(CompressionArguments):
    """Arguments of `LilNetXTrainer`: those of `transformers.TrainingArguments` and `CompressionArguments`, and these.

    The loss is that of the task and (rate_weight * bits + slice_weight * norms of slices + l2_weight * squares) / N
    for N latents, so that no weight depends on the size of the model: a rate_weight of 0.1 pays 0.1 of the loss for one
    bit per parameter. `weight_decay` does not touch latents, and clipping concerns the loss of the task alone. With
    `remove` the coded checkpoint leaves out filters and neurons that change nothing.

    Args:
        init: see `reparametrize`: "pretrained" keeps the weights, "uniform" and "normal" draw new ones as published.
        steps_per_std: see `reparametrize`; more keep pretrained weights better and take more bits.
        boundary: see `reparametrize`.
        linear_slice: see `reparametrize`.
        decoders: see `reparametrize`.
        rate_weight: of the bits per parameter; by default it is found from `rate_ratio`.
        rate_ratio: how long the gradient of the bits is, against that of the task's loss, in the first step and once
            more after an epoch, where the lengths of both are averages over that epoch.
        rate_latents: at most about so many latents are drawn in each step, in slices, to estimate the bits of all.
        slice_weight: of the norms of slices, which become empty.
        slice_order: norm of a slice.
        l2_weight: of the squares of latents.
        entropy_learning_rate: of the entropy models, which have an Adam of their own; published is 1e-4.
        entropy_fit_steps: to bring them near the latents before the training; 0 as published.
        fold_batch_norm: fold statistics into scales and shifts in the coded checkpoint, see `fold_batch_norm_`.
        half_rest: round what is not coded to 16 bits in the coded checkpoint: norms, biases, embeddings, heads.
        variant: text of the coded checkpoint in the family: "lilnetx", or "lilnetx:LABEL" where several of them are to
            join one family.
    """

    init: str = field(default="pretrained", metadata={"help": f"Latents at the start: {', '.join(INITS)}."})
    steps_per_std: float = field(default=3.0, metadata={"help": "Whole numbers in a standard deviation of a weight."})
    boundary: float = field(default=3.0, metadata={"help": "Of the latents that uniform and normal draw."})
    linear_slice: int = field(default=8, metadata={"help": "Consecutive inputs of a Linear layer that share a slice."})
    decoders: str = field(default="kind", metadata={"help": "One decoder for each kind of layer, or layer."})
    rate_weight: float | None = field(default=None, metadata={"help": "What a bit per parameter costs."})
    rate_ratio: float = field(default=0.1, metadata={"help": "Gradient of the bits against that of the task."})
    rate_latents: int = field(default=2_000_000, metadata={"help": "Latents drawn in each step for the bits."})
    slice_weight: float = field(default=0.0, metadata={"help": "Of the norms of slices, which become empty."})
    slice_order: str = field(default="l2", metadata={"help": f"Norm of a slice: {', '.join(ORDERS)}."})
    l2_weight: float = field(default=0.0, metadata={"help": "Of the squares of latents."})
    entropy_learning_rate: float = field(default=1e-3, metadata={"help": "Of the entropy models."})
    entropy_fit_steps: int = field(default=200, metadata={"help": "Of the entropy models before the training."})
    fold_batch_norm: bool = field(default=False, metadata={"help": "Fold statistics of the coded checkpoint."})
    half_rest: bool = field(default=False, metadata={"help": "16 bits for what is not coded."})
    variant: str = field(default="lilnetx", metadata={"help": "lilnetx, or lilnetx:LABEL to tell several apart."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("init", INITS), ("decoders", SHARING), ("slice_order", tuple(ORDERS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("rate_ratio", "slice_weight", "l2_weight", "entropy_learning_rate", "rate_weight"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        for name, least in (("rate_latents", 1), ("entropy_fit_steps", 0)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {getattr(self, name)!r}")
        pattern = parse_pattern(self.variant)
        if not isinstance(pattern, Coded):
            raise ValueError(f"variant is {Coded.forms}, got {self.variant!r}")
        self.variant = str(pattern)

    def latents(self) -> dict[str, Any]:
        """The options of `reparametrize`."""
        names = ("init", "steps_per_std", "boundary", "linear_slice", "decoders", "include", "exclude", "seed")
        return {name: getattr(self, name) for name in names}
