"""Writing tensors: for each the smallest of its own tables, with and without flags for slices, and those of its group.

Two passes: count, then code. All choices follow from counts by whole numbers, so equal tensors give equal bytes. A
group has tables for one kind of streams, with or without flags, whichever makes all its tensors smaller; they are
fitted once more to those that use them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .container import (
    CONSTANT,
    GROUP_HAS_FLAGS,
    GROUP_HAS_TABLES,
    GROUPS_MAGIC,
    HAS_FLAGS,
    HAS_SCALES,
    MAGIC,
    OWN_TABLES,
    RANS,
    RAW,
    TRANSPOSED,
    VERSION,
    needs_16_bits,
)
from .counting import Counts, count
from .fields import seal, write_number, write_scales
from .latents import Latents
from .rans import encode_streams
from .tables import BIT, Table, chunks_of, fit, is_codable, pooled

_SLICES = 4_096  # that a tensor counts for at most when tables of a group are fitted first


@dataclass(frozen=True, eq=False)
class _Coding:
    """Tables of all streams of a tensor or of a group, and whether there are flags for slices."""

    has_flags: bool
    tables: tuple[Table, ...]

    @property
    def cost(self) -> int:
        """Of the tables in a file, in 1/65536 bit."""
        return sum(table.cost for table in self.tables)

    def cost_of(self, counts: Counts) -> float:
        """Of the chunks of a tensor; infinite where the tables do not cover it."""
        streams = counts.streams(self.has_flags)
        coded = sum(int(c.sum()) for table, (_, c) in zip(self.tables, streams, strict=True) if not table.is_constant)
        symbols = sum(table.cost_of(*stream) for table, stream in zip(self.tables, streams, strict=True))
        return symbols + 40 * BIT * chunks_of(coded)  # 5 bytes for the end of each chunk


@dataclass(frozen=True, eq=False)
class _Codable:
    """What is known of a tensor that tables can cover."""

    counts: Counts
    own: _Coding | None  # none where it is smaller as it is
    cost: float  # without tables of the group


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A tensor between counting and writing."""

    latents: Latents
    columns: np.ndarray  # (d, n), the smaller of int8 and int16: streams in one piece are read faster
    constant: int | None
    codable: _Codable | None


def encode(tensors: Mapping[str, Latents], decoders: Sequence[np.ndarray]) -> tuple[dict[str, bytes], bytes]:
    """Code tensors. Their order matters for no byte.

    Args:
        tensors: by name.
        decoders: S of each group, (d, d) float32, d the slice of its tensors.

    Returns:
        The file of each tensor, and that of the groups, as container.py describes them.

    Raises:
        ValueError: for values outside int16, groups that do not exist, decoders that do not fit.
    """
    if len(decoders) > 65_535:
        raise ValueError(f"there are at most 65535 groups, got {len(decoders)}")
    for i, matrix in enumerate(decoders):
        square = matrix.ndim == 2 and 1 <= len(matrix) == matrix.shape[1] <= 65_535
        if not square or matrix.dtype != np.float32 or not np.isfinite(matrix).all():
            raise ValueError(f"a decoder is a finite float32 (d, d), got {matrix.dtype} {matrix.shape} for group {i}")
    known = {name: _counted(name, latents, decoders) for name, latents in tensors.items()}
    members: list[list[_Codable]] = [[] for _ in decoders]
    for tensor in known.values():
        if tensor.codable:
            members[tensor.latents.group].append(tensor.codable)
    shared = [_shared(m) for m in members]
    blobs = {name: _write(tensor, shared[tensor.latents.group]) for name, tensor in known.items()}
    return blobs, _write_groups(decoders, shared)


def _counted(name: str, latents: Latents, decoders: Sequence[np.ndarray]) -> _Tensor:
    """A tensor with the best of what it can do alone."""
    if latents.group >= len(decoders) or len(decoders[latents.group]) != latents.row:
        raise ValueError(
            f"{name} has slices of {latents.row} in group {latents.group}; "
            f"the groups have slices of {[len(s) for s in decoders]}"
        )
    columns = _columns(name, latents)
    counts = count(columns)
    if counts.constant is not None or not all(map(is_codable, counts.channels)):
        return _Tensor(latents, columns, counts.constant, None)
    codings: list[_Coding | None] = [None, _fitted(counts.streams(False), False)]
    if counts.has_values is not None:
        codings.append(_fitted(counts.streams(True), True))
    costs = [c.cost + c.cost_of(counts) if c else 8 * BIT * columns.nbytes for c in codings]
    best = costs.index(min(costs))
    return _Tensor(latents, columns, None, _Codable(counts, codings[best], costs[best]))


def _columns(name: str, latents: Latents) -> np.ndarray:
    """The channels of the slices, in the smaller of int8 and int16."""
    dtype: type[np.signedinteger] = np.int8
    if latents.values.dtype != np.int8:
        lo, hi = int(latents.values.min()), int(latents.values.max())
        if lo < -32_768 or hi > 32_767:
            raise ValueError(f"{name} has values from {lo} to {hi}, allowed are -32768 to 32767; use a larger decoder")
        dtype = np.int16 if needs_16_bits(lo, hi) else np.int8
    return np.ascontiguousarray(latents.values.reshape(-1, latents.row).T, dtype)


