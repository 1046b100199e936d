"""Streams of integers by rANS with a 64-bit state and 32-bit words: constriction's `AnsCoder`, checked.

constriction decodes anything to something: a coder that runs out of words goes on, and one that has words left says
nothing. So a chunk counts as decoded only when the coder is empty afterwards, and what the installed release makes of
recorded words is compared once.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from .fields import CodecError
from .tables import CHUNK, Table

_SYMBOLS = [*[0] * 5, *range(-3, 5), *[1, 0, -1] * 7, 4, -3, 2]
_WEIGHTS = [1, 3, 0, 90, 60, 40, 2, 300]
_WORDS = "00be38e324eb1473d1a23534d3eb0ff3671d645c3404028c6e45105457822000"


def encode_streams(streams: Sequence[np.ndarray], tables: Sequence[Table]) -> Iterator[np.ndarray]:
    """The words (uint32) of each chunk.

    Args:
        streams: 1-D, contiguous, int8 or int16.
        tables: of each stream; it covers every value of it.
    """
    check_coder()
    for chunk in _chunks(_lengths(streams, tables)):
        # A coder is a stack: what is to come out first goes in last.
        parts = [(_symbols(streams[i][start:end], tables[i]), tables[i]) for i, start, end in chunk]
        yield _encode(parts)


def decode_streams(
    words: np.ndarray, sizes: Sequence[int], streams: Sequence[np.ndarray], tables: Sequence[Table]
) -> None:
    """Fill streams.

    Args:
        words: of all chunks, little-endian of 32 bits, at any address.
        sizes: words of each chunk.
        streams: 1-D, any strides, int8 or int16, wide enough for the symbols of their tables.
        tables: of each stream.

    Raises:
        CodecError: when words are missing or left over.
    """
    check_coder()
    for stream, table in zip(streams, tables, strict=True):
        if table.is_constant:
            stream[...] = table.lo
    last = 0
    for chunk, size in zip(_chunks(_lengths(streams, tables)), sizes, strict=True):
        first, last = last, last + size
        symbols = _decode(words[first:last], [(end - start, tables[i]) for i, start, end in chunk])
        for (i, start, end), found in zip(chunk, symbols, strict=True):
            np.add(found, tables[i].lo, out=streams[i][start:end], dtype=np.int32, casting="unsafe")


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
        is_same = np.array_equal(_encode([(symbols, table)]), words)
        is_same = is_same and np.array_equal(next(_decode(words, [(len(symbols), table)])), symbols)
    except CodecError:
        is_same = False
    if not is_same:
        version = importlib.metadata.version("constriction")
        raise RuntimeError(
            f"constriction {version} codes recorded symbols otherwise than the releases of this format; "
            "install constriction>=0.4.1,<0.6"
        )


def _encode(parts: Sequence[tuple[np.ndarray, Table]]) -> np.ndarray:
    coder = _coder()
    for symbols, table in reversed(parts):
        coder.encode_reverse(symbols, table.model)
    return coder.get_compressed()


def _decode(words: np.ndarray, parts: Sequence[tuple[int, Table]]) -> Iterator[np.ndarray]:
    if len(words) and not words[-1]:
        raise CodecError("a chunk ends with a word of zeros, which no encoder writes")
    coder = _coder(words.astype(np.uint32))  # always a copy: constriction wants them aligned
    for count, table in parts:
        yield coder.decode(table.model, count)
    if not coder.is_empty():
        raise CodecError("a chunk has words left over, or too few: they were made with other tables")


def _symbols(values: np.ndarray, table: Table) -> np.ndarray:
    """Values as numbers from 0 on."""
    if values.itemsize == 1 and len(table.weights) > 256:
        values = values.astype(np.int16)
    unsigned = np.dtype(f"u{values.itemsize}")
    # The difference may wrap around; as a number without sign it is right again.
    return (values.view(unsigned) - unsigned.type(table.lo % 256**values.itemsize)).astype(np.int32)


def _lengths(streams: Sequence[np.ndarray], tables: Sequence[Table]) -> list[int]:
    """How many symbols of each stream are coded."""
    return [0 if table.is_constant else len(stream) for stream, table in zip(streams, tables, strict=True)]


def _chunks(lengths: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
    """What each chunk holds, in order: number of a stream, from where to where."""
    chunk, room = [], CHUNK
    for i, length in enumerate(lengths):
        start = 0
        while start < length:
            end = min(length, start + room)
            chunk.append((i, start, end))
            room -= end - start
            start = end
            if not room:
                yield chunk
                chunk, room = [], CHUNK
    if chunk:
        yield chunk


def _coder(*words: np.ndarray) -> Any:
    import constriction

    return constriction.stream.stack.AnsCoder(*words)
