"""Metrics as functions of arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def accuracy(predictions: ArrayLike, references: ArrayLike) -> float:
    """Share of predictions that equal their reference.

    Args:
        predictions: class indices, shape (n,).
        references: class indices, shape (n,).

    Raises:
        ValueError: if the shapes differ or are empty.
    """
    predicted, wanted = np.asarray(predictions), np.asarray(references)
    if predicted.shape != wanted.shape or not predicted.size:
        raise ValueError(f"predictions {predicted.shape} and references {wanted.shape} must have one shape, not empty")
    return float((predicted == wanted).mean())
