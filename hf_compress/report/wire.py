"""How many bytes of weights are left after compression on the wire: zlib, level 6, of all of them or of a sample."""

from __future__ import annotations

import zlib

import torch

BUDGET = 1 << 18  # bytes of a tensor that are compressed; of larger ones slices all over the tensor stand for the rest
_SLICE = 1 << 10
_PARTS = 64  # at most so many parts of a larger tensor are looked at


class Wire:
    """Compresses one tensor that comes in parts, in order.

    Args:
        size: bytes of the whole tensor.
        parts: in how many parts it comes, all but the last of the same size.
    """

    def __init__(self, size: int, parts: int) -> None:
        self._size, self._seen, self._written = size, 0, 0
        self._stream = zlib.compressobj(6)
        self._every = 1 if size <= BUDGET else -(-parts // _PARTS)
        self._share = 1.0 if size <= BUDGET else min(1.0, BUDGET / size * self._every)

    def wants(self, part: int) -> bool:
        """Whether the part of this number is looked at, so that the others need not be made."""
        return part % self._every == 0

    def add(self, values: torch.Tensor) -> None:
        """Compress a part, or evenly spaced slices of it."""
        self.add_bytes(values.contiguous().view(-1).view(torch.uint8).numpy().tobytes())

    def add_bytes(self, content: bytes) -> None:
        """The same for bytes."""
        count = max(1, round(len(content) * self._share / _SLICE))
        step = len(content) if self._share >= 1 else -(-len(content) // count)
        for start in range(0, len(content), max(1, step)):
            piece = content[start : start + (step if self._share >= 1 else _SLICE)]
            self._seen += len(piece)
            self._written += len(self._stream.compress(piece))

    def total(self) -> int:
        """Compressed bytes of the whole tensor."""
        self._written += len(self._stream.flush())
        return self._written if self._seen in (0, self._size) else round(self._written * self._size / self._seen)
