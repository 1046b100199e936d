"""Singular values: the warm subspace against the exact one, matrices of hard spectra, unions, what a step computes."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_compress.methods.sfw.constraints import (
    GroupKSupportBall,
    NuclearBall,
    SpectralKSparsePolytope,
    SpectralKSupportBall,
)
from tests.methods.sfw.constraints.mathematics import RADIUS, dual, gauge, inner, norm, randn

REGIONS = [NuclearBall(RADIUS), SpectralKSparsePolytope(0.1, RADIUS), SpectralKSupportBall(0.1, RADIUS)]
each = pytest.mark.parametrize("region", REGIONS, ids=lambda region: region.name)


def turning(start, towards, degrees, steps):
    """Matrices that turn in the plane of two others."""
    towards = towards - inner([start], [towards]) / inner([start], [start]) * start
    towards *= start.norm() / towards.norm()
    angles = [math.radians(degrees * step) for step in range(steps)]
    return [math.cos(angle) * start + math.sin(angle) * towards for angle in angles]


def decaying(shape, power, seed):
    """A matrix with the singular values 1 / i^power."""
    (noise,) = randn(shape, seed=seed)
    left, _, right = torch.linalg.svd(noise, full_matrices=False)
    return ((left * torch.arange(1, min(shape) + 1) ** -float(power)) @ right).float()


def followed(region, sequence):
    """Value of the vertex as a share of the best, at every step, and what is kept."""
    memory, qualities = [{}], []
    for step, matrix in enumerate(sequence):
        oracle = region.oracle([matrix], memory)
        vertex = oracle.vertex(0)
        qualities.append(-inner([matrix], [vertex]) / RADIUS / dual(region, [matrix]))
        assert oracle.dual.item() == pytest.approx(-inner([matrix], [vertex]) / RADIUS, rel=1e-5)
        if step % 10 == 9:
            assert gauge(region, [vertex]) <= RADIUS * (1 + 1e-5)
    assert max(qualities) <= 1 + 1e-6
    return qualities, memory[0]


@each
@pytest.mark.parametrize("shape", [(64, 576), (512, 512)])
def test_a_warm_subspace_follows_a_matrix_that_turns(region, shape):
    a, b = randn(shape, shape, seed=1, dtype=torch.float32)
    qualities, memory = followed(region, turning(a, b, degrees=1, steps=50))
    assert min(qualities) >= 0.98
    assert memory["age"] == 49  # never exact after the first step
    assert memory["basis"].numel() <= 0.15 * a.numel()


@each
def test_a_subspace_that_is_not_followed_falls_behind(region):
    """The negative control of the test above."""
    a, b = randn((64, 576), (64, 576), seed=1, dtype=torch.float32)
    matrices, memory = turning(a, b, degrees=1, steps=50), [{}]
    region.oracle(matrices[:1], memory)
    frozen = memory[0]["basis"]
    rows = [torch.linalg.svdvals(frozen.T @ matrix).sort(descending=True).values for matrix in matrices]
    count = 1 if region.name == "nuclear" else 6
    norms = [s[:count].sum() if region.name.endswith("sparse") else s[:count].norm() for s in rows]
    qualities = [n.item() / dual(region, [matrix]) for n, matrix in zip(norms, matrices, strict=True)]
    assert qualities[0] == pytest.approx(1, rel=1e-5)
    assert min(qualities) < 0.98


@each
def test_fast_turns(region):
    a, b = randn((96, 128), (96, 128), seed=1, dtype=torch.float32)
    for degrees in (5, 20):
        assert min(followed(region, turning(a, b, degrees, steps=20))[0]) >= 0.98


@each
def test_a_new_direction_at_every_step(region):
    """Momentum of gradients that have nothing in common: the newest one leads."""
    matrix, sequence = decaying((64, 576), 1, seed=0), []
    for step in range(25):
        sequence.append(matrix)
        matrix = 0.94 * matrix + 0.34 * decaying((64, 576), 1, seed=step + 1)
    assert min(followed(region, sequence)[0]) >= 0.98


@each
def test_what_is_orthogonal_to_all_that_is_known_is_found(region):
    """Two blocks without a row or a column in common: no power step leads from one to the other."""
    a, b = torch.zeros(64, 576), torch.zeros(64, 576)
    a[:20, :30], b[30:60, 100:200] = randn((20, 30), (30, 100), seed=2, dtype=torch.float32)
    assert min(followed(region, turning(a, b, degrees=1, steps=90))[0]) >= 0.98


@each
def test_a_jump_is_computed_exactly(region):
    jumps = randn(*[(96, 128)] * 4, seed=3, dtype=torch.float32)
    qualities, _ = followed(region, jumps)
    assert min(qualities) >= 0.98


@each
def test_after_100_steps_the_subspace_is_computed_again(region):
    matrix, memory = torch.zeros(40, 60), [{}]
    matrix[0] = randn((60,), seed=1, dtype=torch.float32)[0]
    ages = []
    for _ in range(205):
        region.oracle([matrix], memory)
        ages.append(memory[0]["age"].item())
    assert max(ages) == 99
    assert [step for step, age in enumerate(ages) if age == 0] == [0, 100, 200]


@each
@pytest.mark.parametrize("shape", [(64, 24, 3, 3), (576, 64)])
def test_other_shapes_are_followed_too(region, shape):
    matrices = randn(shape, shape, seed=1, dtype=torch.float32)
    memory = [{}]
    for step in range(30):
        angle = math.radians(step)
        g = math.cos(angle) * matrices[0] + math.sin(angle) * matrices[1]
        oracle = region.oracle([g], memory)
        assert oracle.dual.item() >= 0.98 * dual(region, [g])
        assert oracle.vertex(0).shape == g.shape
    assert memory[0]["age"] == 29


@each
def test_memory_survives_a_checkpoint_bit_for_bit(region):
    matrices = randn(*[(64, 80)] * 12, seed=4, dtype=torch.float32)
    directions = [sum(matrices[i : i + 6]) for i in range(6)]
    memory, file = [{}], io.BytesIO()
    for g in directions[:3]:
        region.oracle([g], memory)
    torch.save(memory, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for g in directions[3:]:
        kept, resumed = region.oracle([g], memory), region.oracle([g], loaded)
        assert torch.equal(kept.vertex(0), resumed.vertex(0))
    assert all(isinstance(value, torch.Tensor) for value in memory[0].values())


@each
def test_memory_that_does_not_fit_is_not_used(region):
    (g,) = randn((64, 80), seed=1, dtype=torch.float32)
    for basis in (torch.eye(64)[:, :5], torch.eye(80)[:, :14], torch.zeros(64, 14), torch.full((64, 14), math.nan)):
        oracle = region.oracle([g], [{"basis": basis, "age": torch.zeros(())}])
        assert oracle.dual.item() >= 0.98 * dual(region, [g])
        assert gauge(region, [oracle.vertex(0)]) <= RADIUS * (1 + 1e-5)


@each
def test_memory_in_the_type_of_half_a_weight(region):
    """torch casts the state of an optimizer to the type of the weight when it loads it."""
    (g,) = randn((64, 80), seed=1, dtype=torch.bfloat16)
    memory = [{}]
    region.oracle([g], memory)
    memory[0]["basis"] = memory[0]["basis"].bfloat16()
    memory[0]["age"] = memory[0]["age"].bfloat16()
    oracle = region.oracle([g], memory)
    assert oracle.dual.item() >= 0.98 * dual(region, [g])


def test_a_subspace_of_more_than_half_is_computed_exactly():
    (g,) = randn((64, 80), seed=1, dtype=torch.float32)
    for k, keeps in ((24, True), (25, False)):
        memory = [{}]
        SpectralKSupportBall(k, RADIUS).oracle([g], memory)
        assert bool(memory[0]) == keeps


@each
def test_without_memory_the_answer_depends_on_the_direction_alone(region):
    a, b = randn((64, 80), (64, 80), seed=1, dtype=torch.float32)
    first = region.lmo([a])[0]
    region.lmo([b])
    region.oracle([b], [{}])
    assert torch.equal(region.lmo([a])[0], first)


SPECTRA = {
    "a cluster": [1.0] * 20 + [0.5] * 20,
    "one": [1.0] + [0.0] * 39,
    "low rank": [1.0, 0.9, 0.8] + [0.0] * 37,
    "low rank and noise": [1.0, 0.9, 0.8] + [1e-9] * 37,
    "geometric": [10.0 ** (-i / 3) for i in range(40)],
    "a cliff": [1.0] * 6 + [1e-6] * 34,
    "orthogonal": [1.0] * 40,
}


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("keeps", [False, True])
def test_hard_spectra(spectrum, dtype, keeps):
    (noise,) = randn((40, 56), seed=1)
    left, _, right = torch.linalg.svd(noise, full_matrices=False)
    matrix = ((left * torch.tensor(spectrum, dtype=torch.float64)) @ right).to(dtype)
    for kind in (SpectralKSparsePolytope, SpectralKSupportBall):
        for k in (1, 2, 6, 20, 40):
            region, memory = kind(k, RADIUS), [{}]
            oracle = region.oracle([matrix], memory if keeps else None)
            oracle = region.oracle([matrix], memory) if keeps else oracle
            vertex = oracle.vertex(0)
            # What float64 cannot see beside the largest singular value adds up to 1e-7 of a sum.
            error = 1e-5 if dtype == torch.float32 else 1e-7
            assert inner([matrix], [vertex]) == pytest.approx(-RADIUS * dual(region, [matrix]), rel=error)
            assert gauge(region, [vertex]) <= RADIUS * (1 + 1e-5)
            assert torch.linalg.matrix_rank(vertex, rtol=1e-5) <= k


@each
def test_a_tall_matrix_is_a_wide_one_turned(region):
    (g,) = randn((30, 90), seed=1)
    assert torch.allclose(region.lmo([g.T.contiguous()])[0], region.lmo([g])[0].T, atol=1e-12)


@pytest.mark.parametrize("kind", [SpectralKSparsePolytope, SpectralKSupportBall])
@pytest.mark.parametrize("k", [1, 3, 5, 9])
def test_several_matrices_are_the_blocks_of_one(kind, k):
    a, b, c = randn((4, 6), (3, 2), (5,), seed=2)
    whole = torch.block_diag(a, b, c[:, None])
    region = kind(k, RADIUS)
    if k <= 7:
        parts = region.lmo([a, b, c])
        blocks = torch.block_diag(parts[0], parts[1], parts[2][:, None])
        assert torch.allclose(blocks, region.lmo([whole])[0], atol=1e-12)
        assert region.gauge([a, b, c]).item() == pytest.approx(gauge(region, [whole]))
    else:
        with pytest.raises(ValueError, match="keeps 9 singular values, but the matrices that it covers have 7"):
            region.lmo([a, b, c])


def test_several_matrices_keep_a_subspace_each():
    pairs = [randn((64, 80), (576, 64), seed=seed, dtype=torch.float32) for seed in (1, 2)]
    memory = [{}, {}]
    region = SpectralKSupportBall(5, RADIUS)
    for step in range(20):
        angle = math.radians(step)
        g = [math.cos(angle) * a + math.sin(angle) * b for a, b in zip(*pairs, strict=True)]
        assert region.oracle(g, memory).dual.item() >= 0.98 * dual(region, g)
    assert [state["age"].item() for state in memory] == [19, 19]


class Seen(TorchDispatchMode):
    """Names and sizes of everything that is computed."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.calls.append((func.overloadpacket.__name__, tensor.numel(), tensor.untyped_storage().data_ptr()))
        return result


