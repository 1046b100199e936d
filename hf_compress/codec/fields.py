"""The fields of a file: reading that never passes its end, whole numbers of variable length, scales."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = bytes | memoryview | NDArray[np.uint8]


class CodecError(ValueError):
    """Bytes that are damaged, were made by someone else's rules, or belong to another tensor."""


class Reader:
    """Takes fields from the front of bytes, of which the last four are the CRC-32 of those before.

    Args:
        data: all bytes of a file.
        magic: the four bytes that it starts with.
        version: the byte behind them.

    Raises:
        CodecError: when the start is another one, or the sum does not agree.
        TypeError: when `data` is none of bytes, memoryview and 1-D uint8 array.
    """

    def __init__(self, data: Bytes, magic: bytes, version: int) -> None:
        view = bytes_of(data)
        start = bytes(view[:5])
        if start[:4] != magic:
            raise CodecError(f"the bytes start with {start[:4]!r}, those of this format with {magic!r}")
        if start[4:] != bytes([version]):
            raise CodecError(f"the format has version {list(start[4:])}, known is {version}; update hf_compress")
        if len(view) < 9:
            raise CodecError(f"{len(view)} bytes are cut off before the end")
        body, found = view[:-4], int.from_bytes(view[-4:], "little")
        if zlib.crc32(body) != found:
            raise CodecError("the check sum does not agree: bytes are damaged or cut off; fetch the file again")
        self._body, self.position = body, 5

    @property
    def left(self) -> int:
        """Bytes that nobody took yet."""
        return len(self._body) - self.position

    def take(self, count: int, what: str) -> memoryview:
        """The next bytes."""
        if count > self.left:
            raise CodecError(f"{what}: {count} bytes are needed and {self.left} are left")
        self.position += count
        return self._body[self.position - count : self.position]

    def unpack(self, form: str, what: str) -> tuple[Any, ...]:
        """The next fields in the form of `struct`, little-endian."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))

    def number(self, most: int, what: str) -> int:
        """A whole number of variable length (LEB128: 7 bits a byte, low ones first), at most `most`."""
        value = shift = 0
        while True:
            byte = self.take(1, what)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                break
            shift += 7
            if value > most or shift > 63:
                break
        if value > most or byte > 127:
            raise CodecError(f"{what} is {value} or more, allowed are 0 to {most}")
        if byte == 0 and shift:
            raise CodecError(f"{what} is written longer than it is")
        return value


def bytes_of(data: Any) -> memoryview:
    """A view of coded bytes; it must be one of the types that hold them."""
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 1:
            raise TypeError(f"coded bytes are a 1-D uint8 array, got {data.ndim}-D {data.dtype}")
        data = np.ascontiguousarray(data)
    elif not isinstance(data, bytes | memoryview):
        raise TypeError(f"coded bytes are bytes, a memoryview or a uint8 array, got {type(data).__name__}")
    return memoryview(data).cast("B")


def seal(parts: Sequence[bytes | memoryview]) -> bytes:
    """A file of its parts and their check sum."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return b"".join([*parts, crc.to_bytes(4, "little")])


def write_number(value: int) -> bytes:
    """What `Reader.number` reads."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


SCALE_BYTES = {0: 2, 1: 2, 2: 4}  # float16, the upper half of float32 (bfloat16), float32


def write_scales(scales: np.ndarray) -> bytes:
    """A byte that says the type, and the numbers in the smallest type that holds all of them exactly."""
    bits = scales.view(np.uint32)
    with np.errstate(over="ignore"):
        half = scales.astype("<f2")
    if np.array_equal(half.astype(np.float32).view(np.uint32), bits):
        return b"\0" + half.tobytes()
    if not (bits & 0xFFFF).any():
        return b"\1" + (bits >> 16).astype("<u2").tobytes()
    return b"\2" + scales.astype("<f4").tobytes()


def read_scales(reader: Reader, count: int) -> np.ndarray:
    """`count` float32 numbers that `write_scales` wrote."""
    (kind,) = reader.unpack("B", "the type of the scales")
    if kind not in SCALE_BYTES:
        raise CodecError(f"the type of the scales is {kind}, known are {sorted(SCALE_BYTES)}")
    data = reader.take(count * SCALE_BYTES[kind], "the scales")
    if kind == 1:
        scales = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        scales = np.frombuffer(data, "<f2" if kind == 0 else "<f4").astype(np.float32)
    if not np.isfinite(scales).all():
        raise CodecError("a scale is not finite")
    return scales


def read_finite(reader: Reader, count: int, what: str) -> np.ndarray:
    """`count` float32 numbers, all finite."""
    numbers = np.frombuffer(reader.take(4 * count, what), "<f4").astype(np.float32)
    if not np.isfinite(numbers).all():
        raise CodecError(f"{what} is not finite")
    return numbers
