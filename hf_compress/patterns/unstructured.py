"""Single weights anywhere: the smallest magnitudes are zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..selection import keep_largest_of_groups
from ..targets import Target
from .base import Pattern, check_share, count_pruned, format_share, parse_share, revision_share

_FORMS = '"unstructured:SHARE" with a share removed in [0, 1), such as unstructured:0.9, or unstructured:0.9:layer'


@dataclass(frozen=True)
class Unstructured(Pattern):
    """The smallest magnitudes are zero: exactly floor(share * n) of them, ties by position.

    Attributes:
        share: of the weights removed, in [0, 1).
        scope: "global" compares the weights of all targets, "layer" prunes the same share of each.
    """

    forms: ClassVar[str] = _FORMS
    share: float
    scope: str = "global"

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", check_share(self.share, _FORMS))
        if self.scope not in ("global", "layer"):
            raise ValueError(f"scope must be 'global' or 'layer', got {self.scope!r}")

    def __str__(self) -> str:
        return f"unstructured:{format_share(self.share)}" + (":layer" if self.scope == "layer" else "")

    @classmethod
    def parse(cls, text: str) -> Unstructured | None:
        name, *rest = text.split(":")
        if name != "unstructured":
            return None
        if len(rest) not in (1, 2) or (len(rest) == 2 and rest[1] not in ("global", "layer")):
            raise ValueError(f"{text!r} is no pattern; allowed: {_FORMS}")
        return cls(parse_share(rest[0], _FORMS), *rest[1:])

    @property
    def revision(self) -> str:
        return f"unstructured-{revision_share(self.share)}" + ("-layer" if self.scope == "layer" else "")

    def select(self, weights: Mapping[str, Target]) -> dict[str, torch.Tensor]:
        parameters = [t.parameter for t in weights.values()]
        compared = [parameters] if self.scope == "global" else [[p] for p in parameters]
        groups = [(group, count_pruned(self.share, sum(p.numel() for p in group))) for group in compared]
        masks = [mask for group in keep_largest_of_groups(groups) for mask in group]
        return dict(zip(weights, masks, strict=True))
