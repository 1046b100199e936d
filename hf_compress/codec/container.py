"""The files of coded tensors, and reading them. Everything is little-endian; nothing that is read is trusted.

The container is ours (version 1). A number written `num` has variable length (LEB128). Both files end with the CRC-32
of all bytes before.

A tensor, n values in slices of d:

    "LNX1"  u8 version = 1
    u8 codec        0 raw, 1 constant, 2 rANS
    u8 ndim (1-5)   u8 flags (1: slices have flags, 2: own tables, 4: scales, 8: transposed)
    u32 dims[ndim]  of the model's weight; the values of a transposed one have them reversed
    u16 group       u16 d       f32 gain
    scales          u8 type (0 float16, 1 upper half of float32, 2 float32), one for each output; flag 4 only
    then  codec 0:  u8 bytes of a value (1, 2), and the values (i8 or i16)
          codec 1:  i16, the value of all
          codec 2:  num filled slices (flag 1 only), tables (flag 2 only), num words of each chunk, and the words (u32)
    u32 crc

The groups:

    "LNXG"  u8 version = 1  u16 groups
    of each: u16 d, f32 S[d][d], u8 flags (1: tables are of streams with flags, 2: has tables), tables
    u32 crc

Streams: without flags, channel 0 to d-1 of all slices. With flags, first a stream of one symbol a slice (1: a value of
it is not 0), then the channels of those slices alone. Tables are written one for each stream in this order (tables.py);
those of a group serve the tensors without own tables, and must be of the same kind of streams. The streams whose tables
have more than one symbol follow each other in one sequence, which is cut into chunks of 65,536 symbols, the last one
shorter: a chunk of a small tensor holds all its streams, each coded with its own table.

A chunk (section 3.2 of the specification): state x = 0; precision 24; F_s = 256 f_s, C_s = sum of F below s. To encode,
from the last symbol to the first: if x >> 40 >= F_s, put out the low word and x >>= 32; then
x = (x div F_s) * 2^24 + (x mod F_s) + C_s. In the end put out low words until x = 0. The decoder goes backwards from
the last word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .fields import Bytes, CodecError, Reader, read_finite, read_scales
from .latents import Latents, weights_of
from .rans import decode_streams
from .tables import CHUNK, Table, chunks_of

MAGIC, GROUPS_MAGIC, VERSION = b"LNX1", b"LNXG", 1
RAW, CONSTANT, RANS = 0, 1, 2
HAS_FLAGS, OWN_TABLES, HAS_SCALES, TRANSPOSED = 1, 2, 4, 8
GROUP_HAS_FLAGS, GROUP_HAS_TABLES = 1, 2


@dataclass(frozen=True, eq=False)
class Groups:
    """What the tensors of a model share.

    Attributes:
        decoders: S of each group, (d, d) float32.
        tables: of each group, with whether its streams have flags; None for a group without.
        table_bytes: what the tables take in the file.
    """

    decoders: tuple[np.ndarray, ...]
    tables: tuple[tuple[bool, tuple[Table, ...]] | None, ...]
    table_bytes: int


def read_groups(data: Bytes) -> Groups:
    """Read and check what `encode` wrote for the groups.

    Raises:
        CodecError: for anything else.
    """
    reader = Reader(data, GROUPS_MAGIC, VERSION)
    (count,) = reader.unpack("H", "the number of groups")
    decoders, tables, table_bytes = [], [], 0
    for i in range(count):
        (d,) = reader.unpack("H", f"the slice of group {i}")
        if not d:
            raise CodecError(f"group {i} has slices of 0 values, allowed are 1 to 65535")
        decoders.append(read_finite(reader, d * d, f"the decoder of group {i}").reshape(d, d))
        (flags,) = reader.unpack("B", f"the flags of group {i}")
        if flags not in (0, GROUP_HAS_TABLES, GROUP_HAS_TABLES | GROUP_HAS_FLAGS):
            raise CodecError(f"group {i} has flags {flags}, known are 0, 2 and 3")
        before, has_flags = reader.position, bool(flags & GROUP_HAS_FLAGS)
        tables.append((has_flags, _read_tables(reader, d, has_flags)) if flags & GROUP_HAS_TABLES else None)
        table_bytes += reader.position - before
    _expect_end(reader)
    return Groups(tuple(decoders), tuple(tables), table_bytes)


def decode_latents(data: Bytes, groups: Groups, shape: tuple[int, ...]) -> Latents:
    """The integers of a tensor. What is allocated is bounded by `shape`, whatever the file says.

    Args:
        data: what `encode` wrote for it.
        groups: of the same call.
        shape: of the model's weight.

    Returns:
        Latents whose values have the smaller of int8 and int16 that holds them.

    Raises:
        CodecError: when the bytes are damaged, or are those of another tensor or of other groups.
        RuntimeError: when the installed constriction does not code as the format says.
    """
    blob = _Blob(data, groups, tuple(shape))
    if blob.codec == RAW:
        rows = np.frombuffer(blob.body, np.int8 if blob.width == 1 else "<i2").astype(f"i{blob.width}")
    elif blob.codec == CONSTANT:
        rows = np.full(blob.size, blob.value, np.int16 if needs_16_bits(blob.value, blob.value) else np.int8)
    else:
        rows = _decode_rows(blob)
    if rows.dtype == np.int16 and not needs_16_bits(int(rows.min()), int(rows.max())):
        rows = rows.astype(np.int8)
    values = rows.reshape(blob.shape[::-1] if blob.is_transposed else blob.shape)
    return Latents(values, blob.row, blob.group, blob.gain, blob.scales, blob.is_transposed)


def decode(data: Bytes, groups: Groups, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of a tensor: `weights_of` what `decode_latents` gives, and its errors."""
    latents = decode_latents(data, groups, shape)
    return weights_of(latents, groups.decoders[latents.group])


