"""Streams of integers by rANS with a 64-bit state and 32-bit words: constriction's `AnsCoder`, checked.

constriction decodes anything to something: a coder that runs out of words goes on, and one that has words left says
nothing. So a chunk counts as decoded only when the coder is empty afterwards, and what the installed release makes of
recorded words is compared once.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from .fields import CodecError
from .tables import CHUNK, Table

_SYMBOLS = [*[0] * 5, *range(-3, 5), *[1, 0, -1] * 7, 4, -3, 2]
_WEIGHTS = [1, 3, 0, 90, 60, 40, 2, 300]
_WORDS = "00be38e324eb1473d1a23534d3eb0ff3671d645c3404028c6e45105457822000"


def encode_stream(values: np.ndarray, table: Table) -> Iterator[np.ndarray]:
    """The words (uint32) of each chunk of a stream.

    Args:
        values: 1-D, contiguous, int8 or int16, every one covered by the table.
        table: of at least two symbols.
    """
    check_coder()
    if values.itemsize == 1 and len(table.weights) > 256:
        values = values.astype(np.int16)
    unsigned = np.dtype(f"u{values.itemsize}")
    # The difference may wrap around; as a number without sign it is right again.
    low = unsigned.type(table.lo % 256**values.itemsize)
    for start in range(0, len(values), CHUNK):
        yield _encode((values[start : start + CHUNK].view(unsigned) - low).astype(np.int32), table)


def decode_stream(chunks: list[np.ndarray], table: Table, out: np.ndarray) -> None:
    """Fill a stream.

    Args:
        chunks: the words of each, little-endian of 32 bits, at any address.
        table: that it was coded with.
        out: 1-D, any strides, int8 or int16, wide enough for the symbols of the table.

    Raises:
        CodecError: when words are missing or left over.
    """
    if table.is_constant:
        out[...] = table.lo
        return
    check_coder()
    for start, words in zip(range(0, len(out), CHUNK), chunks, strict=True):
        part = out[start : start + CHUNK]
        np.add(_decode(words, table, len(part)), table.lo, out=part, dtype=np.int32, casting="unsafe")


@cache
def check_coder() -> None:
    """Compare the installed constriction with recorded words, once.

    Raises:
        RuntimeError: when it codes otherwise than the releases that the format was made with.
    """
    table = Table(-3, np.array(_WEIGHTS, np.int64))
    symbols = np.array(_SYMBOLS, np.int32) + 3
    words = np.frombuffer(bytes.fromhex(_WORDS), "<u4").astype(np.uint32)
    try:
        is_same = np.array_equal(_encode(symbols, table), words)
        is_same = is_same and np.array_equal(_decode(words, table, len(symbols)), symbols)
    except CodecError:
        is_same = False
    if not is_same:
        version = importlib.metadata.version("constriction")
        raise RuntimeError(
            f"constriction {version} codes recorded symbols otherwise than the releases of this format; "
            "install constriction>=0.4.1,<0.6"
        )


def _encode(symbols: np.ndarray, table: Table) -> np.ndarray:
    coder = _coder()
    coder.encode_reverse(symbols, table.model)
    return coder.get_compressed()


def _decode(words: np.ndarray, table: Table, count: int) -> np.ndarray:
    if len(words) and not words[-1]:
        raise CodecError("a chunk ends with a word of zeros, which no encoder writes")
    coder = _coder(words.astype(np.uint32))  # always a copy: constriction wants them aligned
    symbols = coder.decode(table.model, count)
    if not coder.is_empty():
        raise CodecError(f"a chunk of {count} symbols has words left over or missing: it was made with another table")
    return symbols


def _coder(*words: np.ndarray) -> Any:
    import constriction

    return constriction.stream.stack.AnsCoder(*words)
