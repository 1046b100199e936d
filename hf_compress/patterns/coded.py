"""Whole numbers that a training has chosen so that their file is small: what LilNetX makes of weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..targets import Target
from .base import Pattern

_FORMS = '"lilnetx" or "lilnetx:LABEL" (made by a training)'


@dataclass(frozen=True)
class Coded(Pattern):
    """Weights decoded from whole numbers; a name in a family for what cannot be cut in one shot.

    Attributes:
        label: tells several of one family apart, such as those of different rate weights; "" for none.
    """

    forms: ClassVar[str] = _FORMS
    label: str = ""

    def __post_init__(self) -> None:
        is_ref = ".." not in self.label and not self.label.endswith((".", ".lock"))  # as git wants them
        if not re.fullmatch(r"[a-z0-9][a-z0-9.]*|", self.label) or not is_ref:
            raise ValueError(
                f"a label has small letters, digits and dots inside, got {self.label!r}; allowed: {_FORMS}"
            )

    def __str__(self) -> str:
        return f"lilnetx:{self.label}" if self.label else "lilnetx"

    @classmethod
    def parse(cls, text: str) -> Coded | None:
        name, colon, label = text.partition(":")
        if name != "lilnetx" or (colon and not label):
            return None
        return cls(label)

    @property
    def revision(self) -> str:
        return f"lilnetx-{self.label}-coded" if self.label else "lilnetx-coded"

    def compress_(self, weights: Mapping[str, Target]) -> dict[str, torch.Tensor]:
        raise ValueError(f"{self} is made by a training, not in one shot: use LilNetXTrainer, or --method lilnetx")
