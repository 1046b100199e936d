"""Bytes between two processes: a frame is its length (u64, little-endian) and so many bytes."""

from __future__ import annotations

import struct
from typing import BinaryIO

import numpy as np

from .fields import Bytes, bytes_of


def write_frame(stream: BinaryIO, data: Bytes) -> None:
    """Write bytes with their length."""
    stream.write(struct.pack("<Q", len(data)))
    stream.write(bytes_of(data))


def read_frame(stream: BinaryIO) -> np.ndarray | None:
    """The bytes of the next frame as uint8; None where the stream ends before its end."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    data = np.empty(struct.unpack("<Q", head)[0], np.uint8)
    view, filled = data.data, 0
    while filled < len(data):
        count = stream.readinto(view[filled:])  # type: ignore[attr-defined]
        if not count:
            return None
        filled += count
    return data
