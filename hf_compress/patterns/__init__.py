"""What a compressed weight looks like. A pattern is a pure function of tensors and never changes a shape."""

from __future__ import annotations

from .base import Pattern, distinct_patterns, parse_pattern, parse_patterns
from .chain import Chain
from .coded import Coded
from .groups import Filters, Grouped, Heads, Neurons
from .low_rank import LowRank
from .n_m import NM
from .quantized import Quantized
from .unstructured import Unstructured

__all__ = [
    "NM",
    "Chain",
    "Coded",
    "Filters",
    "Grouped",
    "Heads",
    "LowRank",
    "Neurons",
    "Pattern",
    "Quantized",
    "Unstructured",
    "distinct_patterns",
    "parse_pattern",
    "parse_patterns",
]
