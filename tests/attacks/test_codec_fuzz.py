"""Damaged and invented files: an error of ours, or a tensor of the right shape; never a hang, never much memory."""

from __future__ import annotations

import random
import time
import tracemalloc
import zlib

import numpy as np
import pytest

from hf_compress.codec import CodecError, Latents, byte_report, decode_latents, encode, read_groups
from tests.codec.cases import decoders, laplace

COUNT = 12_000  # of each kind


def model():
    """Small tensors of every codec; together they share tables."""
    rng = np.random.default_rng(0)
    parts = laplace(12 * 270, 9, 0.7).reshape(12, 30, 9)
    tensors = {f"shared{i}": Latents(part, 9, 3) for i, part in enumerate(parts)}
    tensors["own"] = Latents(laplace(600, 1, 0, 3).reshape(20, 30), 1, 0, 0.5, rng.random(20, np.float32), True)
    tensors["flags"] = Latents(laplace(1_800, 3, 0.8), 3, 2)
    tensors["raw"] = Latents(rng.integers(-3_000, 3_000, (20, 2)), 2, 1)
    tensors["constant"] = Latents(np.full((3, 3), 2))
    return tensors, *encode(tensors, decoders())


TENSORS, BLOBS, GROUPS_BYTES = model()
GROUPS = read_groups(GROUPS_BYTES)
SMALL = ["shared0", "own", "flags", "raw", "constant"]


def mutated(data, source):
    """A few bytes changed, cut, doubled, moved, or replaced by extreme ones."""
    data = bytearray(data)
    for _ in range(source.choice([1, 1, 1, 2, 4])):
        at = source.randrange(len(data))
        kind = source.randrange(7)
        if kind == 0:
            data[at] ^= 1 << source.randrange(8)
        elif kind == 1:
            data[at] = source.choice([0, 1, 2, 127, 128, 255])
        elif kind == 2:
            del data[at : at + source.choice([1, 4, 50])]
        elif kind == 3:
            data[at:at] = source.randbytes(source.choice([1, 4]))
        elif kind == 4:
            data[at : at + 4] = source.choice([b"\xff" * 4, b"\0" * 4, b"\0\0\0\x80"])
        elif kind == 5:
            data[at:at] = data[at : at + source.choice([1, 4, 50])]
        else:
            data[at] = source.randrange(256)
        data = data or bytearray(1)
    return bytes(data)


def sealed(data):
    """With the check sum that an attacker would write."""
    return data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, "little")


def outcome(call, *arguments):
    """Whether a call came to an end with a result; any error but ours is raised."""
    try:
        return call(*arguments)
    except CodecError:
        return None


def test_the_files_are_small_and_of_every_kind():
    assert max(len(BLOBS[name]) for name in SMALL) < 900
    assert {BLOBS[name][5] for name in SMALL} == {0, 1, 2}
    assert not BLOBS["shared0"][7] & 2
    assert GROUPS.tables[3] is not None


@pytest.mark.parametrize("name", SMALL)
def test_every_changed_bit_and_every_cut_is_noticed(name):
    blob, shape = BLOBS[name], TENSORS[name].shape
    for i in range(8 * len(blob)):
        changed = bytearray(blob)
        changed[i // 8] ^= 1 << i % 8
        assert outcome(decode_latents, bytes(changed), GROUPS, shape) is None
    for i in range(len(blob)):
        assert outcome(decode_latents, blob[:i], GROUPS, shape) is None
    assert outcome(decode_latents, blob + b"\0", GROUPS, shape) is None


def test_tensors_with_right_check_sums_decode_to_something_or_fail_cleanly():
    source, start, decoded = random.Random(1), time.monotonic(), 0
    for _ in range(COUNT):
        name = source.choice(SMALL)
        blob, shape = sealed(mutated(BLOBS[name], source)), TENSORS[name].shape
        outcome(byte_report, {"w": blob}, GROUPS_BYTES) if source.random() < 0.1 else None
        latents = outcome(decode_latents, blob, GROUPS, shape)
        if latents is not None:
            assert latents.shape == shape
            assert latents.values.dtype in (np.int8, np.int16)
            assert latents.scales is None or np.isfinite(latents.scales).all()
            decoded += 1
    assert COUNT / 100 < decoded < COUNT / 2  # words, gains and scales may change unseen; much else may not
    assert time.monotonic() - start < 60


def test_groups_with_right_check_sums_are_read_or_fail_cleanly():
    source, start, read = random.Random(2), time.monotonic(), 0
    for _ in range(COUNT):
        groups = outcome(read_groups, sealed(mutated(GROUPS_BYTES, source)))
        if groups is not None:
            read += 1
            assert all(np.isfinite(matrix).all() for matrix in groups.decoders)
            outcome(decode_latents, BLOBS["shared0"], groups, TENSORS["shared0"].shape)
    assert read > COUNT / 100
    assert time.monotonic() - start < 60


def test_bytes_from_nowhere_are_refused():
    source = random.Random(3)
    for _ in range(2_000):
        junk = source.randbytes(source.randrange(300))
        assert outcome(decode_latents, junk, GROUPS, (3, 3)) is None
        assert outcome(decode_latents, sealed(b"LNX1\1" + junk + b"1234"), GROUPS, (3, 3)) is None
        assert outcome(read_groups, sealed(b"LNXG\1" + junk + b"1234")) is None


def test_memory_is_bounded_by_the_shape_of_the_model():
    """Mutated small files, asked for as what they are: nothing in them may make an array large."""
    source = random.Random(4)
    files = [(name, sealed(mutated(BLOBS[name], source))) for name in SMALL for _ in range(300)]
    groups = [sealed(mutated(GROUPS_BYTES, source)) for _ in range(300)]
    decode_latents(BLOBS["own"], GROUPS, TENSORS["own"].shape)
    tracemalloc.start()
    try:
        for name, blob in files:
            outcome(decode_latents, blob, GROUPS, TENSORS[name].shape)
            outcome(byte_report, {"w": blob}, GROUPS_BYTES)
        for data in groups:
            outcome(read_groups, data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000
