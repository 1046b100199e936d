"""Patterns one after the other: "2:4+int8" prunes, then rounds what is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..targets import Target
from .base import Pattern, check_progress, parse_pattern
from .low_rank import LowRank
from .quantized import Quantized

_FORMS = '"A+B", such as 2:4+int8'


@dataclass(frozen=True)
class Chain(Pattern):
    """Each pattern compresses what the one before it left; a quantized one comes last, so that zeros stay zero.

    Attributes:
        parts: two or more patterns.
    """

    forms: ClassVar[str] = _FORMS
    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        if len(self.parts) < 2 or any(isinstance(p, (Quantized, Chain)) for p in self.parts[:-1]):
            raise ValueError(f"{self} is no pattern; allowed: {_FORMS}, with intB last")
        if any(isinstance(p, LowRank) for p in self.parts):
            raise ValueError(f"{self} is no pattern: zeros and rounding undo a rank; allowed: {_FORMS}")

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))

    @classmethod
    def parse(cls, text: str) -> Chain | None:
        return cls(tuple(parse_pattern(part) for part in text.split("+"))) if "+" in text else None

    @property
    def revision(self) -> str:
        return "_".join(part.revision for part in self.parts)

    def partway(self, progress: float) -> Pattern | None:
        """As for every pattern: all parts are on their way, and rounding comes at the end, with a progress of 1."""
        if check_progress(progress) == 1:
            return self
        steps = [part.partway(progress) for part in self.parts if not isinstance(part, Quantized)]
        parts = tuple(step for step in steps if step is not None)
        return Chain(parts) if len(parts) > 1 else next(iter(parts), None)

    def skip_reason(self, target: Target) -> str | None:
        reasons = [reason for part in self.parts if (reason := part.skip_reason(target))]
        return reasons[0] if len(reasons) == len(self.parts) else None

    def select(self, weights: Mapping[str, Target]) -> dict[str, torch.Tensor]:
        copies = {n: replace(t, parameter=t.parameter.detach().clone(), bias=None) for n, t in weights.items()}
        return self.compress_(copies)

    def compress_(self, weights: Mapping[str, Target]) -> dict[str, torch.Tensor]:
        masks: dict[str, torch.Tensor] = {}
        for part in self.parts:
            for name, mask in part.compress_(weights).items():
                masks[name] = masks[name] & mask if name in masks else mask
        return masks
