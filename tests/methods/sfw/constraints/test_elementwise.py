"""What is particular to Lp balls, the K-sparse polytope and the K-support ball: ties, counts, the k-support norm."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from hf_compress.methods.sfw.constraints import KSparsePolytope, KSupportBall, LpBall
from tests.methods.sfw.constraints.mathematics import RADIUS, dual, gauge, inner, k_support_norm, randn

NUMBERS = st.lists(st.floats(-100, 100, allow_subnormal=False).map(lambda x: round(x, 3)), min_size=1, max_size=12)


@given(NUMBERS, st.data())
def test_the_k_support_norm_equals_its_variational_form(numbers, data):
    """Ties and zeros among them."""
    k = data.draw(st.integers(1, len(numbers)))
    x = torch.tensor(numbers, dtype=torch.float64)
    found = KSupportBall(k, RADIUS).gauge([x]).item()
    assert found == pytest.approx(k_support_norm(x.numpy(), k), rel=1e-9, abs=1e-12)


def test_the_k_support_norm_for_one_is_the_l1_norm():
    """The published code returns norm1 / sqrt(n + 1)."""
    x = randn((20,), seed=1)[0]
    assert KSupportBall(1, RADIUS).gauge([x]).item() == pytest.approx(x.abs().sum().item(), rel=1e-14)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_k_support_norm_is_the_dual_of_its_dual(k):
    """max <x, y> over sum of the k largest y^2 <= 1, solved in general terms."""
    x = np.sort(np.abs(randn((5,), seed=k)[0].numpy()))[::-1]
    # For sorted x the best y is sorted and not negative: then its k largest entries are the first ones.
    limits = [{"type": "ineq", "fun": lambda y: 1 - (y[:k] ** 2).sum()}]
    limits += [{"type": "ineq", "fun": lambda y, i=i: y[i] - y[i + 1]} for i in range(4)]
    limits += [{"type": "ineq", "fun": lambda y: y[4]}]
    solved = minimize(lambda y: -x @ y, np.full(5, 0.1), constraints=limits, method="SLSQP", options={"ftol": 1e-14})
    found = KSupportBall(k, RADIUS).gauge([torch.from_numpy(x.copy())]).item()
    assert found == pytest.approx(-solved.fun, rel=1e-6)


TIES = {
    "all equal": [2.0, -2.0, 2.0, -2.0, 2.0],
    "equal at the threshold": [3.0, 1.0, -1.0, 1.0, 0.5],
    "more zeros than places": [1.0, 0.0, 0.0, 0.0, 0.0],
    "as many ties as places": [1.0, -1.0, 0.5, 0.25, 0.125],
}


@pytest.mark.parametrize("numbers", TIES.values(), ids=TIES)
@pytest.mark.parametrize("kind", [KSparsePolytope, KSupportBall])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ties_share_what_is_left(numbers, kind, k, dtype):
    g, region = torch.tensor(numbers, dtype=dtype), kind(k, RADIUS)
    error = 1e-2 if dtype == torch.bfloat16 else 1e-6
    (vertex,) = region.lmo([g])
    assert inner([g], [vertex]) == pytest.approx(-RADIUS * dual(region, [g]), rel=error)
    assert gauge(region, [vertex]) <= RADIUS * (1 + error)
    for magnitude in g.abs().unique():  # no position is preferred
        shares = vertex[g.abs() == magnitude] * g[g.abs() == magnitude].sign()
        assert (shares == shares[0]).all()
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.allclose(region.lmo([g[order]])[0], vertex[order])


def test_ties_over_several_tensors():
    parts = [torch.ones(2, 2), -torch.ones(4)]
    vertex = KSparsePolytope(2, 1.0).lmo(parts)
    assert torch.equal(vertex[0], torch.full((2, 2), -0.25))
    assert torch.equal(vertex[1], torch.full((4,), 0.25))


@pytest.mark.parametrize("k", [1, 700, 0.1, 0.5])
def test_many_entries(k):
    """More than one piece of a tensor, and more than the sample of the selection."""
    directions = randn((300_000,), (7, 11_111), seed=1, dtype=torch.float32)
    for kind in (KSparsePolytope, KSupportBall):
        region = kind(k, RADIUS)
        vertex = region.lmo(directions)
        kept = sum(v.count_nonzero().item() for v in vertex)
        assert kept == region.count(directions) == (k if k >= 1 else int(k * 377_777))
        assert inner(directions, vertex) == pytest.approx(-RADIUS * dual(region, directions), rel=1e-5)
        assert region.dual_norm(directions).item() == pytest.approx(dual(region, directions), rel=1e-7)


@pytest.mark.parametrize(("k", "kept"), [(1, 1), (1.0, 10), (0.01, 1), (0.25, 2), (7, 7)])
def test_a_whole_number_is_a_count_and_a_float_a_share(k, kept):
    assert KSparsePolytope(k, 1.0).lmo(randn((10,)))[0].count_nonzero() == kept


@pytest.mark.parametrize("k", [0, -1, 0.0, 1.5, True, "3", None, math.nan])
def test_a_k_that_is_neither(k):
    with pytest.raises(ValueError, match="k must be a whole number of at least 1, or a share"):
        KSparsePolytope(k, 1.0)


def test_more_entries_than_there_are():
    for kind in (KSparsePolytope, KSupportBall):
        with pytest.raises(ValueError, match=r"keeps 7 entries, but the tensors that it covers have 6"):
            kind(7, 1.0).check(randn((2, 3)))
        with pytest.raises(ValueError, match="keeps 7 entries"):
            kind(7, 1.0).lmo(randn((2, 3)))


@pytest.mark.parametrize("p", [0.5, 0, -1, True, "2", math.nan])
def test_a_p_that_is_no_norm(p):
    with pytest.raises(ValueError, match="p must be a number of at least 1"):
        LpBall(p, 1.0)


@pytest.mark.parametrize("p", [1.01, 1.5, 2.5, 50])
def test_other_powers(p):
    """Entries that differ by 10 orders of magnitude, powers that would overflow."""
    g = randn((40,), seed=1)[0] * torch.logspace(-10, 0, 40, dtype=torch.float64)
    for dtype, error in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        region, direction = LpBall(p, RADIUS), (1e15 * g).to(dtype)
        vertex = region.lmo([direction])
        assert inner([direction], vertex) == pytest.approx(-RADIUS * dual(region, [direction]), rel=error)
        assert gauge(region, vertex) <= RADIUS * (1 + 1e-5)
