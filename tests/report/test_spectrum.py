"""Decay of singular values against a singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from hf_compress.report import spectrum
from hf_compress.report.spectrum import measure_spectrum


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


MATRICES = {
    "wide": randn(40, 90),
    "tall": randn(90, 40),
    "convolution": randn(16, 8, 3, 3),
    "depthwise": randn(24, 1, 3, 3),
    "decaying": randn(60, 80) * torch.arange(1, 81) ** -0.9,
    "rank 5": randn(60, 5) @ randn(5, 70),
    "orthogonal": torch.linalg.qr(randn(50, 50)).Q,
    "one row": randn(1, 30),
    "tiny": 1e-12 * randn(30, 30),
}


def oracle(weight):
    values = torch.linalg.svdvals(weight.reshape(weight.shape[0], -1).double())
    squares, shares = values.square(), values / values.sum()
    kept = {s: len(values) - int((1 - float(s)) * len(values)) for s in ("0.25", "0.5", "0.75")}
    return {
        "energy": {s: float(squares[:count].sum() / squares.sum()) for s, count in kept.items()},
        "stable_rank": float(squares.sum() / squares[0]),
        "effective_rank": float(torch.special.entr(shares).sum().exp()),
        "full_rank": len(values),
    }


@pytest.mark.parametrize("name", MATRICES)
def test_against_svd(name):
    weight = MATRICES[name]
    found, wanted = measure_spectrum(weight), oracle(weight)
    assert found.method == "gram64"
    assert found.energy == pytest.approx(wanted["energy"], abs=1e-9)
    assert found.stable_rank == pytest.approx(wanted["stable_rank"], rel=1e-9)
    assert found.effective_rank == pytest.approx(wanted["effective_rank"], rel=1e-4)  # zeros come out as 1e-8
    assert found.full_rank == wanted["full_rank"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    weight = MATRICES["wide"].to(dtype)
    assert measure_spectrum(weight).energy == pytest.approx(oracle(weight)["energy"], abs=1e-9)


def test_larger_layers_in_single_precision(monkeypatch):
    monkeypatch.setattr(spectrum, "_EXACT64", 10)
    for name, weight in MATRICES.items():
        found = measure_spectrum(weight)
        if found.full_rank > 10:
            assert found.method == "gram32"
            assert found.energy == pytest.approx(oracle(weight)["energy"], abs=1e-5)
            assert found.stable_rank == pytest.approx(oracle(weight)["stable_rank"], rel=1e-4)
            if name != "rank 5":
                assert found.effective_rank == pytest.approx(oracle(weight)["effective_rank"], rel=2e-3)


@pytest.mark.parametrize("long_first", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.7, 1.5])
def test_the_estimate_for_huge_layers(monkeypatch, decay, long_first):
    monkeypatch.setattr(spectrum, "_EXACT64", 0)
    monkeypatch.setattr(spectrum, "_EXACT32", 0)
    weight = randn(500, 800) * torch.arange(1, 801) ** -decay
    weight = weight.T.contiguous() if long_first else weight
    found, wanted = measure_spectrum(weight), oracle(weight)
    assert found.method == "lanczos"
    assert found.energy == pytest.approx(wanted["energy"], abs=0.03)
    assert found.stable_rank == pytest.approx(wanted["stable_rank"], rel=0.06)
    assert found.effective_rank == pytest.approx(wanted["effective_rank"], rel=0.2 if decay > 1 else 0.05)


def test_the_estimate_where_there_is_nothing_left_to_find(monkeypatch):
    monkeypatch.setattr(spectrum, "_EXACT64", 0)
    monkeypatch.setattr(spectrum, "_EXACT32", 0)
    weight = randn(200, 20) @ randn(20, 300)
    found, wanted = measure_spectrum(weight), oracle(weight)
    assert found.energy == pytest.approx(wanted["energy"], abs=1e-3)
    assert found.stable_rank == pytest.approx(wanted["stable_rank"], rel=1e-3)
    found = measure_spectrum(torch.eye(300))
    assert found.energy == pytest.approx({"0.25": 0.25, "0.5": 0.5, "0.75": 0.75})
    assert found.stable_rank == pytest.approx(300)


@pytest.mark.parametrize("weight", [torch.zeros(4, 4), torch.zeros(0, 4), torch.zeros(4, 0)])
def test_no_singular_values(weight):
    assert measure_spectrum(weight) is None


def test_a_random_matrix_decays_as_marchenko_and_pastur_say():
    """Independent of any decomposition: the largest value of a square random matrix is 2 sqrt(n)."""
    n = 600
    assert measure_spectrum(randn(n, n)).stable_rank == pytest.approx(n * n / (4 * n), rel=0.03)
