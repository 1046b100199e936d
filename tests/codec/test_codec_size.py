"""The smallest form is chosen, and it is close to what entropy allows."""

from __future__ import annotations

import numpy as np
import pytest

from hf_compress.codec import Latents, byte_report, decode_latents, encode, entropy_bits, read_groups
from tests.codec.cases import laplace, same

OWN, FLAGS = 2, 1
HEADER = {ndim: 4 + 4 + 4 * ndim + 8 for ndim in (1, 2, 3)}


def eye(row):
    return [np.eye(row, dtype=np.float32)]


def coded(values, row=1, **fields):
    """Blob, and report of a tensor alone in its group."""
    tensor = Latents(values, row, **fields)
    blobs, data = encode({"w": tensor}, eye(row))
    assert same(decode_latents(blobs["w"], read_groups(data), tensor.shape), tensor)
    return blobs["w"], byte_report(blobs, data)


@pytest.mark.parametrize("row", [1, 8, 9])
@pytest.mark.parametrize("zero_slices", [0, 0.5, 0.95])
@pytest.mark.parametrize("scale", [0.2, 1.5, 20])
def test_the_payload_is_near_the_entropy(row, zero_slices, scale):
    values = laplace(72_000, row, zero_slices, scale)
    _, report = coded(values, row)
    entropy = entropy_bits(Latents(values, row)) / 8
    assert report["payload"] <= 1.005 * entropy + 12
    assert report["checks"] <= 8 + 2 * 3  # sums of both files, sizes of two chunks
    assert report["tables"] <= (row + 1) * 400


def test_entropy_is_that_of_the_channels():
    assert entropy_bits(Latents(np.array([0, 5, 0, 6, 0, 5, 0, 6]), 2)) == pytest.approx(4)
    assert entropy_bits(Latents(np.array([0, 5, 0, 6, 0, 5, 0, 6]), 1)) == pytest.approx(8 * 1.5)
    assert entropy_bits(Latents(np.array([[7]]))) == 0


def test_flags_save_a_fifth_where_three_quarters_of_the_slices_are_zeros():
    values = laplace(450_000, 9, 0.75)
    blob, report = coded(values, 9)
    assert blob[5] == 2
    assert blob[7] == OWN | FLAGS
    assert report["payload"] + report["tables"] <= 0.8 * entropy_bits(Latents(values, 9)) / 8


def test_no_flags_where_they_do_not_pay():
    values = laplace(45_000, 9)
    values[0] = 0
    assert coded(values, 9)[0][7] == OWN
    sparse = laplace(45_000, 1, 0.9)
    assert coded(sparse, 1)[0][7] == OWN


def shares(blobs):
    return [blob[5] == 2 and not blob[7] & OWN for blob in blobs.values()]


def test_equal_small_tensors_share_tables():
    parts = laplace(40 * 900, 9).reshape(40, 100, 9)
    tensors = {str(i): Latents(part, 9) for i, part in enumerate(parts)}
    blobs, data = encode(tensors, eye(9))
    assert all(shares(blobs))
    alone = sum(len(encode({name: t}, eye(9))[0][name]) for name, t in tensors.items())
    together = sum(map(len, blobs.values())) + len(data)
    assert together < 0.8 * alone


def test_a_tensor_unlike_the_others_keeps_its_own_tables():
    parts = laplace(40 * 900, 9).reshape(40, 100, 9)
    tensors = {str(i): Latents(part, 9) for i, part in enumerate(parts)}
    without = encode(tensors, eye(9))
    tensors["other"] = Latents(laplace(45_000, 9, 0, 20, seed=3), 9)
    blobs, data = encode(tensors, eye(9))
    assert blobs["other"][7] == OWN
    assert {name: blob for name, blob in blobs.items() if name != "other"} == without[0]
    assert data == without[1]


def test_large_tensors_unlike_each_other_share_nothing():
    tensors = {str(s): Latents(laplace(50_000, 1, 0, s)) for s in (0.5, 2, 10)}
    blobs, data = encode(tensors, eye(1))
    assert not any(shares(blobs))
    assert read_groups(data).tables == (None,)


