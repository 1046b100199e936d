"""Low rank: the best approximation there is, the rank that was asked for, and what stays dense."""

from __future__ import annotations

import math
from decimal import Decimal
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_compress as hfc
from hf_compress.patterns.low_rank import factors
from hf_compress.targets import Target, find_targets
from tests.test_selection import tensors

SHARES = st.floats(0, 1, exclude_max=True)
OF = st.sampled_from(["rank", "energy", "parameters"])


def best(matrix, rank):
    """The truncated singular value decomposition of torch in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def projected(weight, pattern):
    weights = {"w": weight.clone()}
    pattern.project_(weights)
    return weights["w"]


@given(st.integers(2, 24), st.integers(2, 24), SHARES, st.integers(0, 2**31), st.sampled_from([1.0, 0.0, 1e-18, 1e18]))
def test_it_is_the_best_approximation(rows, columns, share, seed, scale):
    weight = scale * random(rows, columns, seed=seed)
    pattern = hfc.LowRank(share)
    rank = max(1, math.floor((1 - Decimal(repr(share))) * min(rows, columns)))
    if rank * (rows + columns) >= rows * columns:
        assert pattern.ranks({"w": weight}) == {}
        assert torch.equal(projected(weight, pattern), weight)
        return
    assert pattern.ranks({"w": weight}) == {"w": rank}
    found = projected(weight, pattern)
    error = (weight.double() - found.double()).norm()
    lowest = torch.linalg.svdvals(weight.double())[rank:].norm()
    assert lowest * (1 - 1e-6) <= error + 1e-6 * weight.double().norm()
    assert error <= lowest * (1 + 1e-6) + 1e-6 * weight.double().norm()
    assert torch.linalg.matrix_rank(found.double(), rtol=1e-5) <= rank


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 6, 3, 3), (6, 30, 5)])
def test_values_are_those_of_the_decomposition(shape, dtype, tolerance):
    weight = random(*shape).to(dtype)
    found = projected(weight, hfc.LowRank(0.75))
    wanted = best(weight.flatten(1), max(1, min(shape[0], math.prod(shape[1:])) // 4)).view(shape)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance * weight.double().norm().item() / 4)


def test_nothing_of_that_rank_is_nearer():
    weight = random(20, 14).double()
    error = (weight - projected(weight, hfc.LowRank(0.8))).norm()
    left, right = random(20, 2, seed=1).double(), random(2, 14, seed=2).double()
    for _ in range(300):  # alternating least squares from a random start
        right = torch.linalg.lstsq(left, weight).solution
        left = torch.linalg.lstsq(right.T, weight.T).solution.T
    assert error <= (weight - left @ right).norm() + 1e-9
    torch.testing.assert_close(error, (weight - left @ right).norm(), rtol=1e-3, atol=0)


def test_ill_conditioned_matrices_keep_what_float32_can_tell():
    u, v = (torch.linalg.qr(random(30, 30, seed=i).double()).Q for i in (1, 2))
    values = torch.logspace(0, -12, 30, dtype=torch.float64)
    weight = (u * values) @ v
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 2e-7)):
        found = projected(weight.to(dtype), hfc.LowRank(0.75)).double()
        assert (found - best(weight, 7)).norm() < tolerance


@given(tensors(), SHARES, st.sampled_from(["rank", "parameters"]))
@settings(max_examples=100)
def test_projecting_twice_changes_nothing_but_roundings(weights, share, of):
    weights = {str(i): w for i, w in enumerate(weights) if w.dtype == torch.float64 or w.dtype == torch.float32}
    pattern = hfc.LowRank(share, of)
    once = {n: w.clone() for n, w in weights.items()}
    pattern.project_(once)
    twice = {n: w.clone() for n, w in once.items()}
    pattern.project_(twice)
    for name in weights:
        torch.testing.assert_close(twice[name], once[name], rtol=0, atol=1e-5)


@given(tensors(), SHARES, SHARES, OF)
@settings(max_examples=100)
def test_a_larger_share_leaves_no_larger_rank(weights, a, b, of):
    weights = {str(i): w for i, w in enumerate(weights)}
    few, many = (hfc.LowRank(s, of).ranks(weights) for s in sorted((a, b)))
    full = {n: min(w.shape[0], math.prod(w.shape[1:])) for n, w in weights.items() if w.ndim > 1}
    assert all(many.get(n, full[n]) <= few.get(n, full[n]) for n in full)


@given(tensors(), SHARES, OF)
@settings(max_examples=100)
def test_each_weight_is_cut_or_skipped_and_never_grows(weights, share, of):
    weights = {str(i): w for i, w in enumerate(weights)}
    pattern = hfc.LowRank(share, of)
    ranks, skipped = pattern.ranks(weights), pattern.skipped(weights)
    assert ranks.keys() | skipped.keys() == weights.keys()
    assert not ranks.keys() & skipped.keys()
    for name, rank in ranks.items():
        rows, columns = weights[name].shape[0], math.prod(weights[name].shape[1:])
        assert rank >= 1
        assert rank * (rows + columns) < rows * columns
    after = {n: w.clone() for n, w in weights.items()}
    pattern.project_(after)
    assert all(torch.equal(after[n], weights[n]) for n in skipped)


@given(SHARES, OF)
def test_texts_read_back(share, of):
    pattern = hfc.LowRank(share, of)
    assert hfc.parse_pattern(str(pattern)) == pattern
    assert not set(pattern.revision) & set(":~^?*[\\ ")
    assert pattern.partway(1) == pattern
    assert pattern.partway(0) is None
    assert hfc.parse_pattern(str(pattern.partway(0.5))) == hfc.LowRank(share * 0.5, of)


def test_names():
    texts = ["low_rank:0.75", "low_rank:.1:energy", "low_rank:0.5:parameters", "low_rank:0.50:rank"]
    patterns = [hfc.parse_pattern(t) for t in texts]
    assert list(map(str, patterns)) == [
        "low_rank:0.75",
        "low_rank:0.1:energy",
        "low_rank:0.5:parameters",
        "low_rank:0.5",
    ]
    assert patterns[0].revision == "low-rank-0.75"
    assert [p.revision for p in patterns[1:3]] == ["low-rank-0.10-energy", "low-rank-0.50-parameters"]


@pytest.mark.parametrize(
    "text", ["low_rank", "low_rank:1", "low_rank:0.5:size", "low_rank:0.5:rank:x", "low_rank:1e-1"]
)
def test_a_wrong_text_names_the_forms(text):
    with pytest.raises(ValueError, match='allowed: "low_rank:SHARE".*low_rank:0.1:energy.*low_rank:0.5:parameters'):
        hfc.parse_pattern(text)


@pytest.mark.parametrize("text", ["low_rank:0.5+int8", "2:4+low_rank:0.5", "unstructured:0.5+low_rank:0.5:energy"])
def test_no_chain_holds_a_rank(text):
    with pytest.raises(ValueError, match="zeros and rounding undo a rank"):
        hfc.parse_pattern(text)


def test_there_are_no_masks():
    with pytest.raises(TypeError, match=r"low_rank:0\.5 cuts ranks and has no masks"):
        hfc.LowRank(0.5).masks({"w": random(8, 8)})


def test_why_a_weight_stays_dense():
    weights = {"square": random(8, 8), "vector": random(8), "wide": random(8, 40), "none": random(0, 4)}
    assert hfc.LowRank(0.5).skipped(weights) == {
        "square": "two factors of rank 4 have 64 entries, and it has 64",
        "vector": "it is no matrix, or empty",
        "none": "it is no matrix, or empty",
    }


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("of", ["rank", "energy"])
def test_numbers_that_are_none_are_named(value, of):
    weights = {"a": random(4, 30), "b": random(4, 30)}
    weights["b"][1, 1] = value
    before = weights["a"].clone()
    with pytest.raises(ValueError, match="weight 'b' (is not finite|holds NaN)"):
        hfc.LowRank(0.75, of).project_(weights)
    assert torch.equal(weights["a"], before)


def test_conv1d_is_the_other_way_round():
    layer = Conv1D(40, 12)
    weight = layer.weight.detach().clone()
    left, right = factors(find_targets(layer)["weight"], 3)
    assert (left.shape, right.shape) == ((1, 40, 3), (1, 3, 12))
    hfc.LowRank(0.75).project_(find_targets(layer))
    torch.testing.assert_close(layer.weight.double(), best(weight, 3), rtol=0, atol=1e-6)


def test_every_group_of_a_convolution_is_a_matrix_of_its_own():
    layer = nn.Conv2d(12, 24, 3, groups=3)
    weight = layer.weight.detach().clone()
    targets = find_targets(layer)
    assert hfc.LowRank(0.75).ranks(targets) == {"weight": 2}
    hfc.LowRank(0.75).project_(targets)
    for found, group in zip(layer.weight.chunk(3), weight.chunk(3), strict=True):
        torch.testing.assert_close(found.flatten(1).double(), best(group.flatten(1), 2), rtol=0, atol=1e-6)
    depthwise = find_targets(nn.Conv2d(6, 6, 3, groups=6))
    assert "two factors" in hfc.LowRank(0.9).skipped(depthwise)["weight"]


@given(st.integers(2, 12), st.integers(2, 12), SHARES, st.integers(0, 2**31))
def test_energy_is_the_smallest_rank_within_the_share(rows, columns, share, seed):
    weight = random(rows, columns, seed=seed)
    squares = torch.linalg.svdvals(weight.double()).square().tolist()
    fits = [r for r in range(1, len(squares) + 1) if math.fsum(squares[r:]) <= share * math.fsum(squares) * (1 - 1e-9)]
    near = [r for r in range(1, len(squares) + 1) if math.fsum(squares[r:]) <= share * math.fsum(squares) * (1 + 1e-9)]
    found = hfc.LowRank(share, "energy").ranks({"w": weight}).get("w")
    if found is None:
        rank = min(fits, default=len(squares))
        assert rank * (rows + columns) >= rows * columns
    else:
        assert min(near) <= found <= min(fits, default=len(squares))


def cost(weights, ranks):
    return sum(
        min(ranks[n] * (w.shape[0] + w.shape[1]), w.numel()) if n in ranks else w.numel() for n, w in weights.items()
    )


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.6, 0.7, 0.9])
@pytest.mark.parametrize("seed", range(6))
def test_a_budget_is_kept_and_well_spent(share, seed):
    """Against all combinations of ranks: none of the same cost or less keeps more energy, but for the last step."""
    weights = {"a": random(6, 9, seed=seed), "b": 2 * random(5, 16, seed=seed + 1), "c": random(4, 4, seed=seed + 2)}
    spectra = {n: torch.linalg.svdvals(w.double()).square() for n, w in weights.items()}
    ranks = hfc.LowRank(share, "parameters").ranks(weights)
    total = sum(w.numel() for w in weights.values())
    smallest = cost(weights, dict.fromkeys(weights, 1))
    assert cost(weights, ranks) <= max(math.floor((1 - Decimal(repr(share))) * total), smallest)

    def energy(found):
        return sum(float(s[: found.get(n, 99)].sum()) for n, s in spectra.items())

    full = {n: len(s) for n, s in spectra.items()}
    others = [dict(zip(weights, r, strict=True)) for r in product(*(range(1, n + 1) for n in full.values()))]
    within = [o for o in others if cost(weights, o) <= cost(weights, ranks)]
    largest = max(float(s.max()) for s in spectra.values())
    assert energy(ranks) >= max(map(energy, within)) - largest


def test_a_budget_goes_where_the_energy_is():
    weights = {"strong": 10 * random(16, 64), "weak": 0.1 * random(16, 64, seed=1)}
    ranks = hfc.LowRank(0.6, "parameters").ranks(weights)
    assert ranks["weak"] == 1
    assert ranks["strong"] > 8


def test_energy_of_a_spectrum_that_is_known():
    u, v = (torch.linalg.qr(random(20, 20, seed=i).double()).Q for i in (1, 2))
    values = torch.zeros(20, dtype=torch.float64)
    values[:4] = torch.tensor([6.0, 3.0, 2.0, 1.0])  # squares 36, 9, 4, 1 of 50
    weight = (u * values) @ v
    shares = {"0": 4, "0.019": 4, "0.021": 3, "0.099": 3, "0.101": 2, "0.279": 2, "0.281": 1}
    assert {s: hfc.LowRank(float(s), "energy").ranks({"w": weight.float()})["w"] for s in list(shares)[1:]} == {
        s: r for s, r in shares.items() if s != "0"
    }


def test_targets_keep_their_memory():
    layer = nn.Linear(40, 12)
    pointer = layer.weight.data_ptr()
    hfc.compress(layer, "low_rank:0.75")
    assert layer.weight.data_ptr() == pointer
    assert torch.linalg.matrix_rank(layer.weight) == 3
    assert isinstance(find_targets(layer)["weight"], Target)
