"""Thresholds of layers that are read one after the other, against selection with all of them in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compress.patterns.base import count_pruned
from hf_compress.report.cuts import Sums, find_cuts, place_cuts, prune_mask
from hf_compress.selection import CHUNK, keep_largest

SHARES = [0.0, 0.3, 0.5, 0.9, 0.99]


@st.composite
def layers(draw, dtype):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 13]), min_size=2, max_size=3))
        weight = torch.randn(shape, generator=generator, dtype=torch.float64)
        kind = draw(st.sampled_from(["plain", "tied", "constant", "zeros", "tiny", "huge"]))
        if kind == "tied":
            weight = (weight * 2).round()
        elif kind == "constant":
            weight = torch.full_like(weight, -0.5)
        elif kind == "zeros":
            weight = -torch.zeros_like(weight)
        found.append((weight * {"tiny": 1e-30, "huge": 1e30}.get(kind, 1.0)).to(dtype))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@settings(max_examples=60)
@given(data=st.data())
def test_masks_are_those_of_selection(dtype, data):
    weights = data.draw(layers(dtype))
    cuts, broken = find_cuts([lambda w=w: w for w in weights], SHARES, dtype)
    assert broken == set()
    total = sum(w.numel() for w in weights)
    wanted = [keep_largest(weights, count_pruned(share, total)) for share in SHARES]
    for i, weight in enumerate(weights):
        places, cuts = place_cuts(weight, cuts, dtype)
        sums = Sums([place.threshold for place in places])
        sums.add(weight.to(dtype).abs())
        for place, below, masks in zip(places, sums.below, wanted, strict=True):
            mask = prune_mask(weight, weight, weight.abs(), place)
            assert torch.equal(mask, ~masks[i])
            assert below[0] + place.ties == int(mask.sum())
            for axis in range(weight.ndim):  # in parts, which need not lie in one piece
                parts = [weight.narrow(axis, k, 1) for k in range(weight.shape[axis])]
                pieces = [prune_mask(weight, part, part.abs(), place) for part in parts]
                assert not pieces or torch.equal(torch.cat(pieces, axis), mask)
    assert all(cut.ties == 0 for cut in cuts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_layers_of_more_than_one_chunk(dtype):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(300, 1000, generator=generator), 1e-3 * torch.randn(777, 301, generator=generator)]
    weights = [w.to(dtype) for w in weights]
    assert weights[0].numel() > 2 * CHUNK
    wide = torch.float32 if dtype == torch.float16 else dtype
    cuts, _ = find_cuts([lambda w=w: w for w in weights], SHARES, wide)
    total = sum(w.numel() for w in weights)
    wanted = [keep_largest(weights, count_pruned(share, total)) for share in SHARES]
    for i, weight in enumerate(weights):
        places, cuts = place_cuts(weight, cuts, wide)
        for place, masks in zip(places, wanted, strict=True):
            assert torch.equal(prune_mask(weight, weight, weight.to(wide).abs(), place), ~masks[i])


def test_half_precision_beside_single_is_compared_in_single():
    weights = [torch.tensor([1.0, 2.0, 3.0]).bfloat16(), torch.tensor([1.001, 2.001, 0.5])]
    cuts, _ = find_cuts([lambda w=w: w for w in weights], [0.5], torch.float32)
    assert cuts[0].threshold == pytest.approx(1.001)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_broken_layers_take_no_part(bad, dtype):
    weights = [torch.tensor([1.0, 5.0, bad]), torch.tensor([1.0, 2.0, 3.0, 4.0])]
    weights = [w.to(dtype) for w in weights]
    cuts, broken = find_cuts([lambda w=w: w for w in weights], [0.5], dtype)
    assert broken == {0}
    assert (cuts[0].threshold, cuts[0].ties) == (2.0, 1)


def test_sums_against_numbers():
    values = torch.tensor([0.0, 1.0, 1.0, 2.0, 3.0])
    sums = Sums([0.0, 1.0, 2.5])
    sums.add(values[:3])
    sums.add(values[3:])
    assert sums.zeros == 1
    assert sums.square_sum == 15
    assert sums.below == [(0, 0.0), (1, 0.0), (4, 6.0)]
