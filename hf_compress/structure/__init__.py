"""Shapes that change: what belongs together, layers in two factors, and how these are described and rebuilt."""

from __future__ import annotations

from .coupling import find_coupled_targets
from .describe import describe, rebuild, write_description
from .factored import (
    FactoredConv1d,
    FactoredConv2d,
    FactoredConv3d,
    FactoredLinear,
    factor,
    factored_layers,
    reasons_to_stay,
)

__all__ = [
    "FactoredConv1d",
    "FactoredConv2d",
    "FactoredConv3d",
    "FactoredLinear",
    "describe",
    "factor",
    "factored_layers",
    "find_coupled_targets",
    "reasons_to_stay",
    "rebuild",
    "write_description",
]
