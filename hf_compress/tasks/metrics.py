"""Metrics as functions of arrays, and where they are as modules of the library `evaluate`."""

from __future__ import annotations

from pathlib import Path

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
    predicted, wanted = _of_one_shape(predictions, references)
    return float((predicted == wanted).mean())


def f1(predictions: ArrayLike, references: ArrayLike, average: str = "binary") -> float:
    """Harmonic mean of precision and recall; 0 where both are 0.

    Args:
        predictions: class indices, shape (n,).
        references: class indices, shape (n,).
        average: "binary", of class 1 where there are the classes 0 and 1; or "macro", the mean over all classes that
            are predicted or wanted.

    Raises:
        ValueError: if the shapes differ or are empty, or for a class above 1 with "binary".
    """
    predicted, wanted = _of_one_shape(predictions, references)
    classes = np.union1d(predicted, wanted)
    if average not in ("binary", "macro"):
        raise ValueError(f'average must be "binary" or "macro", got {average!r}')
    if average == "binary":
        if not np.isin(classes, (0, 1)).all():
            raise ValueError(f'average="binary" takes classes 0 and 1, got {classes.tolist()[:9]}; use "macro"')
        classes = np.ones(1)
    return float(np.mean([_f1_of_one(predicted == c, wanted == c) for c in classes]))


def matthews_correlation(predictions: ArrayLike, references: ArrayLike) -> float:
    """Correlation of predicted and wanted classes, in [-1, 1]; 0 where all predictions or all references are alike.

    For two classes it is that of Matthews (1975), for more that of Gorodkin (2004).

    Args:
        predictions: class indices, shape (n,).
        references: class indices, shape (n,).

    Raises:
        ValueError: if the shapes differ or are empty.
    """
    predicted, wanted = _of_one_shape(predictions, references)
    classes, indices = np.unique([predicted, wanted], return_inverse=True)
    counts = np.zeros((classes.size, classes.size))
    np.add.at(counts, tuple(indices.reshape(2, -1)), 1)
    total, of_predictions, of_references = counts.sum(), counts.sum(1), counts.sum(0)
    covariance = counts.trace() * total - of_predictions @ of_references
    variances = [total**2 - c @ c for c in (of_predictions, of_references)]
    return float(covariance / np.sqrt(variances[0] * variances[1])) if all(variances) else 0.0


def evaluate_module(name: str) -> str:
    """Where the metric of this name is, for the library `evaluate`, which loads it without the Hub.

    ```python
    metric = evaluate.load(evaluate_module("f1"))
    ```

    Args:
        name: "accuracy", "f1", "matthews_correlation" or "squad".

    Raises:
        ValueError: for another name.
    """
    folder = Path(__file__).parent / "evaluate_modules"
    names = sorted(path.name.removeprefix("hfc_") for path in folder.glob("hfc_*"))
    if name not in names:
        raise ValueError(f"no metric {name!r}; there are: {', '.join(names)}")
    return str(folder / f"hfc_{name}")


def _of_one_shape(predictions: ArrayLike, references: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    predicted, wanted = np.asarray(predictions), np.asarray(references)
    if predicted.shape != wanted.shape or not predicted.size:
        raise ValueError(f"predictions {predicted.shape} and references {wanted.shape} must have one shape, not empty")
    return predicted, wanted


def _f1_of_one(predicted: np.ndarray, wanted: np.ndarray) -> float:
    count = predicted.sum() + wanted.sum()
    return 2 * (predicted & wanted).sum() / count if count else 0.0