@each
def test_no_step_decomposes_a_matrix(region):
    (g,) = randn((64, 576), seed=1, dtype=torch.float32)
    memory = [{}]
    with Seen() as first:
        region.oracle([g], memory)
    with Seen() as later:
        region.oracle([g], memory)
    names = {name for name, *_ in first.calls + later.calls}
    assert not any("svd" in name for name in names)
    assert "_linalg_eigh" in names
    largest = [max(size for name, size, _ in calls if name == "_linalg_eigh") for calls in (first.calls, later.calls)]
    assert largest[0] == 64 * 64
    assert largest[1] <= 14 * 14


@pytest.mark.parametrize("region", [*REGIONS, GroupKSupportBall(0.1, RADIUS)], ids=lambda region: region.name)
@pytest.mark.parametrize("shape", [(64, 576), (576, 64), (64, 64, 3, 3)])
def test_a_move_writes_the_weight_and_nothing_of_its_size(region, shape):
    g, weight = randn(shape, shape, seed=1, dtype=torch.float32)
    oracle = region.oracle([g], [{}])
    with Seen() as seen:
        oracle.move_(weight, 0, torch.tensor(0.1))
    own = weight.untyped_storage().data_ptr()
    assert max(size for _, size, storage in seen.calls if storage not in (own, g.untyped_storage().data_ptr())) <= (
        g.numel() / 8
    )


def test_the_nuclear_projection_thresholds_singular_values():
    (x,) = randn((6, 9), seed=1)
    left, values, right = np.linalg.svd(x.numpy(), full_matrices=False)
    y = x.clone()
    NuclearBall(RADIUS).project_([y])
    kept = np.linalg.svd(y.numpy(), compute_uv=False)
    cut = values - kept
    assert kept.sum() == pytest.approx(RADIUS)
    assert cut[kept > 1e-12] == pytest.approx(cut[0])
    assert np.allclose(y.numpy(), left * kept @ right, atol=1e-12)
    assert norm([x - y]) < norm([x - RADIUS / values.sum() * x])  # nearer than the radial point
