"""How often two models take turns: often where they are small, at least three times where they are slow."""

from __future__ import annotations

import time

import pytest
import torch

from hf_compress.family.latency import measure_latency


class Counting(torch.nn.Module):
    """A model that takes so many seconds and counts its passes."""

    def __init__(self, seconds):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seconds, self.passes = seconds, 0

    def forward(self, x):
        self.passes += 1
        time.sleep(self.seconds)
        return x


@pytest.mark.parametrize(("seconds", "least", "most"), [(0.0005, 20, 110), (0.01, 16, 16), (0.4, 4, 4)])
def test_small_models_take_more_turns_and_slow_ones_fewer(seconds, least, most):
    model, dense = Counting(seconds), Counting(seconds)
    found = measure_latency(model, dense, {"x": torch.ones(2, 3)})
    assert model.passes == dense.passes  # of which the first warms up
    assert least <= model.passes <= most
    assert found["milliseconds"] == pytest.approx(1000 * seconds, rel=1, abs=1)
    assert found["batch_size"] == 2
