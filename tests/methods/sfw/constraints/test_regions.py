"""The laws that every feasible region keeps, against independent float64 mathematics."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
import torch

from hf_compress.methods.sfw.constraints import (
    GroupKSupportBall,
    KSparsePolytope,
    KSupportBall,
    LpBall,
    NuclearBall,
    SpectralKSparsePolytope,
    SpectralKSupportBall,
)
from tests.methods.sfw.constraints.mathematics import (
    NAMES,
    RADIUS,
    dual,
    gauge,
    inner,
    middle,
    norm,
    randn,
    regions,
    scaled_to,
)

SHAPES = [
    [(1, 1)],
    [(1, 6)],
    [(6, 1)],
    [(7,)],
    [(12, 12)],
    [(8, 4, 3, 3)],
    [(9, 2, 2)],
    [(64, 576)],
    [(12, 5), (6, 3, 2, 2), (4,)],
]
ERROR = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
several = pytest.mark.parametrize("name", NAMES)


@several
@pytest.mark.parametrize("dtype", ERROR)
def test_support_identity(name, dtype):
    for seed, shapes in enumerate(SHAPES):
        directions = randn(*shapes, seed=seed, dtype=dtype)
        for region in regions(name, directions):
            vertex, wanted = region.lmo(directions), dual(region, directions)
            assert all(v.dtype == dtype and v.shape == g.shape for v, g in zip(vertex, directions, strict=True))
            assert inner(directions, vertex) == pytest.approx(-RADIUS * wanted, rel=ERROR[dtype]), (region, shapes)
            assert region.dual_norm(directions).item() == pytest.approx(wanted, rel=min(1e-6, ERROR[dtype]))
            slack = 1 + (1e-5 if dtype != torch.bfloat16 else 2e-2)
            assert gauge(region, vertex) <= RADIUS * slack, (region, shapes)
            assert region.gauge(vertex).item() == pytest.approx(gauge(region, vertex), rel=1e-6)


@several
def test_no_feasible_point_is_better(name):
    directions = randn((4, 5), (3, 2), seed=1)
    for region in regions(name, directions):
        best = inner(directions, region.lmo(directions))
        for seed in range(100):
            points = randn((4, 5), (3, 2), seed=seed + 2)
            if seed % 2:  # a few large entries
                points = [p**5 for p in points]
            assert inner(directions, scaled_to(region, points, RADIUS)) >= best - 1e-9
        # The direction itself, and vertices of its neighbours, are the hardest to beat.
        near = [g + 0.1 * e for g, e in zip(directions, randn((4, 5), (3, 2), seed=3), strict=True)]
        assert inner(directions, scaled_to(region, [-g for g in directions], RADIUS)) >= best - 1e-9
        assert inner(directions, region.lmo(near)) >= best - 1e-9


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_brute_force_over_vertices(n):
    (g,) = randn((n,), seed=n)
    corners = [torch.tensor(signs, dtype=torch.float64) for signs in product([-1.0, 1.0], repeat=n)]
    _assert_best(LpBall(math.inf, RADIUS), g, corners)
    _assert_best(LpBall(1, RADIUS), g, [sign * e for e in torch.eye(n).double() for sign in (-1, 1)])
    for k in {1, min(2, n), max(1, n // 2), n}:
        supports = [_on(n, kept) for kept in combinations(range(n), k)]
        vertices = {tuple((support * corner).tolist()) for support in supports for corner in corners}
        _assert_best(KSparsePolytope(k, RADIUS), g, map(torch.tensor, vertices))
        _assert_best(KSupportBall(k, RADIUS), g, [-support * g / (support * g).norm() for support in supports])


@pytest.mark.parametrize("k", [1, 2, 4])
def test_brute_force_over_groups(k):
    (g,) = randn((4, 5), seed=k)
    vertices = [_on(4, kept)[:, None] * g for kept in combinations(range(4), k)]
    _assert_best(GroupKSupportBall(k, RADIUS), g, [-v / v.norm() for v in vertices])


def _on(n, kept):
    return torch.zeros(n, dtype=torch.float64).index_fill(0, torch.tensor(kept), 1)


def _assert_best(region, g, vertices):
    """Every vertex of the unit ball is on the boundary, and the oracle reaches the best of them."""
    products = []
    for i, vertex in enumerate(vertices):
        vertex = RADIUS * vertex.double()
        products.append(inner([g], [vertex]))
        if i < 50:
            assert region.gauge([vertex]).item() == pytest.approx(RADIUS)
    assert inner([g], region.lmo([g])) == pytest.approx(min(products), rel=1e-12)


LIMITS = [
    (KSupportBall(1, RADIUS), LpBall(1, RADIUS)),
    (KSupportBall(1.0, RADIUS), LpBall(2, RADIUS)),
    (KSparsePolytope(1, RADIUS), LpBall(1, RADIUS)),
    (KSparsePolytope(1.0, RADIUS), LpBall(math.inf, RADIUS)),
    (GroupKSupportBall(1.0, RADIUS), LpBall(2, RADIUS)),
    (GroupKSupportBall(1, RADIUS, groups=1), LpBall(2, RADIUS)),
    (SpectralKSparsePolytope(1, RADIUS), NuclearBall(RADIUS)),
    (SpectralKSupportBall(1, RADIUS), NuclearBall(RADIUS)),
    (SpectralKSupportBall(1.0, RADIUS), LpBall(2, RADIUS)),
]


@pytest.mark.parametrize(("region", "limit"), LIMITS, ids=str)
@pytest.mark.parametrize("shapes", [[(6, 9)], [(5, 2, 3, 3), (4, 4), (3,)]])
def test_limits_between_regions(region, limit, shapes):
    _assert_same_region(region, limit, randn(*shapes, seed=7))


def test_groups_of_one_entry_are_entries():
    _assert_same_region(GroupKSupportBall(3, RADIUS), KSupportBall(3, RADIUS), randn((9,), (4, 1)))


def test_a_diagonal_matrix_acts_as_its_entries():
    diagonal = randn((6,), seed=3)[0]
    for spectral, entries in ((SpectralKSparsePolytope, KSparsePolytope), (SpectralKSupportBall, KSupportBall)):
        vertex = spectral(3, RADIUS).lmo([diagonal.diag()])[0]
        assert torch.allclose(vertex, entries(3, RADIUS).lmo([diagonal])[0].diag(), atol=1e-12)


def test_all_singular_values_give_the_polar_factor():
    matrix = randn((6, 9), seed=5)[0]
    left, _, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    vertex = SpectralKSparsePolytope(1.0, RADIUS).lmo([matrix])[0]
    assert np.allclose(vertex.numpy(), -RADIUS * left @ right, atol=1e-12)


def _assert_same_region(a, b, tensors):
    for x, y in zip(a.lmo(tensors), b.lmo(tensors), strict=True):
        assert torch.allclose(x, y, atol=1e-12)
    for measure in ("gauge", "dual_norm", "diameter"):
        assert getattr(a, measure)(tensors).item() == pytest.approx(getattr(b, measure)(tensors).item(), rel=1e-12)


@several
def test_the_scale_of_a_direction_does_not_matter_and_its_sign_does(name):
    for shapes in ([(6, 9)], [(5, 3), (4, 2, 2, 2)]):
        directions = randn(*shapes, seed=11)
        for region in regions(name, directions):
            vertex = region.lmo(directions)
            for factor in (1e-12, 7.0, -1.0, -1e9):
                other = region.lmo([factor * g for g in directions])
                sign = math.copysign(1, factor)
                assert all(torch.allclose(o, sign * v, atol=1e-9) for o, v in zip(other, vertex, strict=True))


@several
def test_the_gauge_is_a_norm(name):
    a, b = randn((6, 9), (4,), seed=1), randn((6, 9), (4,), seed=2)
    for region in regions(name, a):
        size = region.gauge(a).item()
        assert size == pytest.approx(gauge(region, a), rel=1e-9)
        assert region.gauge([-3 * x for x in a]).item() == pytest.approx(3 * size)
        assert region.gauge([x + y for x, y in zip(a, b, strict=True)]) <= size + region.gauge(b) + 1e-12
        assert region.gauge([0 * x for x in a]) == 0
        assert abs(inner(a, b)) <= size * region.dual_norm(b).item() * (1 + 1e-12)
        assert region.gauge(region.lmo(b)).item() == pytest.approx(RADIUS)


@several
def test_no_two_points_are_farther_apart_than_the_diameter_and_two_are_that_far(name):
    """Vertices of vertices: each is at least as far from the centre as the one before."""
    for shapes in ([(4, 6)], [(3, 5), (2, 2)]):
        for region in regions(name, randn(*shapes)):
            farthest = 0.0
            for seed in range(10):
                points = scaled_to(region, randn(*shapes, seed=seed), RADIUS)
                for _ in range(15):
                    points = region.lmo([-p for p in points])
                # Opposite points of a ball are both inside.
                assert gauge(region, points) <= RADIUS * (1 + 1e-9)
                farthest = max(farthest, 2 * norm(points))
            assert farthest == pytest.approx(region.diameter(randn(*shapes)).item(), rel=1e-6)


@several
def test_iterates_stay_inside(name):
    for shapes in ([(48, 64)], [(6, 3, 3, 3), (20, 6)]):
        weights = randn(*shapes, seed=1, dtype=torch.float32)
        region = middle(name, weights)
        region.shrink_(weights)
        memory = [{} for _ in weights]
        shares = torch.rand(100, generator=torch.Generator().manual_seed(0)) ** 3
        shares[50], shares[51] = 0, 1
        for step, share in enumerate(shares):
            oracle = region.oracle(randn(*shapes, seed=step, dtype=torch.float32), memory)
            for i, weight in enumerate(weights):
                oracle.move_(weight, i, share)
            if step % 9 == 0 or step in (50, 51):
                assert gauge(region, weights) <= RADIUS * (1 + 1e-5)


LAYOUTS = {
    "plain": lambda w: w.clone(),
    "channels_last": lambda w: w.clone(memory_format=torch.channels_last) if w.ndim == 4 else w.clone(),
    "transposed": lambda w: w.transpose(0, 1).clone().transpose(0, 1),
}


@several
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_move_takes_its_share_of_the_way(name, layout):
    shapes = [(6, 3, 3, 3), (9, 4)]
    for dtype, error in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        weights = [LAYOUTS[layout](w) for w in randn(*shapes, seed=1, dtype=dtype)]
        directions = [LAYOUTS[layout](g) for g in randn(*shapes, seed=2, dtype=dtype)]
        region = middle(name, weights)
        oracle = region.oracle(directions)
        gap = [v.double() - w.double() for v, w in zip(region.lmo(directions), weights, strict=True)]
        assert oracle.squared_distance(weights).item() == pytest.approx(norm(gap) ** 2, rel=error)
        assert oracle.inner(weights).item() == pytest.approx(inner(directions, weights), rel=1e-6)
        wanted = [w.double() + 0.3 * d for w, d in zip(weights, gap, strict=True)]
        for i, weight in enumerate(weights):
            pointer = weight.data_ptr()
            oracle.move_(weight, i, torch.tensor(0.3, dtype=torch.float64))
            assert weight.data_ptr() == pointer
            assert torch.allclose(weight.double(), wanted[i], atol=error, rtol=error)


@several
def test_squared_distance_is_exact_beside_the_vertex(name):
    """No difference of large numbers: 1e-4 apart, in float32."""
    directions = randn((6, 9), seed=3, dtype=torch.float32)
    region = middle(name, directions)
    (vertex,) = region.lmo(directions)
    weight = vertex + 1e-4 * randn((6, 9), seed=4, dtype=torch.float32)[0]
    distance = region.oracle(directions).squared_distance([weight]).sqrt().item()
    assert distance == pytest.approx((weight.double() - vertex).norm().item(), rel=1e-2)


@several
def test_shrinking_is_radial_and_leaves_what_is_inside(name):
    weights = randn((6, 9), (5,), seed=1, dtype=torch.float32)
    for region in regions(name, weights):
        outside = [10 * w for w in scaled_to(region, weights, RADIUS)]
        before = [w.clone() for w in outside]
        factor = region.shrink_(outside)
        assert factor.item() == pytest.approx(0.1, rel=1e-5)
        assert gauge(region, outside) == pytest.approx(RADIUS, rel=1e-5)
        assert all(torch.allclose(a, b * factor.float()) for a, b in zip(outside, before, strict=True))
        inside = scaled_to(region, weights, 0.9 * RADIUS)
        before = [w.clone() for w in inside]
        assert region.shrink_(inside) == 1
        assert all(torch.equal(a, b) for a, b in zip(inside, before, strict=True))


PROJECTED = ["l1", "l2", "linf", "nuclear"]


@pytest.mark.parametrize("name", PROJECTED)
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_a_projection_is_the_nearest_point(name, scale):
    """y is the projection of x if and only if no point z of the ball has <x - y, z - y> > 0."""
    for shapes in ([(1, 1)], [(9,)], [(6, 8)], [(4, 2, 3, 3), (5, 5), (3,)]):
        start = [scale * x for x in randn(*shapes, seed=5)]
        region = middle(name, start)
        found = [x.clone() for x in start]
        region.project_(found)
        rest = [x - y for x, y in zip(start, found, strict=True)]
        assert gauge(region, found) <= RADIUS * (1 + 1e-12)
        assert RADIUS * dual(region, rest) <= inner(rest, found) + 1e-9 * scale
        if gauge(region, start) <= RADIUS:
            assert all(torch.equal(a, b) for a, b in zip(found, start, strict=True))
        again = [y.clone() for y in found]
        region.project_(again)
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(again, found, strict=True))


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(PROJECTED)))
def test_other_regions_say_that_they_have_no_projection(name):
    weights = randn((4, 5))
    with pytest.raises(TypeError, match="no projection in closed form"):
        middle(name, weights).project_(weights)


BAD = {"zero": 0.0, "nan": math.nan, "inf": math.inf}


@several
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("everywhere", [True, False])
def test_directions_without_a_vertex_change_nothing(name, bad, everywhere):
    """And what is kept from step to step is as good as before: the next direction has its vertex."""
    shapes = [(40, 48), (6, 2, 3, 3)]
    for dtype in (torch.float32, torch.bfloat16):
        good = randn(*shapes, seed=1, dtype=dtype)
        region, memory = middle(name, good), [{}, {}]
        region.oracle(good, memory)
        known = [dict(state) for state in memory]
        directions = [torch.full_like(g, BAD[bad]) for g in good]
        if not everywhere and bad != "zero":
            directions = randn(*shapes, seed=2, dtype=dtype)
            directions[1].view(-1)[3] = BAD[bad]
        oracle = region.oracle(directions, memory)
        assert not oracle.is_valid
        if everywhere or bad == "zero":
            assert all(a[key] is b[key] for a, b in zip(memory, known, strict=True) for key in a.keys() | b.keys())
        assert all(torch.equal(v, torch.zeros_like(v)) for v in region.lmo(directions))
        weights = randn(*shapes, seed=3, dtype=dtype)
        before = [w.clone() for w in weights]
        for i, weight in enumerate(weights):
            oracle.move_(weight, i, torch.tensor(0.0))
        assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
        oracle = region.oracle(good, memory)
        assert oracle.is_valid
        assert oracle.dual.item() == pytest.approx(dual(region, good), rel=5e-3)
        assert all(oracle.vertex(i).isfinite().all() for i in range(2))


@several
@pytest.mark.parametrize("scale", [1e-25, 1e18])
@pytest.mark.parametrize("keeps", [False, True])
def test_tiny_and_huge_directions(name, scale, keeps):
    shapes = [(40, 48), (6, 2, 3, 3)]
    directions = [g * scale for g in randn(*shapes, seed=1, dtype=torch.float32)]
    for region in regions(name, directions):
        memory = [{}, {}] if keeps else None
        for _ in range(2 if keeps else 1):
            oracle = region.oracle(directions, memory)
        assert oracle.is_valid
        assert not keeps or memory[0].get("age", 1) == 1  # what is kept was of use
        vertex = [oracle.vertex(i) for i in range(2)]
        assert inner(directions, vertex) == pytest.approx(
            -RADIUS * dual(region, directions), rel=2e-2 if keeps else 1e-5, abs=0
        )
        assert gauge(region, vertex) <= RADIUS * (1 + 1e-5)
        weights = [torch.ones(shape) for shape in shapes]
        for i, weight in enumerate(weights):
            oracle.move_(weight, i, torch.tensor(1.0))
            assert torch.allclose(weight, vertex[i], atol=1e-6)


@several
def test_the_smallest_direction_that_counts(name):
    """A radius over its dual norm is more than a float32 can hold."""
    g = randn((6, 5), seed=1, dtype=torch.float32)[0] * 2e-36
    g[2] = 0
    region = type(middle(name, [g]))(**middle(name, [g]).options, radius=1e6)
    oracle = region.oracle([g])
    assert oracle.is_valid
    weight = torch.ones(6, 5)
    oracle.move_(weight, 0, torch.tensor(0.5))
    assert weight.isfinite().all()
    assert gauge(region, [oracle.vertex(0)]) <= 1e6 * (1 + 1e-4)


@several
def test_a_zero_weight_with_a_zero_gradient_stays_zero(name):
    """Rows: what a filter is, and what singular vectors cannot mix."""
    (g,) = randn((8, 10), seed=1)
    g[3] = 0
    for region in regions(name, [g])[:-1] or regions(name, [g]):
        assert torch.equal(region.lmo([g])[0][3].abs() > 1e-15, torch.zeros(10, dtype=torch.bool))


@several
def test_frank_wolfe_finds_the_nearest_point(name):
    """min |w - target|^2 with the step 2 / (t + 2): the gap <gradient, w - v> goes to zero, and bounds the rest."""
    (target,) = [3 * t for t in randn((6, 8), seed=1)]
    region = middle(name, [target])
    weight, gaps = torch.zeros(6, 8, dtype=torch.float64), []
    for step in range(400):
        direction = weight - target
        oracle = region.oracle([direction])
        gaps.append(oracle.inner([weight]).item() + RADIUS * oracle.dual.item())
        oracle.move_(weight, 0, torch.tensor(2 / (step + 2), dtype=torch.float64))
    assert min(gaps) >= -1e-9
    # Jaggi, ICML 2013, theorem 2: at most 2 * 2.56 * D^2 / (T + 2) is reached.
    assert min(gaps) <= 2 * 2.56 * region.diameter([target]).item() ** 2 / 402
    assert region.gauge([weight]) <= RADIUS * (1 + 1e-9)
