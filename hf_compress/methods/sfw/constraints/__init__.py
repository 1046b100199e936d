"""Feasible regions: what trained weights are a convex combination of, and what they can be pruned to."""

from __future__ import annotations

import ast
import inspect
import math
import re
from typing import Any

from .base import Constraint, Oracle, Size
from .elementwise import KSparsePolytope, KSupportBall, LpBall
from .group import GroupKSupportBall
from .spectral import NuclearBall, SpectralKSparsePolytope, SpectralKSupportBall

__all__ = [
    "Constraint",
    "GroupKSupportBall",
    "KSparsePolytope",
    "KSupportBall",
    "LpBall",
    "NuclearBall",
    "Oracle",
    "Size",
    "SpectralKSparsePolytope",
    "SpectralKSupportBall",
    "parse_constraint",
]

_SHORT = {"l1": 1, "l2": 2, "linf": math.inf}
_KINDS = (
    *(LpBall, KSparsePolytope, KSupportBall, GroupKSupportBall),
    *(NuclearBall, SpectralKSparsePolytope, SpectralKSupportBall),
)
CONSTRAINTS: dict[str, type[Constraint]] = {kind.name: kind for kind in _KINDS}


def parse_constraint(text: str | Constraint, **defaults: Any) -> Constraint:
    """The region that a text means: "k_sparse(k=0.05, radius=init:15)", "l2(diameter=3)", or a bare name.

    Args:
        text: a name and, in brackets, its arguments. `parse_constraint(str(c)) == c`.
        **defaults: arguments for what the text leaves open, such as k and radius; those that the region does not have
            are not looked at, nor is a radius where the text has a diameter.

    Raises:
        ValueError: for an unknown name or argument, or a wrong value; the message names what there is.
    """
    if isinstance(text, Constraint):
        return text
    names = ", ".join([*_SHORT, *CONSTRAINTS])
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text) if isinstance(text, str) else None
    if match is None or match[1] not in {*_SHORT, *CONSTRAINTS}:
        raise ValueError(f"{text!r} is no constraint; there are {names}, as in k_sparse(k=0.05, radius=init:15)")
    kind = CONSTRAINTS.get(match[1], LpBall)
    given = {"p": _SHORT[match[1]]} if match[1] in _SHORT else {}
    for part in filter(None, map(str.strip, (match[2] or "").split(","))):
        key, equals, value = map(str.strip, part.partition("="))
        if not equals or key in given:
            raise ValueError(
                f"{text!r}: {part!r} is no argument, or stands there twice; write {match[1]}(key=value, ...)"
            )
        given[key] = _value(value)
    allowed = [*inspect.signature(kind).parameters]
    for key in given:
        if key not in allowed:
            raise ValueError(f"{match[1]} has no argument {key!r}; it takes {', '.join(allowed)}")
    for key, value in defaults.items():
        clashes = key in ("radius", "diameter") and given.keys() & {"radius", "diameter"}
        if value is not None and key in allowed and not clashes:
            given.setdefault(key, value)
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"{text!r} lacks an argument; {match[1]} takes {', '.join(allowed)}") from error


def _value(text: str) -> Any:
    """A number where it is one: 21 is a count, 0.05 a share."""
    if text == "inf":
        return math.inf
    try:
        number = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return number if isinstance(number, (int, float)) else text
