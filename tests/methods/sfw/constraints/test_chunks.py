"""Sums of squares by pieces are exact enough at every size and scale."""

from __future__ import annotations

import pytest
import torch

from hf_compress.methods.sfw.constraints.chunks import rows, square_sum, squared_norm


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e-12, 1.0, 1e12, 1e18, 1e30])
@pytest.mark.parametrize("size", [1, 7, 1 << 17, (1 << 20) + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_squares(scale, size, dtype):
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype) * scale
    exact = x.double().square().sum()
    assert square_sum(x).item() == pytest.approx(exact.item(), rel=1e-6)
    assert squared_norm(x).item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["normal", "equal", "one sign"])
def test_a_hundred_million_entries(kind):
    """Where a running sum in float32 has long stopped to grow."""
    part = {
        "normal": torch.randn(100_000, generator=torch.Generator().manual_seed(0)),
        "equal": torch.full((100_000,), 0.1),
        "one sign": torch.rand(100_000, generator=torch.Generator().manual_seed(0)),
    }[kind]
    whole = part.repeat(1000)
    assert squared_norm(whole).item() == pytest.approx(1000 * part.double().square().sum().item(), rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value):
    assert not squared_norm(torch.tensor([1.0, value])).isfinite()


def test_squares_of_nothing():
    assert squared_norm(torch.zeros(0)) == square_sum(torch.zeros(5)) == 0


def test_rows_go_together():
    part, wide, single = torch.randn(300, 2000), torch.randn(300, 1), torch.randn(1, 2000)
    pieces = list(zip(rows(part), rows(wide, part), rows(single, part), strict=True))
    assert len(pieces) > 1
    assert torch.equal(torch.cat([a * b * c for a, b, c in pieces]), part * wide * single)
