"""Files made by hand against each check of the reader; their check sums are right."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import numpy as np
import pytest

from hf_compress.codec import CodecError, Latents, byte_report, decode, decode_latents, encode, read_groups
from hf_compress.codec.rans import encode_streams
from hf_compress.codec.tables import Table

ONE = np.ones((1, 1), np.float32)
NAN, INF = float("nan"), float("inf")


def sealed(*parts):
    body = b"".join(parts)
    return body + struct.pack("<I", zlib.crc32(body))


def num(value):
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def table(lo, *weights):
    return struct.pack("<h", lo) + num(len(weights)) + b"".join(map(num, weights)) * (len(weights) > 1)


def header(shape=(4, 2), codec=2, flags=2, group=0, d=1, gain=1.0):
    dims = struct.pack(f"<{len(shape)}I", *shape)
    return b"LNX1\1" + bytes([codec, len(shape), flags]) + dims + struct.pack("<HHf", group, d, gain)


def group_file(*groups, count=None):
    return sealed(b"LNXG\1", struct.pack("<H", len(groups) if count is None else count), *groups)


def group(matrix=ONE, flags=0, *tables):
    return struct.pack("<H", len(matrix)) + matrix.astype("<f4").tobytes() + bytes([flags]) + b"".join(tables)


def words_of(values, *weights, lo=0):
    """The words of one chunk."""
    (words,) = encode_streams([np.array(values, np.int8)], [Table(lo, np.array(weights, np.int64))])
    return words.tolist()


def packed(words):
    return struct.pack(f"<{len(words)}I", *words)


GROUPS = read_groups(group_file(group(), group(np.eye(2, dtype=np.float32))))
GOOD = [0, 1, 1, 0, 1, 1, 1, 0]
WORDS = words_of(GOOD, 3, 5)
FINE = sealed(header(), table(0, 3, 5), num(len(WORDS)), packed(WORDS))


def test_the_files_of_this_page_are_read_when_nothing_is_wrong():
    """So that each refusal below has but one reason."""
    assert decode_latents(FINE, GROUPS, (4, 2)).values.reshape(-1).tolist() == GOOD
    flags, value = words_of([1, 0, 0, 1], 1, 1), [7, 7, 0, 0, 0, 0, 7, 7]
    blob = sealed(
        header(flags=3, group=1, d=2), num(2), table(0, 1, 1), table(7, 1), table(7, 1), num(1), packed(flags)
    )
    assert decode_latents(blob, GROUPS, (4, 2)).values.reshape(-1).tolist() == value


def spoiled(form, *places):
    """A good file with some bytes replaced."""
    data = bytearray(FINE[:-4])
    for at, values in places:
        data[at : at + len(values)] = values
    return form(bytes(data))


BODY = [table(0, 3, 5), num(len(WORDS)), packed(WORDS)]
BAD_TENSORS = {
    "magic": (spoiled(sealed, (0, b"LNXG")), "start with b'LNXG'"),
    "version": (spoiled(sealed, (4, b"\2")), r"version \[2\], known is 1"),
    "too short": (b"LNX1\1abc", "8 bytes are cut off"),
    "empty": (b"", "start with b''"),
    "check sum": (FINE[:-1] + bytes([FINE[-1] ^ 1]), "check sum"),
    "codec": (sealed(header(codec=3), *BODY), "codec is 3"),
    "unknown flag": (sealed(header(flags=2 | 16), *BODY), "flags are 18"),
    "flags without streams": (sealed(header(codec=1, flags=2), b"\0\0"), "flags are 2, known with codec 1"),
    "no dimension": (sealed(header(shape=()), *BODY), "0 dimensions"),
    "six dimensions": (sealed(header(shape=(1,) * 6), *BODY), "6 dimensions"),
    "other shape": (sealed(header(shape=(2, 4)), *BODY), r"of shape \(2, 4\), the model has \(4, 2\)"),
    "dimension of 0": (sealed(header(shape=(4, 0)), *BODY), r"of shape \(4, 0\)"),
    "huge shape": (sealed(header(shape=(2**32 - 1,) * 2), *BODY), r"of shape \(4294967295, 4294967295\)"),
    "no such group": (sealed(header(group=2), *BODY), "of group 2, there are 2"),
    "slice of another group": (sealed(header(group=1), *BODY), r"slices of 1 .* those of the group \(2\)"),
    "gain not a number": (sealed(header(gain=NAN), *BODY), "gain is not finite"),
    "gain infinite": (sealed(header(gain=-INF), *BODY), "gain is not finite"),
    "type of scales": (sealed(header(flags=6), b"\3", *BODY), "type of the scales is 3"),
    "too few scales": (sealed(header(flags=6), b"\2" + bytes(15)), "16 bytes are needed and 15 are left"),
    "infinite scale": (
        sealed(header(flags=6), b"\1", struct.pack("<4H", 0, 0, 0x7F80, 0), *BODY),
        "scale is not finite",
    ),
    "raw width": (sealed(header(codec=0, flags=0), b"\3", bytes(24)), "3 bytes, allowed are 1 and 2"),
    "raw too short": (sealed(header(codec=0, flags=0), b"\1", bytes(7)), "8 bytes are needed and 7 are left"),
    "raw too long": (sealed(header(codec=0, flags=0), b"\1", bytes(9)), "1 bytes follow the end"),
    "constant cut": (sealed(header(codec=1, flags=0), b"\1"), "2 bytes are needed and 1 are left"),
    "constant too long": (sealed(header(codec=1, flags=0), b"\1\0\0"), "1 bytes follow the end"),
    "no shared tables": (sealed(header(flags=0), *BODY[1:]), "tables of group 0, which has none"),
    "table of 0 symbols": (sealed(header(), table(0), *BODY[1:]), "table has 0 symbols"),
    "table of 4097": (sealed(header(), b"\0\0" + num(4_097) + b"\1" * 5_000), "4097 or more, allowed are 0 to 4096"),
    "table longer than the file": (sealed(header(), b"\0\0" + num(4_000) + b"\1" * 50), "4000 symbols, and 50 bytes"),
    "table beyond int16": (sealed(header(), table(32_767, 3, 5), *BODY[1:]), "2 symbols from 32767 on"),
    "weight too large": (sealed(header(), table(0, 3, 65_536), *BODY[1:]), "weight of a table is 65536 or more"),
    "weights of 0": (sealed(header(), table(0, 0, 0), *BODY[1:]), "all 0"),
    "number written longer": (sealed(header(), b"\0\0\2\x83\0\5", *BODY[1:]), "written longer than it is"),
    "number without end": (sealed(header(), b"\0\0" + b"\x80" * 40), "number of symbols of a table"),
    "words of a chunk": (
        sealed(header(), BODY[0], num(7), bytes(28)),
        "words of a chunk is 7 or more, allowed are 0 to 6",
    ),
    "words missing": (sealed(header(), BODY[0], num(2), bytes(4)), "chunks have 8 bytes of words, 4 are left"),
    "words left": (sealed(header(), *BODY, bytes(4)), r"chunks have \d+ bytes of words, \d+ are left"),
    "word of zeros at the end": (sealed(header(), BODY[0], num(2), packed([*WORDS[:1], 0])), "word of zeros"),
    "too many words": (sealed(header(), BODY[0], num(3), packed([5, 6, 7])), "words left over, or too few"),
    "no words": (sealed(header(shape=(4, 2)), table(0, 3, 5), num(0)), None),  # legal: all are the first symbol
    "another symbol's words": (sealed(header(), table(0, 9, 5), *BODY[1:]), "words left over, or too few"),
    "no chunks": (sealed(header(), BODY[0]), "8 symbols have 1 chunks, 0 bytes are left"),
}
FLAGGED = {"flags": 3, "group": 1, "d": 2}
FLAG_WORDS = packed(words_of([1, 0, 0, 1], 1, 1))
BAD_FLAGS = {
    "more filled slices than slices": ([num(5)], "filled slices is 5 or more, allowed are 0 to 4"),
    "fewer flags than slices": (
        [num(3), table(0, 1, 1), table(7, 1), table(7, 1), num(1), FLAG_WORDS],
        "2 slices have",
    ),
    "more flags than slices": ([num(1), table(0, 1, 1), table(7, 1), table(7, 1), num(1), FLAG_WORDS], "2 slices have"),
    "flags of other values": (
        [num(2), table(0, 1, 1, 1), table(7, 1), table(7, 1), num(1), FLAG_WORDS],
        "goes from 0 to 2",
    ),
    "negative flags": ([num(2), table(-1, 1, 1), table(7, 1), table(7, 1), num(1), FLAG_WORDS], "goes from -1 to 0"),
    "constant flags": ([num(2), table(1, 1), table(7, 1), table(7, 1)], "4 slices have flags, the file says 2"),
}
BAD_TENSORS |= {what: (sealed(header(**FLAGGED), *parts), match) for what, (parts, match) in BAD_FLAGS.items()}
BAD_TENSORS["transposed vector"] = (sealed(header(shape=(4, 2, 1), flags=10), *BODY), "only matrices are transposed")


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_a_spoiled_tensor_is_refused(what):
    blob, match = BAD_TENSORS[what]
    shape = (4, 2, 1) if "vector" in what else (4, 2)
    if match is None:
        assert not decode_latents(blob, GROUPS, shape).values.any()
        return
    with pytest.raises(CodecError, match=match):
        decode_latents(blob, GROUPS, shape)


BAD_GROUPS = {
    "magic": (FINE, "start with b'LNX1'"),
    "version": (sealed(b"LNXG\2\0\0"), r"version \[2\]"),
    "cut": (sealed(b"LNXG\1\0"), "2 bytes are needed and 1 are left"),
    "fewer groups": (group_file(group(), count=2), "the slice of group 1"),
    "more groups": (group_file(group(), count=0), "7 bytes follow the end"),
    "slice of 0": (group_file(struct.pack("<HB", 0, 0)), "slices of 0 values"),
    "huge slice": (group_file(struct.pack("<HB", 65_535, 0)), "17179344900 bytes are needed"),
    "decoder not a number": (group_file(group(ONE * NAN)), "decoder of group 0 is not finite"),
    "decoder infinite": (group_file(group(), group(ONE * INF)), "decoder of group 1 is not finite"),
    "unknown flags": (group_file(group(ONE, 4)), "flags 4, known are 0, 2 and 3"),
    "kind of no tables": (group_file(group(ONE, 1)), "flags 1"),
    "tables missing": (group_file(group(ONE, 3, table(0, 1, 1))), "smallest symbol of a table"),
    "flags of other values": (group_file(group(ONE, 3, table(1, 1, 1), table(0, 1))), "goes from 1 to 2"),
    "weights of 0": (group_file(group(ONE, 2, table(0, 0, 0))), "all 0"),
}


@pytest.mark.parametrize("what", BAD_GROUPS)
def test_spoiled_groups_are_refused(what):
    data, match = BAD_GROUPS[what]
    with pytest.raises(CodecError, match=match):
        read_groups(data)


def test_tables_of_a_group_serve_streams_of_their_kind_alone():
    plain = read_groups(group_file(group(ONE, 2, table(0, 3, 5))))
    blob = sealed(header(flags=0), *BODY[1:])
    assert decode_latents(blob, plain, (4, 2)).values.reshape(-1).tolist() == GOOD
    with pytest.raises(CodecError, match="none for its streams"):
        decode_latents(sealed(header(flags=1), num(8), *BODY[1:]), plain, (4, 2))
    flagged = read_groups(group_file(group(ONE, 3, table(1, 1), table(0, 3, 5))))
    with pytest.raises(CodecError, match="none for its streams"):
        decode_latents(blob, flagged, (4, 2))


def test_slices_must_divide_the_tensor():
    three = read_groups(group_file(group(np.eye(3, dtype=np.float32))))
    with pytest.raises(CodecError, match="slices of 3 values do not divide 8"):
        decode_latents(sealed(header(d=3), *BODY), three, (4, 2))


def test_weights_that_overflow_are_an_error_of_ours():
    groups = read_groups(group_file(group(ONE * 3e38)))
    with pytest.raises(CodecError, match="does not fit float32"):
        decode(sealed(header(codec=1, flags=0, gain=3e38), b"\1\0"), groups, (4, 2))


HUGE = (2**32 - 1, 2**32 - 1)
BOMBS = {
    "constant": sealed(header(HUGE, codec=1, flags=0), b"\1\0"),
    "raw": sealed(header(HUGE, codec=0, flags=0), b"\1", bytes(60)),
    "coded": sealed(header(HUGE), *BODY),
    "tables of one symbol": sealed(header(HUGE), table(7, 1)),
    "scales": sealed(header(HUGE, flags=6), b"\2", bytes(60)),
    "flags": sealed(
        header((2**32 - 2, 1), group=1, d=2, flags=3), num(2**31 - 1), table(1, 1), table(7, 1), table(7, 1)
    ),
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_hundred_bytes_cannot_ask_for_memory(what):
    """Where the model does not have the shape, and for a report, which knows no shape."""
    assert len(BOMBS[what]) < 120
    groups_file = group_file(group(), group(np.eye(2, dtype=np.float32)))
    read_groups(groups_file)
    tracemalloc.start()
    try:
        for shape in ((4, 2), (2**20, 2**20)):
            with pytest.raises(CodecError, match="of shape"):
                decode_latents(BOMBS[what], GROUPS, shape)
        if what in ("raw", "coded", "scales"):
            with pytest.raises(CodecError, match=r"(left|needed)"):
                byte_report({"w": BOMBS[what]}, groups_file)
        else:
            report = byte_report({"w": BOMBS[what]}, groups_file)
            assert sum(report.values()) == len(BOMBS[what]) + len(groups_file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200_000


@pytest.mark.parametrize(("row", "flags"), [(1, False), (9, True)])
@pytest.mark.parametrize("largest", [3, 300])
def test_decoding_takes_at_most_twice_the_weight(row, flags, largest):
    """The weight itself (float32) included; int16 latents are the most that is held beside it."""
    values = np.random.default_rng(0).integers(-largest, largest + 1, (90_000, 9)).astype(np.int16)
    values[np.random.default_rng(1).random(90_000) < (0.5 if flags else 0)] = 0
    blobs, data = encode({"w": Latents(values, row)}, [np.eye(row, dtype=np.float32)])
    groups = read_groups(data)
    decode(blobs["w"], groups, values.shape)
    tracemalloc.start()
    try:
        decode(blobs["w"], groups, values.shape)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * 4 * values.size
