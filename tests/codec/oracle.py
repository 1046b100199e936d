"""A decoder of whole numbers alone, written from the description in container.py. It trusts its input.

It shares no code with the package: one list of values, no numpy, no constriction.
"""

from __future__ import annotations

import bisect
import itertools
import math
import struct
import zlib


class Bytes:
    """Takes fields from the front."""

    def __init__(self, data, magic):
        data = bytes(data)
        assert data[:5] == magic + b"\1"
        assert zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little")
        self.data, self.at = data[:-4], 5

    def take(self, form):
        fields = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return fields if len(fields) > 1 else fields[0]

    def floats(self, count):
        return [self.take("f") for _ in range(count)]

    def num(self):
        value = shift = 0
        while True:
            byte = self.take("B")
            value += (byte % 128) << shift
            shift += 7
            if byte < 128:
                return value

    def table(self):
        lo, n = self.take("h"), self.num()
        weights = [self.num() for _ in range(n)] if n > 1 else [1]
        f = [max(1, w * (65_536 - n) // sum(weights)) for w in weights]
        f[f.index(max(f))] += 65_536 - sum(f)
        return lo, f


def groups(data):
    """Of each group: d, S as rows, whether its tables have flags, its tables."""
    source, found = Bytes(data, b"LNXG"), []
    for _ in range(source.take("H")):
        d = source.take("H")
        matrix = [source.floats(d) for _ in range(d)]
        flags = source.take("B")
        count = d + flags % 2 if flags & 2 else 0
        found.append((d, matrix, bool(flags & 1), [source.table() for _ in range(count)]))
    assert source.at == len(source.data)
    return found


def symbols(words, frequencies):
    """The symbols of a chunk, of which each has its own frequencies."""
    words, state, starts = list(words), 0, {}
    for _ in range(min(2, len(words))):
        state = state << 32 | words.pop()
    found = []
    for f in frequencies:
        if id(f) not in starts:
            starts[id(f)] = list(itertools.accumulate((256 * x for x in f[:-1]), initial=0))
        low = state % 2**24
        s = bisect.bisect_right(starts[id(f)], low) - 1
        found.append(s)
        state = 256 * f[s] * (state >> 24) + low - starts[id(f)][s]
        if state < 2**32 and words:
            state = state << 32 | words.pop()
    assert state == 0
    assert not words
    return found


def streams(source, tables, lengths):
    """The values of all streams."""
    coded = [t for t, length in zip(tables, lengths, strict=True) for _ in range(length) if len(t[1]) > 1]
    chunks = [coded[start : start + 65_536] for start in range(0, len(coded), 65_536)]
    sizes = [source.num() for _ in chunks]
    values = []
    for size, chunk in zip(sizes, chunks, strict=True):
        words = [source.take("I") for _ in range(size)]
        found = symbols(words, [f for _, f in chunk])
        values += [lo + s for (lo, _), s in zip(chunk, found, strict=True)]
    values = iter(values)
    return [
        [next(values) if len(f) > 1 else lo for _ in range(length)]
        for (lo, f), length in zip(tables, lengths, strict=True)
    ]


def header(source):
    codec, ndim, flags = source.take("BBB")
    shape = tuple(source.take("I") for _ in range(ndim))
    group, d, gain = source.take("HHf")
    scales = None
    if flags & 4:
        kind = source.take("B")
        outputs = shape[-1] if flags & 8 else shape[0]
        take = {0: "e", 1: "H", 2: "f"}[kind]
        scales = [source.take(take) for _ in range(outputs)]
        if kind == 1:
            scales = [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in scales]
    return codec, shape, flags, group, d, gain, scales


def latents(data, group_data):
    """All fields of a tensor; values in one list, in the order of the latents."""
    source = Bytes(data, b"LNX1")
    codec, shape, flags, group, d, gain, scales = header(source)
    n = math.prod(shape)
    if codec == 0:
        form = {1: "b", 2: "h"}[source.take("B")]
        values = [source.take(form) for _ in range(n)]
    elif codec == 1:
        values = [source.take("h")] * n
    else:
        filled = source.num() if flags & 1 else n // d
        known = groups(group_data)[group]
        assert flags & 2 or known[2] == bool(flags & 1)
        tables = [source.table() for _ in range(d + flags % 2)] if flags & 2 else known[3]
        found = streams(source, tables, [n // d] * (flags & 1) + [filled] * d)
        has_values = found.pop(0) if flags & 1 else [1] * (n // d)
        rows = zip(*found, strict=True)
        values = [v for has in has_values for v in (next(rows) if has else [0] * d)]
    assert source.at == len(source.data)
    fields = {"row": d, "group": group, "gain": gain, "scales": scales, "is_transposed": bool(flags & 8)}
    return {"values": values, "shape": shape, **fields}


def float32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def weights(found, group_data):
    """The weights in the order of the latents, by sums of Python's floats."""
    d, matrix, *_ = groups(group_data)[found["group"]]
    values, scales = found["values"], found["scales"]
    outputs = found["shape"][-1 if found["is_transposed"] else 0]
    width, made = len(values) // outputs, []
    for i in range(len(values)):
        first, j = i - i % d, i % d
        total = 0.0
        for k in range(d):
            total += values[first + k] * matrix[k][j]
        total *= found["gain"]
        if scales is not None:
            total *= scales[i // width]
        made.append(float32(total + 0.0))
    return made