def _streams(members: Sequence[Counts], has_flags: bool, most: int | None = None) -> list[tuple[int, np.ndarray]]:
    """Of several tensors together, each counted as if it had at most so many slices."""
    found = []
    for same in zip(*(counts.streams(has_flags) for counts in members), strict=True):
        if most is not None:
            # What occurs stays, so that the tables cover it.
            same = tuple((lo, np.maximum(c > 0, c * most // max(most, c.sum()))) for lo, c in same)
        found.append(pooled(same))
    return found


def _fitted(streams: list[tuple[int, np.ndarray]], has_flags: bool) -> _Coding:
    return _Coding(has_flags, tuple(fit(*stream) for stream in streams))


def _shared(members: list[_Codable]) -> _Coding | None:
    """The tables of a group that has these tensors; none where all are smaller without."""
    if len(members) < 2:
        return None  # its own are as good
    kinds = [False, True] if any(m.counts.has_values is not None for m in members) else [False]
    cost, coding = min((_shared_in(members, has_flags) for has_flags in kinds), key=lambda pair: pair[0])
    return coding if cost < sum(m.cost for m in members) else None


def _shared_in(members: list[_Codable], has_flags: bool) -> tuple[float, _Coding | None]:
    """What the tensors of a group take with tables of one kind of streams, and the tables."""
    alone = sum(m.cost for m in members)
    total, coding, users = alone, None, members
    # First over all, where a large tensor must not drown the small ones; then over those that are smaller with that.
    for most in (_SLICES, None):
        streams = _streams([u.counts for u in users], has_flags, most)
        if not users or not all(is_codable(counts) for _, counts in streams):
            return alone, None
        coding = _fitted(streams, has_flags)
        gains = [u.cost - coding.cost_of(u.counts) for u in users]
        total = alone + coding.cost - sum(gain for gain in gains if gain > 0)
        users = [u for u, gain in zip(users, gains, strict=True) if gain > 0]
    return total, coding


def _write(tensor: _Tensor, shared: _Coding | None) -> bytes:
    """The file of a tensor."""
    latents, known = tensor.latents, tensor.codable
    coding = known.own if known else None
    if known and shared and shared.cost_of(known.counts) < known.cost:
        coding = shared
    flags = HAS_SCALES * (latents.scales is not None) | TRANSPOSED * latents.is_transposed
    if coding:
        flags |= HAS_FLAGS * coding.has_flags | OWN_TABLES * (coding is not shared)
    codec = CONSTANT if tensor.constant is not None else RANS if coding else RAW
    shape = latents.shape
    parts: list[bytes | memoryview] = [
        MAGIC,
        struct.pack("<BBBB", VERSION, codec, len(shape), flags),
        struct.pack(f"<{len(shape)}I", *shape),
        struct.pack("<HHf", latents.group, latents.row, latents.gain),
    ]
    if latents.scales is not None:
        parts.append(write_scales(latents.scales))
    if tensor.constant is not None:
        parts.append(struct.pack("<h", tensor.constant))
    elif known and coding:
        parts += _write_streams(tensor.columns, known.counts, coding, coding is not shared)
    else:
        width = tensor.columns.itemsize
        parts += [bytes([width]), tensor.columns.T.astype(f"<i{width}").tobytes()]
    return seal(parts)


def _write_streams(columns: np.ndarray, counts: Counts, coding: _Coding, is_own: bool) -> list[bytes | memoryview]:
    """What follows the header with codec 2."""
    parts: list[bytes | memoryview] = []
    streams = [*columns]
    if coding.has_flags:
        has_values = np.ones(columns.shape[1], bool) if counts.has_values is None else counts.has_values
        filled = np.flatnonzero(has_values)  # to take by index is several times faster than by a random mask
        parts.append(write_number(len(filled)))
        if counts.has_values is not None:
            streams = [column.take(filled) for column in columns]
        streams.insert(0, has_values.view(np.int8))
    if is_own:
        parts += [table.write() for table in coding.tables]
    words = list(encode_streams(streams, coding.tables))
    parts += [write_number(len(chunk)) for chunk in words]
    return parts + [chunk.astype("<u4", copy=False).data.cast("B") for chunk in words]


def _write_groups(decoders: Sequence[np.ndarray], shared: Sequence[_Coding | None]) -> bytes:
    """The file of the groups."""
    parts = [GROUPS_MAGIC, struct.pack("<BH", VERSION, len(decoders))]
    for matrix, coding in zip(decoders, shared, strict=True):
        flags = GROUP_HAS_TABLES | GROUP_HAS_FLAGS * coding.has_flags if coding else 0
        parts += [struct.pack("<H", len(matrix)), matrix.astype("<f4").tobytes(), bytes([flags])]
        parts += [table.write() for table in coding.tables] if coding else []
    return seal(parts)
