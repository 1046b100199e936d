"""Groups: filters, rows, columns, neurons of two layers, heads of four weights; ties; what does not fit."""

from __future__ import annotations

import pytest
import torch

from hf_compress.methods.sfw.constraints import GroupKSupportBall, KSupportBall
from tests.methods.sfw.constraints.mathematics import RADIUS, dual, gauge, inner, randn, values

CASES = {
    "filters": ({}, [(9, 4, 3, 3)]),
    "filters of several weights": ({}, [(9, 4, 3, 3), (6, 9), (5,)]),
    "columns": ({"axes": 1}, [(7, 10)]),
    "input channels": ({"axes": 1}, [(7, 10, 3, 3), (5, 10)]),
    "rows and columns": ({"axes": (0, 1)}, [(8, 5), (6, 4)]),
    "neurons": ({"axes": (0, 0, 1), "groups": 12}, [(12, 5), (12,), (7, 12)]),
    "heads": ({"axes": "0 0 0 1", "groups": 4}, [(8, 6), (8, 6), (4, 6), (6, 8)]),
    "one weight in parts": ({"groups": 3}, [(9, 4)]),
    "the last dimension": ({"axes": 3, "groups": 5}, [(2, 3, 2, 10)]),
    "heads of a fused weight": ({"axes": (0, 1), "groups": 4, "blocks": (3, 1)}, [(24, 5), (7, 8)]),
    "heads of a fused Conv1D": ({"axes": "1 0", "groups": 4, "blocks": "3 1"}, [(5, 24), (8, 7)]),
    "query beside key and value": ({"axes": "1 1 0", "groups": 3, "blocks": "1 2 1"}, [(5, 6), (4, 12), (6, 5)]),
    "neurons of a fused gate": ({"axes": (0, 1), "groups": 6, "blocks": (2, 1)}, [(12, 5), (4, 6)]),
    "blocks of rows": ({"blocks": 2}, [(8, 3), (12,)]),
}
in_cases = pytest.mark.parametrize(("options", "shapes"), CASES.values(), ids=CASES)


