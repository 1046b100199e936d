"""The interface of all patterns, and their text form."""

from __future__ import annotations

import difflib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any, ClassVar

import torch

from ..distributed import local
from ..targets import Target
from .masking import zero_

Weights = Mapping[str, Target | torch.Tensor]


class Pattern(ABC):
    """What a compressed weight looks like.

    `str(pattern)` is its canonical text and `parse_pattern` reads it back. Weights are given as a mapping from names
    to `Target` or to plain tensors, which count as (out, in, ...).
    """

    forms: ClassVar[str]  # the texts that it is written in, for error messages
    _kinds: ClassVar[list[type[Pattern]]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forms" in vars(cls):
            Pattern._kinds.append(cls)

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Pattern | None:
        """The pattern that `text` means, None if it is of another kind; ValueError if it is of this kind but wrong."""

    @property
    @abstractmethod
    def revision(self) -> str:
        """The text as a git revision and a folder name, such as "unstructured-0.90"."""

    def select(self, weights: Mapping[str, Target]) -> dict[str, torch.Tensor]:
        """Masks of the compressed weights, unchecked: what `masks` returns, for training steps.

        On an accelerator this never waits for the device.
        """
        raise TypeError(f"{self} rounds values and has no masks; project_ writes them")

    def compress_(self, weights: Mapping[str, Target]) -> dict[str, torch.Tensor]:
        """Write the compressed values in place, unchecked: what `project_` does, for training steps.

        Returns:
            The masks of the weights that it set to zero; empty for a pattern without masks.
        """
        masks = self.select(weights)
        for name, mask in masks.items():
            zero_(local(weights[name].parameter), local(mask))
        return masks

    def skip_reason(self, target: Target) -> str | None:
        """Why this pattern leaves a weight dense, None if it does not."""
        return None

    def skipped(self, weights: Weights) -> dict[str, str]:
        """Why this pattern leaves weights dense, by name; the others are not in it."""
        found = {name: self.skip_reason(as_target(weight)) for name, weight in weights.items()}
        return {name: reason for name, reason in found.items() if reason}

    def check(self, targets: Mapping[str, Target], flag: str) -> None:
        """ValueError, with the name of the flag that gave this pattern, where it leaves all targets dense."""
        for part in getattr(self, "parts", (self,)):
            reasons = [part.skip_reason(target) for target in targets.values()]
            if reasons and all(reasons):
                raise ValueError(
                    f"{flag} has {self}, and {part} leaves all {len(reasons)} targets of this model dense: the first, "
                    f"because {reasons[0]}; leave it out"
                )

    def partway(self, progress: float) -> Pattern | None:
        """The pattern on the way from dense weights to this one, for schedules.

        Args:
            progress: share of the final removal in [0, 1], never going back: what one value prunes, a larger one does
                too. 1 gives this pattern, 0 removes nothing.

        Returns:
            None where nothing is removed yet.

        Raises:
            ValueError: if `progress` lies outside, or for a pattern that removes no share of the weights (`int8`).
        """
        share = getattr(self, "share", None)
        if share is None:
            raise ValueError(
                f"{self} cannot be reached little by little: it changes all values at once; call hfc.compress with it "
                f"after the training, or prune and round in a chain such as 2:4+{self}"
            )
        pattern: Any = self
        return replace(pattern, share=share * progress) if check_progress(progress) else None

    def masks(self, weights: Weights) -> dict[str, torch.Tensor]:
        """Bool tensors by name, each of its weight's shape: True is kept. Weights that are skipped are all True.

        Raises:
            TypeError: if the pattern has no masks.
            ValueError: if a weight is NaN, complex or integer; the message names it.
        """
        return self.select(checked(weights))

    @torch.no_grad()
    def project_(self, weights: Weights) -> None:
        """Write the compressed values in place: CrAM's operator C.

        Raises:
            ValueError: if a weight is NaN, complex or integer; no weight has been changed then.
        """
        self.compress_(checked(weights))


def parse_pattern(text: str | Pattern) -> Pattern:
    """The pattern that a text means: "unstructured:0.9", "2:4", "filters:0.5", "low_rank:0.75".

    Raises:
        ValueError: for any other text, naming what is allowed, and for the integer that YAML makes of a bare 2:4.
    """
    if isinstance(text, Pattern):
        return text
    forms = ", ".join(kind.forms for kind in Pattern._kinds)
    if isinstance(text, int) and not isinstance(text, bool) and text >= 60:
        meant = f'"{text // 60}:{text % 60}"'
        raise ValueError(f"{text} is no pattern: YAML reads a bare n:m as a number to the base 60; write {meant}")
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is no pattern; allowed: {forms}")
    for kind in Pattern._kinds:
        pattern = kind.parse(text.strip())
        if pattern is not None:
            return pattern
    raise ValueError(f"{text!r} is no pattern{_meant(text, forms)}; allowed: {forms}")


def _meant(text: str, forms: str) -> str:
    """A hint for a mistyped kind."""
    word = re.split(r"[:;,=]", text.strip())[0]
    kinds = re.findall(r'"([a-z_]{4,}):', forms)
    return "".join(f'; did you mean "{kind}:..."?' for kind in difflib.get_close_matches(word, kinds, n=1, cutoff=0.7))


def parse_patterns(patterns: str | Pattern | Iterable[str | Pattern]) -> list[Pattern]:
    """Several patterns; one alone counts as a list of one.

    Raises:
        ValueError: as `parse_pattern`.
    """
    if isinstance(patterns, Iterable) and not isinstance(patterns, str):
        return [parse_pattern(p) for p in patterns]
    return [parse_pattern(patterns)]


def distinct_patterns(patterns: str | Pattern | Iterable[str | Pattern]) -> list[Pattern]:
    """`parse_patterns`, for patterns that stand side by side under the names of their revisions.

    Raises:
        ValueError: as `parse_pattern`, or for two with one revision.
    """
    parsed: dict[str, Pattern] = {}
    for pattern in parse_patterns(patterns):
        if pattern.revision in parsed:
            other = parsed[pattern.revision]
            raise ValueError(f"patterns {other} and {pattern} have the same revision {pattern.revision}; keep one")
        parsed[pattern.revision] = pattern
    return list(parsed.values())


def parse_share(text: str, forms: str) -> float:
    """The share removed, in decimal notation; ValueError for anything else."""
    if not re.fullmatch(r"\d*\.?\d+|\d+\.", text):
        raise ValueError(f"{text!r} is no share; allowed: {forms}")
    return float(text)


def check_share(share: Any, forms: str) -> float:
    """`share` as a float in [0, 1); ValueError otherwise."""
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
        raise ValueError(f"the share removed must be at least 0 and below 1, got {share!r}; allowed: {forms}")
    return float(share) + 0.0  # -0.0 becomes 0.0


def check_progress(progress: float) -> float:
    """`progress` if it lies in [0, 1]; ValueError otherwise."""
    if isinstance(progress, bool) or not isinstance(progress, (int, float)) or not 0 <= progress <= 1:
        raise ValueError(f"progress is a share of the final removal in [0, 1], got {progress!r}")
    return progress


def format_share(share: float) -> str:
    """The shortest decimal that reads back as the same number, never in exponents."""
    return format(Decimal(repr(share)), "f").removesuffix(".0")


def revision_share(share: float) -> str:
    """The same with at least two decimals, so that revisions sort and look alike."""
    whole, _, decimals = format_share(share).partition(".")
    return f"{whole}.{decimals:0<2}"


def count_pruned(share: float, total: int) -> int:
    """floor(share * total) of the decimal share: 0.7 of 10 is 7, whatever a float product says."""
    return math.floor(Decimal(repr(share)) * total)


def as_target(weight: Target | torch.Tensor) -> Target:
    """A plain tensor counts as the weight of a layer that reduces over dimension 1 (0 for a vector)."""
    return weight if isinstance(weight, Target) else Target(weight, min(1, max(weight.ndim - 1, 0)), "tensor")


def checked(weights: Weights) -> dict[str, Target]:
    """All weights as targets; ValueError for one that is NaN, complex or integer."""
    targets = {name: as_target(weight) for name, weight in weights.items()}
    for name, target in targets.items():
        weight = target.parameter
        if not weight.is_floating_point():
            raise ValueError(f"weight {name!r} has dtype {weight.dtype}; patterns need floating-point weights")
        if torch.isnan(weight.detach()).any():
            raise ValueError(
                f"weight {name!r} holds NaN, so its magnitudes have no order; "
                "look for a diverged run or a broken checkpoint"
            )
    return targets
