"""Several balls answered at once, as on accelerators and shards, against each of them by itself."""

from __future__ import annotations

import pytest
import torch

from hf_compress.methods.sfw.constraints import KSparsePolytope, KSupportBall

SHAPES = [[(8, 5)], [(7,), (3, 4, 2)], [(16, 4)]]
KINDS = [KSparsePolytope, KSupportBall]


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for shape in ball] for ball in SHAPES]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ties", [False, True])
def test_several_balls_equal_each_by_itself(kind, ties):
    directions, weights = tensors(0), tensors(1)
    if ties:
        directions = [[(2 * g).round() for g in ball] for ball in directions]
    balls = [kind(k, radius) for k, radius in ((0.2, 1.0), (5, 0.3), (0.1, 7.0))]
    oracle, share = kind.oracle_together(balls, directions), torch.tensor([0.25, 0.5, 0.0], dtype=torch.float64)
    moved = [w.clone() for ball in weights for w in ball]
    oracle.move_all_(moved, share)
    flat, start = [w for ball in weights for w in ball], 0
    for i, (ball, group) in enumerate(zip(balls, directions, strict=True)):
        alone, own = ball.oracle(group), weights[i]
        for found, wanted in (
            (oracle.dual[i], alone.dual),
            (oracle.norm()[i], alone.norm()),
            (oracle.inner(flat)[i], alone.inner(own)),
            (oracle.squared_distance(flat)[i], alone.squared_distance(own)),
        ):
            assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
        for j, weight in enumerate(own):
            torch.testing.assert_close(oracle.vertex(start + j), alone.vertex(j))
            wanted = torch.lerp(weight, alone.vertex(j), float(share[i]))
            torch.testing.assert_close(moved[start + j], wanted)
        start += len(group)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 0.0])
def test_a_direction_without_vertex_stops_its_own_ball_alone(kind, broken):
    directions, weights = tensors(0), tensors(1)
    directions[1][0][:] = 0
    directions[1][1][:] = 0
    directions[1][0][2] = broken
    oracle = kind.oracle_together([kind(2, 1.0)] * 3, directions)
    assert oracle.is_valid.tolist() == [True, False, True]
    moved = [w.clone() for ball in weights for w in ball]
    oracle.move_all_(moved, torch.full((3,), 0.5, dtype=torch.float64) * oracle.is_valid)
    assert [torch.equal(a, b) for a, b in zip(moved, [w for ball in weights for w in ball], strict=True)] == [
        False,
        True,
        True,
        False,
    ]
