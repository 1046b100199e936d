"""Laws that hold for every tensor: empty, prime-sized, constant, tied, half precision, not contiguous."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hf_compress as hfc
from hf_compress.patterns.base import count_pruned
from hf_compress.patterns.masking import add_masked_, masked, zero_
from tests.test_selection import tensors

TEXTS = ["unstructured:0.3", "unstructured:0.77:layer", "2:4", "1:2", "3:7", "int8", "int4", "2:4+int8", "1:3+int5"]


def named(weights):
    return {str(i): w.clone() for i, w in enumerate(weights)}


@given(tensors(), st.floats(0, 1, exclude_max=True), st.sampled_from(["global", "layer"]))
def test_the_count_is_exact(weights, share, scope):
    masks = hfc.Unstructured(share, scope).masks(named(weights)).values()
    if scope == "global":
        total = sum(w.numel() for w in weights)
        assert sum(int((~m).sum()) for m in masks) == count_pruned(share, total)
    else:
        assert [int((~m).sum()) for m in masks] == [count_pruned(share, w.numel()) for w in weights]


@given(tensors(), st.sampled_from(TEXTS))
def test_projecting_twice_changes_nothing_more(weights, text):
    pattern, once = hfc.parse_pattern(text), named(weights)
    pattern.project_(once)
    twice = named(once.values())
    pattern.project_(twice)
    assert all(torch.equal(once[n], twice[n]) for n in once)


@given(
    tensors(),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["global", "layer"]),
)
def test_what_a_smaller_share_prunes_a_larger_one_prunes_too(weights, a, b, scope):
    few, many = (hfc.Unstructured(s, scope).masks(named(weights)) for s in sorted((a, b)))
    assert not any((many[n] & ~few[n]).any() for n in few)


@given(tensors(), st.integers(2, 8), st.data())
def test_every_group_keeps_n_of_the_largest(weights, m, data):
    n = data.draw(st.integers(1, m - 1))
    given_weights = named(weights)
    masks = hfc.NM(n, m).masks(given_weights)
    for name, weight in given_weights.items():
        if weight.ndim < 2 or weight.shape[1] % m:
            continue
        mask, size = (t.movedim(1, -1).unflatten(-1, (-1, m)) for t in (masks[name], weight.abs().float()))
        assert mask.sum(-1).eq(n).all()
        lightest_kept = torch.where(mask, size, float("inf")).amin(-1)
        heaviest_pruned = torch.where(mask, -1.0, size).amax(-1)
        assert (lightest_kept >= heaviest_pruned).all()


@given(st.data())
def test_texts_read_back(data):
    parts = data.draw(st.lists(st.sampled_from([t for t in TEXTS if "int" not in t]), min_size=1, max_size=3))
    bits = data.draw(st.sampled_from(["", *(f"int{b}" for b in range(2, 9))]))
    text = "+".join([*parts, *([bits] if bits else [])])
    pattern = hfc.parse_pattern(text)
    assert str(pattern) == text
    assert hfc.parse_pattern(str(pattern)) == pattern
    assert not set(pattern.revision) & set(":~^?*[\\ ")


@given(tensors(), st.integers(0, 2**31))
def test_masking_keeps_bits_and_writes_plus_zero(weights, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        values = weight.clone()
        flat = values.view(-1) if values.is_contiguous() else values.flatten()
        flat[::3] = float("nan")
        mask = torch.rand(values.shape, generator=generator) > 0.5
        wanted = torch.where(mask, values, torch.zeros((), dtype=values.dtype))
        scratch = torch.empty(values.numel() + 5, dtype=values.dtype)
        found = masked(values, mask, scratch).clone()
        total = torch.ones_like(values)
        add_masked_(total, values, mask)
        before = values.clone()
        zero_(values, mask)
        for result in (found, values):
            torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)
            assert not torch.signbit(result[~mask]).any()
        torch.testing.assert_close(total, torch.where(mask, 1 + before, 1.0).to(total.dtype), equal_nan=True)


@pytest.mark.parametrize("text", TEXTS)
def test_a_law_can_fail(text):
    """The check of idempotence sees a weight that moves."""
    pattern, once = hfc.parse_pattern(text), {"w": torch.randn(6, 84)}
    pattern.project_(once)
    moved = {"w": once["w"] + 0.01 * torch.randn(6, 84)}
    pattern.project_(moved)
    assert not torch.equal(once["w"], moved["w"])