@in_cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_support_identity_and_moves(options, shapes, dtype):
    error = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    directions, weights = (randn(*shapes, seed=seed, dtype=dtype) for seed in (1, 2))
    total = len(values(GroupKSupportBall(1, RADIUS, **options), directions))
    for k in {1, 2, total // 2, total}:
        region = GroupKSupportBall(k, RADIUS, **options)
        vertex = region.lmo(directions)
        assert inner(directions, vertex) == pytest.approx(-RADIUS * dual(region, directions), rel=error)
        assert gauge(region, vertex) <= RADIUS * (1 + (1e-5 if error < 1e-2 else error))
        assert (values(region, vertex) > 0).sum() == k
        assert region.gauge(weights).item() == pytest.approx(gauge(region, weights), rel=1e-6)
        oracle, moved = region.oracle(directions), [w.clone() for w in weights]
        gap = [v.double() - w.double() for v, w in zip(vertex, weights, strict=True)]
        assert oracle.squared_distance(weights).item() == pytest.approx(inner(gap, gap), rel=error)
        for i, weight in enumerate(moved):
            oracle.move_(weight, i, torch.tensor(0.25))
            assert torch.allclose(weight.double(), weights[i].double() + gap[i] / 4, atol=error, rtol=error)


def test_coupled_weights_are_one_weight():
    """Neurons of two layers are the rows of [first | second transposed]."""
    first, second = randn((12, 5), (7, 12), seed=3)
    joined = torch.cat([first, second.T], dim=1)
    coupled = GroupKSupportBall(4, RADIUS, axes=(0, 1), groups=12)
    whole = GroupKSupportBall(4, RADIUS)
    a, b = coupled.lmo([first, second])
    assert torch.allclose(torch.cat([a, b.T], dim=1), whole.lmo([joined])[0], atol=1e-14)
    assert coupled.gauge([first, second]).item() == pytest.approx(whole.gauge([joined]).item())


def test_heads_are_blocks_of_rows_and_columns():
    query, output = randn((8, 6), (6, 8), seed=4)
    query[2:4] *= 10  # head 1 of 4
    a, b = GroupKSupportBall(1, RADIUS, axes=(0, 1), groups=4).lmo([query, output])
    assert a.abs().sum(1).nonzero().flatten().tolist() == [2, 3]
    assert b.abs().sum(0).nonzero().flatten().tolist() == [2, 3]


def test_a_fused_weight_is_its_blocks():
    """Query, key and value in one weight are as good as in three, in rows and in columns."""
    query, key, value, output = randn((8, 6), (8, 6), (8, 6), (6, 8), seed=7)
    apart = GroupKSupportBall(2, RADIUS, axes=(0, 0, 0, 1), groups=4)
    *parts, wanted = apart.lmo([query, key, value, output])
    fused = torch.cat([query, key, value])
    for axis, weight in ((0, fused), (1, fused.T.contiguous())):
        region = GroupKSupportBall(2, RADIUS, axes=(axis, 1), groups=4, blocks=(3, 1))
        vertex, other = region.lmo([weight, output])
        assert torch.allclose(vertex if axis == 0 else vertex.T, torch.cat(parts), atol=1e-14)
        assert torch.allclose(other, wanted, atol=1e-14)
        assert region.gauge([weight, output]).item() == pytest.approx(apart.gauge([query, key, value, output]).item())
        wrong = GroupKSupportBall(2, RADIUS, axes=(axis, 1), groups=4)  # a head is no quarter of the fused weight
        assert not torch.equal(wrong.lmo([weight, output])[0] != 0, vertex != 0)


def test_uncoupled_parts_would_choose_otherwise():
    """The negative control: alone, the output picks other heads than the query."""
    query, output = randn((8, 6), (6, 8), seed=4)
    query[2:4] *= 10
    output[:, 6:] *= 5
    coupled = GroupKSupportBall(1, RADIUS, axes=(0, 1), groups=4).lmo([query, output])[1]
    alone = GroupKSupportBall(1, RADIUS, axes=1, groups=4).lmo([output])[0]
    assert not torch.equal(coupled != 0, alone != 0)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("axis", [0, 1])
def test_equal_filters_share_what_is_left(k, dtype, axis):
    """`>= threshold` keeps all four and leaves the ball, as the published code does."""
    rows = randn((1, 7), seed=1, dtype=dtype)[0].repeat(5, 1)
    rows[4] *= 0.5
    g = rows if axis == 0 else rows.T.contiguous()
    region = GroupKSupportBall(k, RADIUS, axes=axis)
    (vertex,) = region.lmo([g])
    assert inner([g], [vertex]) == pytest.approx(-RADIUS * dual(region, [g]), rel=1e-6)
    assert gauge(region, [vertex]) <= RADIUS * (1 + 1e-6)
    parts = vertex if axis == 0 else vertex.T
    assert all(torch.equal(parts[0], part) for part in parts[1:4])
    assert (parts[4] == 0).all()
    everything = -RADIUS * rows[:4] / rows[:4].norm() * (4 / k) ** 0.5 * (k / 4)
    assert torch.allclose(parts[:4], everything, rtol=1e-5)


def test_a_group_of_zeros_stays_zero_also_where_it_ties():
    g = torch.zeros(4, 3)
    g[1] = 2.0
    vertex = GroupKSupportBall(3, RADIUS).lmo([g])[0]
    assert vertex.isfinite().all()
    assert vertex.norm(dim=1).tolist() == pytest.approx([0, RADIUS, 0, 0])


def test_many_rows_and_long_ones():
    """More than one piece of a tensor; norms of 50,000 numbers each."""
    for shape, axis in (((3000, 90), 0), ((3000, 90), 1), ((5, 50_000), 0)):
        g = randn(shape, seed=2, dtype=torch.float32)
        region = GroupKSupportBall(0.3, RADIUS, axes=axis)
        assert region.dual_norm(g).item() == pytest.approx(dual(region, g), rel=1e-6)
        assert inner(g, region.lmo(g)) == pytest.approx(-RADIUS * dual(region, g), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e18])
