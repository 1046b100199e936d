"""Laws of rounding to a grid of a few bits, alone and behind another pattern."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_compress as hfc
from hf_compress.patterns import Chain, Quantized
from hf_compress.patterns.quantized import quantize
from hf_compress.targets import Target

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
small = settings(max_examples=100)


@st.composite
def targets(draw, dtypes=DTYPES, bound=60000.0):
    """A weight of a Linear, a convolution or a Hugging Face Conv1D; zeros, tiny and huge values are likely."""
    kind, shape = draw(
        st.sampled_from([("linear", (3, 5)), ("linear", (1, 1)), ("conv", (2, 2, 1, 3)), ("conv1d", (5, 3))])
    )
    number = st.one_of(
        st.just(0.0),
        st.floats(-1, 1, width=16),
        st.floats(-(2.0**-10), 2.0**-10, width=32),
        st.floats(-bound, bound, width=32),
    )
    size = math.prod(shape)
    values = draw(st.lists(number, min_size=size, max_size=size))
    weight = torch.tensor(values).reshape(shape).to(draw(st.sampled_from(dtypes)))
    return Target(weight, 0 if kind == "conv1d" else 1, kind)


def channels(target, tensor=None):
    """Rows are output channels."""
    tensor = target.parameter if tensor is None else tensor
    return tensor.T if target.kind == "conv1d" else tensor.flatten(1)


def projected(target, pattern):
    pattern = hfc.parse_pattern(pattern)
    copy = Target(target.parameter.clone(), target.reduction_dim, target.kind)
    pattern.project_({"w": copy})
    return copy


bits = st.integers(2, 8)


@small
@given(targets(), bits)
def test_rounding_twice_changes_nothing(target, bits):
    once = projected(target, Quantized(bits))
    twice = projected(once, Quantized(bits))
    assert torch.equal(once.parameter, twice.parameter)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_peak_gives_a_grid_that_stays(dtype, bits):
    """All positive numbers but the largest, one for each channel, with every value of the grid beside it."""
    largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(torch.int16).item()
    peaks = torch.arange(1, largest, dtype=torch.int16).view(dtype)
    q = 2 ** (bits - 1) - 1
    rows = peaks.float()[:, None] * (torch.arange(-q, q + 1) / q)
    target = Target(rows.to(dtype), 1, "linear")
    target.parameter[:, -1] = peaks
    codes, scales = quantize(target, bits)
    once = projected(target, Quantized(bits))
    again, same_scales = quantize(once, bits)
    assert torch.equal(codes, again)
    alive = codes.any(1)
    assert torch.equal(scales[alive], same_scales[alive])
    assert alive.float().mean() > 0.95
    assert torch.equal(scales.to(dtype).float(), scales)
    # Decoded in the weight's own type, as loaders do.
    assert torch.equal(codes.to(dtype) * scales.to(dtype), once.parameter)


@small
@given(targets(), bits)
def test_zeros_stay_zero_and_nothing_else_appears(target, bits):
    after = projected(target, Quantized(bits)).parameter
    assert (after[target.parameter == 0] == 0).all()
    assert after.isfinite().all()
    assert (after * target.parameter.sign() >= 0).all()


@small
@given(targets(), bits)
def test_a_channel_has_few_values_evenly_spaced(target, bits):
    codes, scales = quantize(target, bits)
    q = 2 ** (bits - 1) - 1
    assert torch.equal(codes, codes.round())
    assert codes.abs().max() <= q
    for row in channels(projected(target, Quantized(bits))):
        assert row.unique().numel() <= 2**bits - 1
    assert (scales > 0).all()
    assert scales.numel() == channels(target).shape[0]


@small
@given(targets(), bits)
def test_the_error_is_half_a_step_at_most(target, bits):
    codes, scales = (channels(target, t).double() for t in quantize(target, bits))
    assert ((codes * scales - channels(target).double()).abs() <= scales * (0.5 + 1e-5)).all()


@small
@given(targets(), bits)
def test_the_step_is_no_larger_than_needed(target, bits):
    """The law of the error alone would allow any fine grid to be cut off, and any coarse one."""
    codes, _ = quantize(target, bits)
    largest_code = channels(target, codes).abs().amax(1)
    peak = channels(target).float().abs().amax(1)
    assert (largest_code[peak > 1e-3] == 2 ** (bits - 1) - 1).all()


@small
@given(targets(dtypes=[torch.float32]), bits)
def test_the_formula_in_float32(target, bits):
    q = 2 ** (bits - 1) - 1
    expected = []
    for row in channels(target):
        scale = (row.abs().max() / q).clamp_min((q + 1) * 2.0**-149)
        expected.append((row / scale).round().clamp(-q, q) * scale)
    assert torch.equal(channels(projected(target, Quantized(bits))), torch.stack(expected))


@given(st.integers(0, 2), st.sampled_from(["linear", "conv1d"]))
def test_channels_have_their_own_scale(index, kind):
    generator = torch.Generator().manual_seed(index)
    rows = torch.randn(3, 8, generator=generator)
    target = Target(rows.T.contiguous() if kind == "conv1d" else rows, 0 if kind == "conv1d" else 1, kind)
    before = channels(projected(target, "int4")).clone()
    channels(target)[index] *= 64  # a power of two: exact
    before[index] *= 64
    assert torch.equal(channels(projected(target, "int4")), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_without_values(dtype):
    weight = torch.tensor([[0.0, 0.0], [3.0, 0.1]], dtype=dtype)
    codes, scales = quantize(Target(weight, 1, "linear"), 8)
    assert codes[0].tolist() == [0.0, 0.0]
    assert scales[0].item() == 1.0
    assert projected(Target(weight, 1, "linear"), "int8").parameter[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_peak_whose_scale_would_be_zero(dtype):
    """0 / 0 is NaN: a zero beside the smallest positive number stays one."""
    tiniest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    weight = torch.tensor([[tiniest, 0.0, -tiniest * 40]], dtype=dtype)
    assert weight[0, 0] > 0
    after = projected(Target(weight, 1, "linear"), "int8")
    assert after.parameter[0, 1] == 0
    assert after.parameter.isfinite().all()
    assert torch.equal(projected(after, "int8").parameter, after.parameter)


@given(bits)
def test_text_and_revision(bits):
    pattern = Quantized(bits)
    assert hfc.parse_pattern(str(pattern)) == pattern
    assert str(pattern) == pattern.revision == f"int{bits}"


@pytest.mark.parametrize("text", ["int1", "int9", "int", "int8.0", "int-8", "Int8", "int16"])
def test_wrong_texts(text):
    with pytest.raises(ValueError, match="allowed"):
        hfc.parse_pattern(text)


def test_there_are_no_masks():
    weights = {"w": torch.randn(2, 4)}
    before = weights["w"].clone()
    with pytest.raises(TypeError, match="int8 rounds values and has no masks"):
        Quantized(8).masks(weights)
    assert torch.equal(weights["w"], before)


@small
@given(targets(), st.sampled_from(["2:4", "unstructured:0.5", "unstructured:0.5:layer"]), bits)
def test_a_chain_is_one_after_the_other(target, first, bits):
    pruned = projected(target, first)
    both = projected(pruned, f"int{bits}")
    chained = projected(target, f"{first}+int{bits}")
    assert torch.equal(chained.parameter, both.parameter)
    assert (chained.parameter[pruned.parameter == 0] == 0).all()
    assert torch.equal(projected(chained, f"int{bits}").parameter, chained.parameter)


def test_the_order_of_a_chain_counts():
    """Rounding first makes ties, and of equal magnitudes the lower position goes."""
    target = Target(torch.tensor([[1.0, 0.011, 0.0105, 0.0]]), 1, "linear")
    assert projected(target, "2:4+int8").parameter.nonzero().tolist() == [[0, 0], [0, 1]]
    assert projected(projected(target, "int8"), "2:4").parameter.nonzero().tolist() == [[0, 0], [0, 2]]


@small
@given(st.integers(0, 2**31))
def test_two_of_four_stay_two_of_four(seed):
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
    after = projected(Target(weight, 1, "linear"), "2:4+int8").parameter
    assert ((after != 0).view(-1, 4).sum(1) <= 2).all()


def test_masks_of_a_chain_are_those_of_its_pruning():
    weights = {"a": torch.randn(4, 8), "b": torch.randn(4, 6)}
    before = {n: w.clone() for n, w in weights.items()}
    masks = hfc.parse_pattern("2:4+int8").masks(weights)
    assert all(torch.equal(weights[n], before[n]) for n in weights)
    for name, mask in hfc.NM(2, 4).masks(weights).items():
        assert torch.equal(masks[name], mask)


@pytest.mark.parametrize(
    ("text", "revision"),
    [
        ("2:4+int8", "nm-2of4_int8"),
        ("unstructured:0.5+int8", "unstructured-0.50_int8"),
        ("unstructured:0.955:layer+int4", "unstructured-0.955-layer_int4"),
        ("unstructured:0.5+2:4+int8", "unstructured-0.50_nm-2of4_int8"),
    ],
)
def test_chains_as_text(text, revision):
    pattern = hfc.parse_pattern(text)
    assert isinstance(pattern, Chain)
    assert str(pattern) == text
    assert pattern.revision == revision
    assert hfc.parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize("text", ["int8+2:4", "int8+int8", "2:4+", "+int8", "2:4+int9", "2:4+int8+2:4"])
def test_rounding_comes_last(text):
    with pytest.raises(ValueError, match="allowed"):
        hfc.parse_pattern(text)


def test_chains_need_two_parts_and_none_is_a_chain():
    with pytest.raises(ValueError, match="intB last"):
        Chain((hfc.NM(2, 4),))
    with pytest.raises(ValueError, match="intB last"):
        Chain((Chain((hfc.NM(2, 4), hfc.NM(4, 8))), Quantized(8)))


def test_what_a_chain_skips_is_what_all_its_parts_skip():
    odd = Target(torch.randn(4, 6), 1, "linear")
    assert hfc.NM(2, 4).skip_reason(odd)
    assert hfc.parse_pattern("2:4+int8").skip_reason(odd) is None
    assert hfc.parse_pattern("2:4+4:8").skip_reason(odd)
