"""What goes in comes out, as the package decodes it and as a decoder of whole numbers does."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compress.codec import Latents, byte_report, decode, decode_latents, encode, read_groups, weights_of
from tests.codec import oracle
from tests.codec.cases import decoders, laplace, latents, same

MATRICES = decoders()
models = st.dictionaries(st.text(max_size=3), latents(), max_size=4)


@given(models)
def test_every_tensor_comes_back(tensors):
    blobs, data = encode(tensors, MATRICES)
    groups = read_groups(data)
    assert blobs.keys() == tensors.keys()
    assert all(np.array_equal(a, b) for a, b in zip(groups.decoders, MATRICES, strict=True))
    for name, given_ in tensors.items():
        found = decode_latents(blobs[name], groups, given_.shape)
        assert same(found, given_)
        is_small = given_.values.min() >= -128 and given_.values.max() <= 127
        assert found.values.dtype == (np.int8 if is_small else np.int16)
        assert found.values.flags.c_contiguous
        assert found.values.flags.writeable


@settings(max_examples=100)
@given(models)
def test_whole_numbers_alone_decode_the_same(tensors):
    blobs, data = encode(tensors, MATRICES)
    groups = read_groups(data)
    for name, given_ in tensors.items():
        found = oracle.latents(blobs[name], data)
        assert found["values"] == given_.values.reshape(-1).tolist()
        assert found["shape"] == given_.shape
        weights = decode(blobs[name], groups, given_.shape)
        assert weights.dtype == np.float32
        assert weights.shape == given_.shape
        assert weights.flags.c_contiguous
        in_order = weights.T if given_.is_transposed else weights
        expected = np.array(oracle.weights(found, data), np.float32)
        assert np.array_equal(in_order.reshape(-1).view(np.uint32), expected.view(np.uint32))


@given(models)
def test_the_report_counts_every_byte_once(tensors):
    blobs, data = encode(tensors, MATRICES)
    report = byte_report(blobs, data)
    assert report.keys() == {"payload", "headers", "tables", "checks", "decoders", "scales"}
    assert sum(report.values()) == len(data) + sum(map(len, blobs.values()))
    assert min(report.values()) >= 0
    assert report["decoders"] == sum(m.nbytes for m in MATRICES)


@settings(max_examples=50)
@given(models, st.randoms())
def test_the_order_of_the_tensors_changes_no_byte(tensors, random):
    blobs, data = encode(tensors, MATRICES)
    order = list(tensors)
    random.shuffle(order)
    again, data_again = encode({name: tensors[name] for name in order}, MATRICES)
    assert (again, data_again) == (blobs, data)


@pytest.mark.parametrize("n", [65_535, 65_536, 65_537, 131_072, 131_073])
@pytest.mark.parametrize("row", [1, 3])
@pytest.mark.parametrize("zero_slices", [0, 0.75])
def test_chunks_end_where_they_should(n, row, zero_slices):
    values = laplace(n * row, row, zero_slices)
    blobs, data = encode({"w": Latents(values, row)}, [np.eye(row, dtype=np.float32)])
    found = decode_latents(blobs["w"], read_groups(data), values.shape)
    assert np.array_equal(found.values, values)
    assert found.values.dtype == np.int8


def test_whole_numbers_alone_decode_several_chunks():
    values = laplace(65_537, 1)
    blobs, data = encode({"w": Latents(values)}, [np.eye(1, dtype=np.float32)])
    assert oracle.latents(blobs["w"], data)["values"] == values.reshape(-1).tolist()


@pytest.mark.parametrize("n", [131_071, 131_072, 131_073, 2 * 524_288 + 3])
@pytest.mark.parametrize("dtype", [np.int8, np.int16])
def test_counts_of_long_tensors(n, dtype):
    from hf_compress.codec.counting import count

    columns = np.random.default_rng(0).integers(-128, 128, (2, n)).astype(dtype)
    if dtype == np.int16:
        columns[1] *= 10
    counts = count(columns)
    for column, channel in zip(columns, counts.channels, strict=True):
        values, times = np.unique(column, return_counts=True)
        assert channel[values.astype(int) - counts.lo].tolist() == times.tolist()
        assert channel.sum() == n


def test_small_and_wide_tensors_share_tables():
    """Tables of a group may reach further than the smaller type of a tensor."""
    rng = np.random.default_rng(0)
    wide = np.rint(rng.laplace(0, 25, 20_000)).astype(np.int16)
    tensors = {f"wide{i}": Latents(part) for i, part in enumerate(wide.reshape(20, -1))}
    small = wide[abs(wide) < 100][:400].astype(np.int8)
    tensors |= {f"small{i}": Latents(part) for i, part in enumerate(small.reshape(4, -1))}
    blobs, data = encode(tensors, [np.eye(1, dtype=np.float32)])
    groups = read_groups(data)
    assert groups.tables[0][1][0].lo < -128
    assert all(blob[5] == 2 and not blob[7] & 2 for blob in blobs.values())
    assert all(same(decode_latents(blobs[n], groups, t.shape), t) for n, t in tensors.items())


def test_bytes_may_come_as_views_and_arrays():
    tensor = Latents(laplace(900, 9, 0.5), 9)
    blobs, data = encode({"w": tensor}, [np.eye(9, dtype=np.float32)])
    longer = b"xyz" + blobs["w"]
    for form in (
        memoryview(longer)[3:],
        np.frombuffer(longer, np.uint8)[3:],
        np.repeat(np.frombuffer(blobs["w"], np.uint8), 2)[::2],
    ):
        assert same(decode_latents(form, read_groups(np.frombuffer(data, np.uint8)), tensor.shape), tensor)
    for form in (bytearray(blobs["w"]), blobs["w"].hex(), np.frombuffer(blobs["w"], np.int8)):
        with pytest.raises(TypeError, match="coded bytes are"):
            decode_latents(form, read_groups(data), tensor.shape)


def test_what_is_no_latent_is_refused():
    values = np.zeros((4, 3), np.int8)
    wrong = [
        ({"values": values.astype(np.float32)}, "integers"),
        ({"values": values[:0]}, "not empty"),
        ({"values": values.reshape(1, 1, 1, 1, 4, 3)}, "1 to 5 dimensions"),
        ({"values": values, "row": 5}, "divides 12 values, got 5"),
        ({"values": values, "row": 0}, "got 0"),
        ({"values": values, "group": -1}, "group"),
        ({"values": values, "gain": math.nan}, "gain"),
        ({"values": values, "gain": 1e39}, "gain"),
        ({"values": values[0], "is_transposed": True}, "matrices"),
        ({"values": values, "scales": np.ones(3, np.float32)}, "scales are float32"),
        ({"values": values, "scales": np.ones(4)}, "scales are float32"),
        ({"values": values, "scales": np.full(4, np.inf, np.float32)}, "finite"),
    ]
    for fields, match in wrong:
        with pytest.raises(ValueError, match=match):
            Latents(**fields)


def test_what_cannot_be_written_is_refused():
    one = np.ones((1, 1), np.float32)
    wrong = [
        (Latents(np.array([32_768])), [one], "32768, allowed are -32768 to 32767"),
        (Latents(np.array([1]), group=1), [one], "group 1"),
        (Latents(np.array([1, 2]), row=2), [one], "slices of 2"),
        (Latents(np.array([1])), [one * np.nan], "finite"),
        (Latents(np.array([1])), [one.astype(np.float64)], "float32"),
        (Latents(np.array([1])), [np.ones((1, 2), np.float32)], "group 0"),
    ]
    for tensor, matrices, match in wrong:
        with pytest.raises(ValueError, match=match):
            encode({"w": tensor}, matrices)
    with pytest.raises(ValueError, match="need a float32 decoder"):
        weights_of(Latents(np.array([1])), np.ones((2, 2), np.float32))
