"""Exact selection against a stable sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_compress import selection
from hf_compress.selection import keep_largest, kth_smallest_magnitude

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@st.composite
def tensors(draw):
    """A few tensors of one or mixed dtypes: empty, prime-sized, constant, tied, non-contiguous."""
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 13]), min_size=0, max_size=3))
        weight = torch.randn(shape, generator=generator)
        kind = draw(st.sampled_from(["plain", "tied", "constant", "transposed", "zeros"]))
        if kind == "tied":
            weight = (weight * 2).round()
        elif kind == "constant":
            weight = torch.full_like(weight, 0.5)
        elif kind == "zeros":
            weight = torch.zeros_like(weight)
        elif kind == "transposed" and weight.ndim >= 2:
            weight = weight.transpose(0, 1)
        found.append(weight.to(draw(st.sampled_from(DTYPES))))
    return found


def oracle(weights, num_pruned):
    """A stable sort of all magnitudes in float64: the first ones are pruned."""
    flat = torch.cat([w.double().abs().flatten() for w in weights])
    keep = torch.ones(flat.numel(), dtype=torch.bool)
    keep[flat.argsort(stable=True)[:num_pruned]] = False
    parts = keep.split([w.numel() for w in weights])
    return [part.view(w.shape) for part, w in zip(parts, weights, strict=True)]


@given(tensors(), st.floats(0, 1))
def test_masks_equal_a_stable_sort(weights, share):
    total = sum(w.numel() for w in weights)
    num_pruned = round(share * total)
    masks = keep_largest(weights, num_pruned)
    for mask, wanted in zip(masks, oracle(weights, num_pruned), strict=True):
        assert mask.dtype == torch.bool
        assert torch.equal(mask, wanted)


@given(tensors(), st.floats(0.01, 0.99))
def test_the_form_without_branches_gives_the_same_masks(weights, share):
    """The path of accelerators, which looks at no number, run on the CPU."""
    total = sum(w.numel() for w in weights)
    num_pruned = round(share * total)
    if not 0 < num_pruned < total:
        return
    masks = selection._select_on_accelerator(weights, num_pruned)
    assert all(torch.equal(m, o) for m, o in zip(masks, oracle(weights, num_pruned), strict=True))
    threshold = selection.kth_smallest(selection._all_magnitudes(weights), num_pruned)
    assert threshold == kth_smallest_magnitude(weights, num_pruned)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.9, 0.999])
def test_threshold_of_many_weights_is_the_sorted_one(share):
    """More weights than the sample, so that the band is narrow, and tensors of very different scale."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(400_000, generator=generator), 1e-3 * torch.randn(300_001, generator=generator)]
    weights.append(torch.zeros(1000))
    k = int(share * 701_001)
    flat = torch.cat(weights).abs().sort().values
    assert kth_smallest_magnitude(weights, k) == flat[k - 1]


def test_a_sample_that_misleads_costs_a_pass_but_no_exactness():
    weight = torch.zeros(200_000)
    weight[1::2] = torch.arange(1.0, 100_001.0)  # a strided sample sees zeros only
    masks = keep_largest([weight], 150_000)
    assert masks[0].sum() == 50_000
    assert weight[masks[0]].min() == 50_001


def test_nan_is_an_error_rather_than_a_wrong_count():
    weight = torch.tensor([1.0, float("nan"), 3.0, 2.0])
    with pytest.raises(ValueError, match="NaN"):
        keep_largest([weight], 3)


def test_infinity_is_the_largest():
    masks = keep_largest([torch.tensor([1.0, -float("inf"), 3.0, float("inf")])], 2)
    assert masks[0].tolist() == [False, True, False, True]


@pytest.mark.parametrize("count", [-1, 5])
def test_a_count_out_of_range(count):
    with pytest.raises(ValueError, match=f"cannot prune {count} of 4"):
        keep_largest([torch.ones(4)], count)


def test_what_is_too_large_for_an_accelerator_is_cut_on_the_cpu(monkeypatch):
    """Tensors of the meta device have no numbers that could be brought."""
    weights = [torch.empty(10, device="meta")]
    assert keep_largest(weights, 3)[0].device.type == "meta"
    monkeypatch.setattr(selection, "_MOST_ON_ACCELERATOR", 5)
    with pytest.raises(NotImplementedError, match="meta"):
        keep_largest(weights, 3)