def byte_report(blobs: Mapping[str, Bytes], groups: Bytes) -> dict[str, int]:
    """Where the bytes of a model's blobs are.

    Returns:
        Bytes of the payload (values and words), headers, tables (own and shared), checks (CRCs and sizes of chunks),
        decoders and scales; their sum is the size of all blobs.

    Raises:
        CodecError: for bytes that `encode` did not write.
    """
    known = read_groups(groups)
    sizes = {"payload": 0, "headers": 0, "tables": known.table_bytes, "checks": 4, "decoders": 0, "scales": 0}
    sizes["decoders"] = sum(s.nbytes for s in known.decoders)
    sizes["headers"] = len(groups) - sum(sizes.values())
    for blob in blobs.values():
        for what, size in _Blob(blob, known, None).sizes.items():
            sizes[what] += size
    return sizes


class _Blob:
    """A tensor's file, checked as far as possible before anything of its size is allocated."""

    def __init__(self, data: Bytes, groups: Groups, shape: tuple[int, ...] | None) -> None:
        reader = Reader(data, MAGIC, VERSION)
        self._read_header(reader, groups, shape)
        self.sizes = {"headers": reader.position, "scales": 0, "tables": 0, "checks": 4}
        self.scales = None
        if self._flags & HAS_SCALES:
            outputs = self.shape[-1] if self.is_transposed else self.shape[0]
            self.scales = read_scales(reader, outputs)
            self.sizes["scales"] = reader.position - self.sizes["headers"]
        if self.codec == RAW:
            self._read_raw(reader)
        elif self.codec == CONSTANT:
            (self.value,) = reader.unpack("h", "the value of a constant tensor")
            self.sizes["payload"] = 2
        else:
            self._read_streams(reader, groups)
        _expect_end(reader)

    def _read_header(self, reader: Reader, groups: Groups, shape: tuple[int, ...] | None) -> None:
        self.codec, ndim, self._flags = reader.unpack("BBB", "the header")
        if self.codec not in (RAW, CONSTANT, RANS):
            raise CodecError(f"the codec is {self.codec}, known are 0, 1 and 2")
        if not 1 <= ndim <= 5:
            raise CodecError(f"the tensor has {ndim} dimensions, allowed are 1 to 5")
        known = HAS_SCALES | TRANSPOSED | (HAS_FLAGS | OWN_TABLES if self.codec == RANS else 0)
        if self._flags & ~known:
            raise CodecError(f"the flags are {self._flags}, known with codec {self.codec} are those in {known}")
        self.shape = reader.unpack(f"{ndim}I", "the dimensions")
        if not all(self.shape) or (shape is not None and self.shape != shape):
            raise CodecError(f"the bytes are of a tensor of shape {self.shape}, the model has {shape}")
        self.is_transposed = bool(self._flags & TRANSPOSED)
        if self.is_transposed and ndim != 2:
            raise CodecError(f"only matrices are transposed, the tensor has {ndim} dimensions")
        self.size = math.prod(self.shape)
        self.group, self.row = reader.unpack("HH", "the group")
        if self.group >= len(groups.decoders):
            raise CodecError(f"the tensor is of group {self.group}, there are {len(groups.decoders)}")
        if self.row != len(groups.decoders[self.group]) or self.size % self.row:
            raise CodecError(
                f"slices of {self.row} values do not divide {self.size} values, or are not those of the group "
                f"({len(groups.decoders[self.group])})"
            )
        self.gain = float(read_finite(reader, 1, "the gain")[0])

    def _read_raw(self, reader: Reader) -> None:
        (self.width,) = reader.unpack("B", "the bytes of a value")
        if self.width not in (1, 2):
            raise CodecError(f"a raw value has {self.width} bytes, allowed are 1 and 2")
        self.body = reader.take(self.size * self.width, "the values")
        self.sizes |= {"payload": len(self.body), "headers": self.sizes["headers"] + 1}

    def _read_streams(self, reader: Reader, groups: Groups) -> None:
        """Tables and sizes of chunks; the words must be all that is left."""
        start, slices = reader.position, self.size // self.row
        self.has_flags = bool(self._flags & HAS_FLAGS)
        self.filled = reader.number(slices, "the number of filled slices") if self.has_flags else slices
        before = reader.position
        self.sizes["headers"] += before - start
        if self._flags & OWN_TABLES:
            self.tables = _read_tables(reader, self.row, self.has_flags)
        else:
            self.tables = _shared_tables(groups, self.group, self.has_flags)
        after = reader.position
        counts = [slices] * self.has_flags + [self.filled] * self.row
        coded = sum(count for table, count in zip(self.tables, counts, strict=True) if not table.is_constant)
        self.chunks = self._read_chunks(reader, coded)
        needed = 4 * sum(self.chunks)
        if needed != reader.left:
            raise CodecError(f"the chunks have {needed} bytes of words, {reader.left} are left")
        self.sizes |= {"tables": after - before, "payload": needed}
        self.sizes["checks"] += reader.position - after
        self.body = reader.take(needed, "the words")

    @staticmethod
    def _read_chunks(reader: Reader, coded: int) -> list[int]:
        """The words of each chunk."""
        if chunks_of(coded) > reader.left:
            raise CodecError(f"{coded} symbols have {chunks_of(coded)} chunks, {reader.left} bytes are left")
        # A symbol takes 16 bits at most.
        symbols = (min(CHUNK, coded - start) for start in range(0, coded, CHUNK))
        return [reader.number(n // 2 + 2, "the number of words of a chunk") for n in symbols]


def _read_tables(reader: Reader, row: int, has_flags: bool) -> tuple[Table, ...]:
    tables = tuple(Table.read(reader) for _ in range(row + has_flags))
    if has_flags and (tables[0].lo < 0 or tables[0].hi > 1):
        raise CodecError(f"flags of slices are 0 and 1, their table goes from {tables[0].lo} to {tables[0].hi}")
    return tables


def _shared_tables(groups: Groups, group: int, has_flags: bool) -> tuple[Table, ...]:
    found = groups.tables[group]
    if found is None or found[0] != has_flags:
        raise CodecError(f"the tensor uses tables of group {group}, which has none for its streams")
    return found[1]


def _decode_rows(blob: _Blob) -> np.ndarray:
    """All values of the streams, in one dimension."""
    tables = blob.tables[blob.has_flags :]
    is_wide = needs_16_bits(min(t.lo for t in tables), max(t.hi for t in tables))
    rows = np.empty((blob.filled, blob.row), np.int16 if is_wide else np.int8)
    flags = np.empty(blob.size // blob.row if blob.has_flags else 0, np.int8)
    streams = [flags, *rows.T] if blob.has_flags else [*rows.T]
    decode_streams(np.frombuffer(blob.body, "<u4"), blob.chunks, streams, blob.tables)
    if not blob.has_flags:
        return rows.reshape(-1)
    if np.count_nonzero(flags) != blob.filled:
        raise CodecError(f"{np.count_nonzero(flags)} slices have flags, the file says {blob.filled}")
    found = np.zeros((len(flags), blob.row), rows.dtype)
    found[flags.view(bool)] = rows
    return found.reshape(-1)


def needs_16_bits(lo: int, hi: int) -> bool:
    """Whether values from `lo` to `hi` do not fit int8."""
    return lo < -128 or hi > 127


def _expect_end(reader: Reader) -> None:
    if reader.left:
        raise CodecError(f"{reader.left} bytes follow the end")
