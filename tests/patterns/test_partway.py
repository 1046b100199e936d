"""Patterns on their way from dense weights: what a schedule may rely on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hf_compress as hfc
from hf_compress.patterns import Quantized
from hf_compress.patterns.base import count_pruned
from tests.test_selection import tensors

TEXTS = [
    "unstructured:0.3",
    "unstructured:0.77:layer",
    "unstructured:0",
    "2:4",
    "1:2",
    "3:7",
    "2:4+int8",
    "unstructured:0.5+int4",
    "unstructured:0.5+2:4",
    "unstructured:0.5+1:3+int5",
]
PROGRESS = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 0.5, 1e-300]))


def pruned(pattern, weights):
    """Masks of what is removed."""
    if pattern is None:
        return {name: torch.zeros(w.shape, dtype=torch.bool) for name, w in weights.items()}
    return {name: ~mask for name, mask in pattern.masks(weights).items()}


@pytest.mark.parametrize("text", TEXTS)
def test_the_way_ends_at_the_pattern_and_begins_with_nothing(text):
    pattern = hfc.parse_pattern(text)
    assert pattern.partway(1) == pattern.partway(1.0) == pattern
    assert pattern.partway(0) is pattern.partway(0.0) is None


@given(tensors(), st.sampled_from(TEXTS), PROGRESS, PROGRESS)
def test_what_is_removed_early_is_removed_later(weights, text, a, b):
    pattern, weights = hfc.parse_pattern(text), {str(i): w for i, w in enumerate(weights)}
    few, many = (pruned(pattern.partway(p), weights) for p in sorted((a, b)))
    if text.count("+") == (0 if "int" not in text else 1):  # one part that prunes: masks lie inside each other
        assert not any((few[n] & ~many[n]).any() for n in few)
    else:
        assert sum(int(m.sum()) for m in few.values()) <= sum(int(m.sum()) for m in many.values())


@given(st.sampled_from(TEXTS), PROGRESS)
def test_a_step_of_the_way_is_a_pattern_that_reads_back(text, progress):
    step = hfc.parse_pattern(text).partway(progress)
    assert step is None or hfc.parse_pattern(str(step)) == step


@given(tensors(), st.floats(0, 1, exclude_max=True), PROGRESS, st.sampled_from(["global", "layer"]))
def test_of_a_share_that_share_is_removed(weights, share, progress, scope):
    weights = {str(i): w for i, w in enumerate(weights)}
    masks = pruned(hfc.Unstructured(share, scope).partway(progress), weights)
    sizes = [w.numel() for w in weights.values()]
    found, sizes = (
        ([sum(int(m.sum()) for m in masks.values())], [sum(sizes)])
        if scope == "global"
        else ([int(m.sum()) for m in masks.values()], sizes)
    )
    assert found == [count_pruned(share * progress, size) for size in sizes]


@given(st.integers(2, 40), st.data(), PROGRESS)
def test_of_a_group_the_floor_is_removed(m, data, progress):
    n = data.draw(st.integers(1, m - 1))
    step = hfc.NM(n, m).partway(progress)
    assert (0 if step is None else m - step.n) == math.floor((m - n) * progress)
    assert step is None or step.m == m


def test_a_chain_rounds_at_the_end_only():
    chain = hfc.parse_pattern("unstructured:0.5+2:4+int8")
    assert chain.partway(0.4) == hfc.parse_pattern("unstructured:0.2")
    assert chain.partway(0.5) == hfc.parse_pattern("unstructured:0.25+3:4")
    assert hfc.parse_pattern("2:4+int8").partway(0.4) is None
    assert hfc.parse_pattern("2:4+int8").partway(0.9) == hfc.NM(3, 4)


def test_rounding_alone_has_no_way_in_between():
    with pytest.raises(ValueError, match="int8 cannot be reached little by little.*such as 2:4[+]int8"):
        Quantized(8).partway(0.5)


@pytest.mark.parametrize("text", ["unstructured:0.3", "2:4", "2:4+int8"])
@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan"), True, "0.5", None])
def test_progress_is_a_share(text, progress):
    with pytest.raises(ValueError, match=r"progress is a share of the final removal in \[0, 1\], got"):
        hfc.parse_pattern(text).partway(progress)
