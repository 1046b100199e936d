"""The flags of CrAM."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...patterns import parse_pattern
from ...training import CompressionArguments
from .optimizer import DEFAULT_PATTERNS, check_rho


@dataclass
class CrAMConfig(CompressionArguments):
    """Arguments of `CrAMTrainer`: those of `transformers.TrainingArguments` and `CompressionArguments`, and these.

    Args:
        rho: step of the ascent, in units of the gradient; 0 compresses without ascent.
        patterns: what the weights are compressed to while they train; one is drawn in every step.
        plus: add the gradient at the weights themselves (CrAM+).
        mask_gradient: keep the second gradient only where weights were kept.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rho(self.rho)
        self.patterns = [str(parse_pattern(p)) for p in self.patterns]
