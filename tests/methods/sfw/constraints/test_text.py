"""Constraints as text and as sizes: what is written parses back, what is wrong is named, radii are what they say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_compress.methods.sfw.constraints import (
    GroupKSupportBall,
    KSparsePolytope,
    KSupportBall,
    LpBall,
    NuclearBall,
    SpectralKSparsePolytope,
    SpectralKSupportBall,
    parse_constraint,
)
from tests.methods.sfw.constraints.mathematics import NAMES, WITH_K, middle, norm, randn

POSITIVE = st.floats(1e-30, 1e30)
SIZES = st.one_of(
    POSITIVE.map(lambda x: {"radius": x}),
    POSITIVE.map(lambda x: {"diameter": x}),
    st.integers(1, 10**6).map(lambda x: {"radius": x}),
    POSITIVE.map(lambda x: {"radius": f"init:{x}"}),
    POSITIVE.map(lambda x: {"radius": f"weights:{x}"}),
)
COUNTS = st.one_of(st.integers(1, 10**9), st.floats(1e-9, 1.0))
AXES = st.one_of(st.integers(0, 5), st.lists(st.integers(0, 5), min_size=1, max_size=6))
BLOCKS = st.one_of(st.integers(1, 5), st.lists(st.integers(1, 5), min_size=1, max_size=6))
GROUPS = st.one_of(st.none(), st.integers(1, 5000))
POWERS = st.one_of(st.just(math.inf), st.integers(1, 9), st.floats(1, 1e6))


@st.composite
def constraints(draw):
    kind = draw(st.sampled_from([LpBall, NuclearBall, *WITH_K.values()]))
    arguments = draw(SIZES)
    if kind is LpBall:
        arguments |= {"p": draw(POWERS)}
    elif kind is not NuclearBall:
        arguments |= {"k": draw(COUNTS)}
    if kind is GroupKSupportBall:
        arguments |= {"axes": draw(AXES), "groups": draw(GROUPS), "blocks": draw(BLOCKS)}
    return kind(**arguments)


@given(constraints())
def test_what_is_written_parses_back(constraint):
    again = parse_constraint(str(constraint))
    assert type(again) is type(constraint)
    assert again == constraint
    assert hash(again) == hash(constraint)
    assert again.options == constraint.options
    assert (again.size.kind, again.size.value) == (constraint.size.kind, constraint.size.value)
    assert parse_constraint(again) is again


@given(constraints(), constraints())
def test_different_constraints_differ_in_text(a, b):
    same = type(a) is type(b) and a.options == b.options and a.size == b.size
    assert (a == b) == same
    assert (str(a) == str(b)) == same


@pytest.mark.parametrize(
    ("text", "constraint"),
    [
        ("l1(radius=2)", LpBall(1, 2)),
        (" l2 ( diameter = 3 ) ", LpBall(2, diameter=3)),
        ("linf(radius=0.5)", LpBall(math.inf, 0.5)),
        ("lp(p=inf, radius=0.5)", LpBall(math.inf, 0.5)),
        ("lp(p=1.5,radius=1e-3)", LpBall(1.5, 1e-3)),
        ("k_sparse(k=21, radius=0.25)", KSparsePolytope(21, 0.25)),
        ("k_support(k=0.1, radius=init:15)", KSupportBall(0.1, "init:15")),
        ("k_support(radius=init:1.5e+2, k=1.0)", KSupportBall(1.0, "init:150")),
        ("group_k_support(k=3, radius=2)", GroupKSupportBall(3, 2.0, axes=0)),
        (
            "group_k_support(k=0.1, axes=0 0 0 1, groups=12, radius=init:15)",
            GroupKSupportBall(0.1, "init:15", axes=(0, 0, 0, 1), groups=12),
        ),
        (
            "group_k_support(k=3, axes=0 1, groups=12, blocks=3 1, radius=2)",
            GroupKSupportBall(3, 2, axes=(0, 1), groups=12, blocks=(3, 1)),
        ),
        ("group_k_support(k=3, groups=12, radius=2)", GroupKSupportBall(3, 2, groups=12, blocks="1 1 1")),
        ("nuclear(radius=weights:1)", NuclearBall("weights:1")),
        ("spectral_k_sparse(k=1, radius=2)", SpectralKSparsePolytope(1, 2)),
        ("spectral_k_support(k=0.3, diameter=2)", SpectralKSupportBall(0.3, diameter=2)),
    ],
)
def test_texts(text, constraint):
    assert parse_constraint(text) == constraint


def test_defaults_fill_what_a_text_leaves_open():
    assert parse_constraint("k_sparse", k=0.05, radius="init:15") == KSparsePolytope(0.05, "init:15")
    assert parse_constraint("k_sparse(k=3)", k=0.05, radius=2) == KSparsePolytope(3, 2)
    assert parse_constraint("l2(diameter=3)", k=0.05, radius=2) == LpBall(2, diameter=3)
    assert parse_constraint("nuclear", k=0.05, radius=2, groups=3) == NuclearBall(2)
    assert parse_constraint("k_sparse(k=3, radius=1)", k=None, diameter=4) == KSparsePolytope(3, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "ksparse(k=3)",
            "'ksparse.* is no constraint; there are l1, l2, linf, lp, k_sparse, k_support, group_k_support, ",
        ),
        ("", "is no constraint"),
        ("k_sparse(k=3", "is no constraint"),
        (3, "3 is no constraint"),
        (None, "None is no constraint"),
        ("k_sparse(k=3, radius=1, groups=2)", "k_sparse has no argument 'groups'; it takes k, radius, diameter"),
        ("nuclear(k=3, radius=1)", "nuclear has no argument 'k'; it takes radius, diameter"),
        ("k_sparse(3, radius=1)", "'3' is no argument"),
        ("k_sparse(k=3, k=4, radius=1)", "'k=4' is no argument, or stands there twice"),
        ("l1(p=2, radius=1)", "'p=2' is no argument, or stands there twice"),
        ("k_sparse(radius=1)", "lacks an argument; k_sparse takes k, radius, diameter"),
        ("group_k_support(k=1, axes=0, 1, radius=2)", "'1' is no argument"),
        ("group_k_support(k=1, axes=x, radius=2)", "axes must be the dimension"),
        ("k_sparse(k=[3], radius=1)", "k must be a whole number"),
        ("k_sparse(k=3)", "takes either radius .* or diameter, got None and None"),
        ("k_sparse(k=3, radius=1, diameter=1)", "takes either radius .* or diameter"),
        ("l2(radius=init)", "radius must be a positive number"),
        ("l2(radius=start:3)", "radius must be a positive number"),
        ("l2(radius=init:x)", "radius must be a positive number"),
        ("l2(radius=init:0)", "radius must be a positive number"),
        ("l2(diameter=init:3)", "diameter must be a positive number"),
    ],
)
def test_texts_that_mean_nothing(text, message):
    with pytest.raises(ValueError, match=message):
        parse_constraint(text)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "radius", [0, -1.0, math.nan, math.inf, True, "init:-1", "init:nan", "init:1e999", "weights:", "-3"]
)
def test_radii_that_are_none(name, radius):
    options = middle(name, randn((4, 5))).options
    with pytest.raises(ValueError, match="radius must be a positive number"):
        type(middle(name, randn((4, 5))))(**options, radius=radius)
    with pytest.raises(ValueError, match="diameter must be a positive number"):
        type(middle(name, randn((4, 5))))(**options, diameter=radius)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_multiples_of_the_largest_norm_inside(name):
    """init and weights speak of the norm of the farthest point of the ball, half of the diameter."""
    weights = randn((6, 9), (5, 2, 3, 3), seed=1)
    expected = math.sqrt(6 / 3 + 5 / 3)
    for size, half in (
        ({"diameter": 4.0}, 2.0),
        ({"radius": "init:3"}, 3 * expected),
        ({"radius": "weights:0.5"}, 0.5 * norm(weights)),
    ):
        fixed = middle(name, weights)
        region = type(fixed)(**fixed.options, **size)
        assert region.diameter(weights).item() == pytest.approx(2 * half)
        resolved = region.resolved(weights)
        assert resolved.size.kind == "radius"
        assert resolved.radius_of([w * 7 for w in weights]) == pytest.approx(region.radius_of(weights))
        assert parse_constraint(str(resolved)) == resolved


DEFAULTS = {
    "linear": lambda: nn.Linear(300, 48),
    "wide linear": lambda: nn.Linear(40, 500),
    "conv": lambda: nn.Conv2d(32, 96, 3),
    "grouped conv": lambda: nn.Conv2d(64, 64, 5, groups=16),
    "conv1d": lambda: nn.Conv1d(20, 70, 7),
}


@pytest.mark.parametrize("make", DEFAULTS.values(), ids=DEFAULTS)
def test_init_is_the_norm_of_torchs_default_initialisation(make):
    torch.manual_seed(0)
    measured = sum(make().weight.norm().item() for _ in range(20)) / 20
    weight = make().weight
    before, state = weight.detach().clone(), torch.get_rng_state()
    assert LpBall(2, "init:1").radius_of([weight]) == pytest.approx(measured, rel=0.03)
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_init_of_several_weights_adds_squares():
    torch.manual_seed(0)
    makes = list(DEFAULTS.values())
    measured = sum(norm([make().weight.detach() for make in makes]) for _ in range(10)) / 10
    assert LpBall(2, "init:1").radius_of([make().weight for make in makes]) == pytest.approx(measured, rel=0.03)


def test_init_of_a_norm_layer():
    assert LpBall(2, "init:2").radius_of([nn.LayerNorm(64).weight]) == pytest.approx(16)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_zero_are_no_measure(name):
    weights = [torch.zeros(4, 5)]
    fixed = middle(name, weights)
    with pytest.raises(
        ValueError, match="multiple of the norm of the weights, which is 0.0; give a number or init:VALUE"
    ):
        type(fixed)(**fixed.options, radius="weights:2").resolved(weights)


def test_a_resolved_region_has_been_checked():
    with pytest.raises(ValueError, match="keeps 21 entries"):
        KSparsePolytope(21, 1.0).resolved(randn((4, 5)))
    with pytest.raises(ValueError, match="keeps 5 singular values, but the matrices that it covers have 4"):
        SpectralKSupportBall(5, 1.0).resolved(randn((4, 5)))


def test_a_region_is_used_as_it_was_made():
    """Nothing of one use is left for the next."""
    region, small, large = KSparsePolytope(0.5, "init:3"), randn((4, 5)), randn((40, 50))
    before = region.radius_of(small)
    region.lmo(large)
    region.resolved(large)
    assert region.radius_of(small) == before != region.radius_of(large)
    assert str(region) == "k_sparse(k=0.5, radius=init:3)"
