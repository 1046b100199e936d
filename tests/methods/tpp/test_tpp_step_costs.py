"""What the penalty of TPP allocates, writes and waits for in a step: counted, so that it holds on every machine."""

from __future__ import annotations

import pytest
import torch

from hf_compress.methods.tpp import TrainabilityPenalty, select
from tests.methods.watch import WAITS, Watch

WIDTH, LAYERS = 512, 3


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_gradients_take_few_bytes_and_no_wait(share):
    """The rows in order, their products with the pruned ones, and what is added."""
    torch.manual_seed(0)
    convolutions = [torch.nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(LAYERS)]
    model, x = torch.nn.Sequential(*convolutions, torch.nn.Conv2d(WIDTH, 10, 1)), torch.randn(1, WIDTH, 2, 2)
    penalty = TrainabilityPenalty(model, select(model, [f"[0-2]=filters:{share}"], x).pruned, x)
    model(x).sum().backward()
    strength = torch.tensor(0.5)
    penalty.add_gradients(strength)
    with Watch() as watch:
        penalty.add_gradients(strength)
    copy = 4 * LAYERS * WIDTH**2
    assert watch.largest <= copy  # layers of one shape are taken together
    assert copy <= watch.written <= 10 * copy
    assert not WAITS & set(watch.names)
    assert "bmm" in watch.names