@pytest.mark.parametrize("axis", [0, 1])
def test_norms_whose_squares_no_float32_can_hold(scale, axis):
    g = [scale * x for x in randn((40, 30), seed=3, dtype=torch.float32)]
    region = GroupKSupportBall(7, RADIUS, axes=axis)
    assert region.dual_norm(g).item() == pytest.approx(dual(region, g), rel=1e-6, abs=0)
    assert gauge(region, region.lmo(g)) == pytest.approx(RADIUS, rel=1e-5)


def test_rows_of_very_different_size():
    g = randn((6, 8), seed=5, dtype=torch.float32)[0] * torch.logspace(-30, 10, 6)[:, None]
    for k in (1, 3, 6):
        vertex = GroupKSupportBall(k, RADIUS).lmo([g])
        assert gauge(GroupKSupportBall(k, RADIUS), vertex) == pytest.approx(RADIUS, rel=1e-5)


def test_a_share_counts_groups():
    weights = randn((10, 4), (6, 3))
    assert GroupKSupportBall(0.25, 1.0).count(weights) == 4
    assert GroupKSupportBall(0.25, 1.0, groups=2).count(weights) == 1
    assert GroupKSupportBall(0.25, 1.0, blocks=2).count(weights) == 2
    assert KSupportBall(0.25, 1.0).count(weights) == 14


@pytest.mark.parametrize(
    ("options", "shapes", "message"),
    [
        ({"k": 5}, [(4, 3)], "keeps 5 groups, but the tensors that it covers have 4"),
        ({"k": 4, "groups": 3}, [(6, 2), (3, 2)], "keeps 4 groups, but the tensors that it covers have 3"),
        ({"k": 1, "axes": 2}, [(4, 3)], r"along dimension 2 of a weight of shape \(4, 3\)"),
        ({"k": 1, "axes": 0}, [()], r"along dimension 0 of a weight of shape \(\)"),
        ({"k": 1, "axes": (0, 1)}, [(4, 3)], "has 2 axes, one for each tensor, but covers 1 tensors"),
        ({"k": 1, "axes": (0, 1), "groups": 3}, [(6, 2), (3, 4)], "4 is no multiple of 3"),
        ({"k": 1, "groups": 4, "blocks": 3}, [(8, 2)], "8 is no multiple of 12"),
        ({"k": 1, "blocks": 2}, [(7, 2)], "7 is no multiple of 2"),
        ({"k": 4, "blocks": 2}, [(6, 2)], "keeps 4 groups, but the tensors that it covers have 3"),
        ({"k": 1, "blocks": (2, 1)}, [(4, 3)], "has 2 blocks, one for each tensor, but covers 1 tensors"),
    ],
)
def test_weights_that_do_not_fit(options, shapes, message):
    region = GroupKSupportBall(radius=1.0, **options)
    for use in (region.check, region.lmo, region.gauge, region.resolved):
        with pytest.raises(ValueError, match=message):
            use(randn(*shapes))


@pytest.mark.parametrize("axes", [-1, True, 0.5, None, "", "a", "0,1", (0, -1), (0, 1.5), ()])
def test_axes_that_are_none(axes):
    with pytest.raises(ValueError, match="axes must be the dimension along which groups lie"):
        GroupKSupportBall(1, 1.0, axes=axes)


@pytest.mark.parametrize("blocks", [0, -1, True, 1.5, None, "", "a", "3,1", (3, 0), (1, 1.5), ()])
def test_blocks_that_are_none(blocks):
    with pytest.raises(ValueError, match="blocks must be how many layers lie one after the other"):
        GroupKSupportBall(1, 1.0, blocks=blocks)


@pytest.mark.parametrize("groups", [0, -2, 1.5, True, "3"])
def test_groups_that_are_no_number(groups):
    with pytest.raises(ValueError, match="groups must be a whole number of at least 1, or None"):
        GroupKSupportBall(1, 1.0, groups=groups)
