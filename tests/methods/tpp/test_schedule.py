"""Strengths against the published formula, e-folds against their sum, and layers that become zero in turn."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_compress.methods.tpp import GrowingSchedule
from hf_compress.methods.tpp.schedule import PROFILES


def test_the_published_profile():
    """delta 1e-4 every 10 steps up to 1, which takes 100,000 steps; then 10,000."""
    schedule = GrowingSchedule(**PROFILES["paper"], num_layers=57)
    for step in (0, 9, 10, 19, 20, 12_345, 99_999):
        assert schedule.strength(step) == pytest.approx(1e-4 * (step // 10 * 10) / 10)
    assert schedule.strength(100_000) == schedule.strength(109_999) == 1
    assert schedule.steps == 110_000
    assert schedule.e_folds(1e-2) == pytest.approx(500 + 100, rel=1e-3)
    assert not schedule.is_zeroed(0, 100_099)
    assert schedule.is_zeroed(0, 100_100)
    assert not schedule.is_zeroed(56, 105_699)
    assert schedule.is_zeroed(56, 105_700)


def test_the_short_profile_shrinks_by_20_e_folds():
    assert GrowingSchedule(**PROFILES["short"]).e_folds(1e-2) == pytest.approx(20, rel=0.01)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 7), st.floats(0, 10), st.integers(1, 9))
def test_it_grows_to_the_ceiling_and_zeroes_every_layer(grow, stabilize, every, ceiling, layers):
    schedule = GrowingSchedule(grow, stabilize, every, ceiling, num_layers=layers)
    strengths = [schedule.strength(step) for step in range(grow + stabilize + 1)]
    assert strengths == sorted(strengths)
    assert strengths[grow] == ceiling
    assert math.isclose(schedule.e_folds(0.5), 0.5 * sum(strengths[:-1]), abs_tol=1e-9)
    first = [next((s for s in range(schedule.steps) if schedule.is_zeroed(i, s)), None) for i in range(layers)]
    if stabilize > 1:
        assert None not in first
        assert grow < first[0] <= first[-1] <= grow + math.ceil(stabilize / 2)
    if not stabilize:
        assert set(first) == {None}
