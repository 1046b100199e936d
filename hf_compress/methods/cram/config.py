"""The flags of CrAM."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...patterns import parse_patterns
from ...training import CompressionArguments
from .optimizer import DEFAULT_PATTERNS
from .settings import check_options, check_rho


@dataclass
class CrAMConfig(CompressionArguments):
    """Arguments of `CrAMTrainer`: those of `transformers.TrainingArguments` and `CompressionArguments`, and these.

    Args:
        rho: step of the ascent, in units of the gradient; 0 compresses without ascent.
        patterns: what the weights are compressed to while they train; one is drawn in every step.
        plus: add the gradient at the weights themselves (CrAM+).
        mask_gradient: keep the second gradient only where weights were kept.
        plus_reduction: "sum" of the two gradients as published, or their "mean".
        normalize: ascend by rho times the direction of the gradient; without patterns and plus this is SAM.
        every: take a second gradient in every so many steps.
        second_share: share of each batch that the second gradient is taken on, the first samples.
    """

    rho: float = field(default=0.05, metadata={"help": "Step of the ascent, in units of the gradient."})
    patterns: list[str] = field(
        default_factory=lambda: list(DEFAULT_PATTERNS),
        metadata={"help": "Patterns such as unstructured:0.9 and 2:4; one is drawn in every step."},
    )
    plus: bool = field(default=True, metadata={"help": "Add the gradient at the weights themselves (CrAM+)."})
    mask_gradient: bool = field(
        default=True, metadata={"help": "Keep the second gradient only where weights were kept."}
    )

    plus_reduction: str = field(default="sum", metadata={"help": "sum or mean of the two gradients."})
    normalize: bool = field(default=False, metadata={"help": "Ascend by rho times the direction of the gradient."})
    every: int = field(default=1, metadata={"help": "Take a second gradient in every so many steps."})
    second_share: float = field(default=1.0, metadata={"help": "Share of each batch for the second gradient."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rho(self.rho)
        check_options(self.plus_reduction, self.every)
        if not isinstance(self.second_share, (int, float)) or not 0 < self.second_share <= 1:
            raise ValueError(f"second_share must be above 0 and at most 1, got {self.second_share!r}")
        self.patterns = list(map(str, parse_patterns(self.patterns)))
