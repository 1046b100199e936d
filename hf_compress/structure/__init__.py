"""Shapes that change: what belongs together, removal, layers in two factors, how these are described and rebuilt."""

from __future__ import annotations

from .belonging import Belonging
from .coupling import find_coupled_targets
from .dependencies import Line
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
from .needless import needless_outputs
from .plan import example_inputs, plan_removal
from .removal import remove

__all__ = [
    "Belonging",
    "FactoredConv1d",
    "FactoredConv2d",
    "FactoredConv3d",
    "FactoredLinear",
    "Line",
    "describe",
    "example_inputs",
    "factor",
    "factored_layers",
    "find_coupled_targets",
    "needless_outputs",
    "plan_removal",
    "reasons_to_stay",
    "rebuild",
    "remove",
    "write_description",
]