@pytest.mark.parametrize("zero_slices", [0, 0.8])
def test_a_group_shares_tables_for_the_streams_that_are_smaller(zero_slices):
    parts = laplace(40 * 900, 9, zero_slices).reshape(40, 100, 9)
    tensors = {str(i): Latents(part, 9) for i, part in enumerate(parts)}
    tensors["full"] = Latents(np.ones((100, 9), int) + (np.arange(900).reshape(100, 9) % 5 == 0), 9)
    blobs, data = encode(tensors, eye(9))
    groups = read_groups(data)
    assert groups.tables[0][0] == (zero_slices == 0.8)
    assert sum(shares(blobs)) >= 40
    assert all(same(decode_latents(blobs[n], groups, t.shape), t) for n, t in tensors.items())


def test_tensors_without_zero_slices_use_tables_with_flags():
    parts = laplace(40 * 900, 9, 0.8).reshape(40, 100, 9)
    tensors = {str(i): Latents(part, 9) for i, part in enumerate(parts)}
    full = laplace(1_000, 10, seed=1)[:, :9]
    tensors["full"] = Latents(full[full.any(1)][:40], 9)
    blobs, data = encode(tensors, eye(9))
    groups = read_groups(data)
    assert groups.tables[0][0]
    assert blobs["full"][7] == FLAGS
    assert all(same(decode_latents(blobs[n], groups, t.shape), t) for n, t in tensors.items())


@pytest.mark.parametrize(("low", "width"), [(-128, 1), (-2_000, 2)])
def test_noise_is_kept_as_it_is(low, width):
    values = np.random.default_rng(0).integers(low, -low, (50, 20))
    blob, report = coded(values)
    assert blob[5] == 0
    assert len(blob) == HEADER[2] + 1 + 1_000 * width + 4
    assert report["payload"] == 1_000 * width


def test_a_range_that_no_table_covers_is_kept_as_it_is():
    values = np.zeros(10_000, np.int16)
    values[[3, 4]] = -2_048, 2_047
    assert coded(values)[0][5] == 2
    values[4] = 2_048
    blob, report = coded(values)
    assert blob[5] == 0
    assert report["payload"] == 20_000


@pytest.mark.parametrize("value", [0, -3, 32_767])
def test_a_constant_tensor_takes_two_bytes(value):
    blob, report = coded(np.full((64, 32, 8), value), 8)
    assert len(blob) == HEADER[3] + 2 + 4
    assert report["payload"] == 2


def test_channels_of_one_symbol_take_no_words():
    values = laplace(8_000, 8)
    values[:, 3:] = 5
    _, report = coded(values, 8)
    three = coded(np.ascontiguousarray(values[:, :3]), 3)[1]
    assert report["payload"] == three["payload"]


def test_small_tensors_take_little_beside_their_payload():
    values = laplace(432, 9).reshape(16, 3, 9)
    blob, report = coded(values, 9)
    assert report["headers"] - 13 <= HEADER[3]  # 13: of the groups
    assert report["checks"] == 8 + 1
    assert len(blob) < 432


@pytest.mark.parametrize(
    ("scales", "size"),
    [
        (np.array([1, 0.5, -0.0, 65_504, 2**-24], np.float32), 2),  # float16
        (np.array([1, 0.5, 2.0**100, 2.0**-130, -3], np.float32), 2),  # bfloat16
        (np.array([1, 0.5, 1e-3, 2.0**100, 1], np.float32), 4),
        (np.array([1, 1 + 2**-10, 65_520, 1, 1], np.float32), 4),  # the third one is above float16
    ],
)
def test_scales_take_the_smallest_type_that_holds_all(scales, size):
    values = np.ones((5, 1), np.int8)
    blob, report = coded(values, scales=scales)
    assert report["scales"] == 1 + 5 * size
    assert len(blob) == HEADER[2] + 1 + 5 * size + 2 + 4


def test_scales_are_those_of_the_outputs():
    transposed = coded(np.ones((5, 2), np.int8), scales=np.ones(5, np.float32), is_transposed=True)[1]
    assert transposed["scales"] == 11
