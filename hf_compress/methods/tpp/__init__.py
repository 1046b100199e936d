"""TPP: filters that will be removed become orthogonal to the others and small, so that nobody misses them."""

from __future__ import annotations

from .penalty import SLIDES, TrainabilityPenalty
from .trainability import jacobian_singular_values, mean_jacobian_singular_value

__all__ = ["SLIDES", "TrainabilityPenalty", "jacobian_singular_values", "mean_jacobian_singular_value"]
