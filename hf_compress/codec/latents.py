"""Integer tensors and the weights that they stand for (arXiv 2204.02965, section 3; ours: gain and scales)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .fields import CodecError

_PART = 32_768  # values that are decoded together: temporaries of float64 stay in the cache


@dataclass(frozen=True, eq=False)
class Latents:
    """Whole numbers that a small linear decoder turns into a weight.

    Attributes:
        values: integers within int16, 1 to 5 dimensions, outputs first, not empty.
        row: d, so many consecutive values (row-major) form a slice; divides the number of values.
        group: index of the group, whose decoder and tables it uses.
        gain: float32 factor of all weights.
        scales: one float32 for each output, multiplied after the gain; None for 1.
        is_transposed: the weight of the model is that of `values` transposed, for Hugging Face's Conv1D; 2-D only.

    Raises:
        ValueError: where a field is none of these. The range of the values is checked when they are written.
    """

    values: np.ndarray
    row: int = 1
    group: int = 0
    gain: float = 1.0
    scales: np.ndarray | None = None
    is_transposed: bool = False

    def __post_init__(self) -> None:
        values, scales = self.values, self.scales
        if values.dtype.kind not in "iu" or not 1 <= values.ndim <= 5 or not values.size:
            raise ValueError(
                f"latents are integers of 1 to 5 dimensions, not empty; got {values.dtype} {values.shape}; "
                "round and cast them first"
            )
        if not 1 <= self.row <= 65_535 or values.size % self.row:
            raise ValueError(f"a slice has 1 to 65535 values and divides {values.size} values, got {self.row}")
        if not 0 <= self.group <= 65_535:
            raise ValueError(f"a group has a number from 0 to 65535, got {self.group}")
        if not abs(self.gain) <= float(np.finfo(np.float32).max):
            raise ValueError(f"a gain is a finite float32 number, got {self.gain}")
        if self.is_transposed and values.ndim != 2:
            raise ValueError(f"only matrices are transposed, got {values.ndim} dimensions")
        if scales is not None and (scales.dtype != np.float32 or scales.shape != values.shape[:1]):
            raise ValueError(f"scales are float32 {values.shape[:1]}, got {scales.dtype} {scales.shape}")
        if scales is not None and not np.isfinite(scales).all():
            raise ValueError("scales must be finite")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the model's weight."""
        return self.values.shape[::-1] if self.is_transposed else self.values.shape


def weights_of(latents: Latents, decoder: np.ndarray) -> np.ndarray:
    """The weights, the same bits on every machine.

    Sums are float64 and run in the order of the slice, w_j = q_0 S_0j + q_1 S_1j + ..., times gain, times scale of the
    output, and are rounded once to float32 (half to even). A product q_k S_kj is exact in float64, so machines that
    fuse it with the addition get the same bits. Slices of zeros give exact zeros, never -0.

    Args:
        latents: n values in slices of d.
        decoder: S, (d, d) float32.

    Returns:
        float32, C-contiguous, in the shape of the model's weight.

    Raises:
        CodecError: when a weight does not fit float32.
        ValueError: for a decoder of another shape or type.
    """
    d = latents.row
    if decoder.dtype != np.float32 or decoder.shape != (d, d):
        raise ValueError(f"slices of {d} need a float32 decoder {(d, d)}, got {decoder.dtype} {decoder.shape}")
    out = np.empty(latents.shape, np.float32)
    # Parts of the flat order; that of a transposed weight has to be walked through by numpy.
    flat = out.T.flat if latents.is_transposed else out.reshape(-1)
    rows, matrix = latents.values.reshape(-1, d), decoder.astype(np.float64)
    gain, width = float(np.float32(latents.gain)), latents.values.size // len(latents.values)
    step = max(1, _PART // d)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        weights = _sums(part, matrix)
        weights *= gain
        first = start * d
        if latents.scales is not None:
            weights *= _spread(latents.scales, width, first, first + len(weights))
        weights += 0.0
        with np.errstate(over="ignore"):
            narrow = weights.astype(np.float32)
        if not np.isfinite(narrow).all():
            raise CodecError("a weight does not fit float32: decoder, gain or scales are too large")
        flat[first : first + len(weights)] = narrow
    return out


def _sums(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """rows @ matrix in one dimension, each sum in the order of the slice, with the slices side by side in memory."""
    columns = np.ascontiguousarray(rows.T, np.float64)
    total = matrix[0][:, None] * columns[0]
    term = np.empty_like(total)
    for k in range(1, len(matrix)):
        total += np.multiply(matrix[k][:, None], columns[k], out=term)
    return total.T.reshape(-1)


def entropy_bits(latents: Latents) -> float:
    """Bits that the values take at least when each of the d channels of a slice is coded by its own frequencies."""
    rows = latents.values.reshape(-1, latents.row)
    return float(sum(_entropy(rows[:, k]) for k in range(latents.row)))


def _entropy(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return float(counts @ np.log2(len(values) / counts))


def _spread(scales: np.ndarray, width: int, start: int, end: int) -> np.ndarray:
    """The scales of the values from `start` to `end`, of which `width` follow each other in an output."""
    first, last = start // width, (end - 1) // width
    times = np.full(last - first + 1, width)
    times[0] -= start - first * width
    times[-1] -= (last + 1) * width - end
    return np.repeat(scales[first : last + 1].astype(np.float64), times)
