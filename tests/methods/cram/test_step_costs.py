"""What a warm step of CrAM allocates, writes and waits for: counted, so that it holds on every machine."""

from __future__ import annotations

import tracemalloc

import pytest
import torch

from hf_compress.methods.cram import CrAM
from hf_compress.selection import CHUNK
from tests.methods.watch import WAITS, Watch

WIDTH = 512
PATTERNS = ["unstructured:0.9", "unstructured:0.5:layer", "2:4", "4:8"]


def net():
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (torch.nn.Linear(WIDTH, WIDTH, bias=False), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers[:-1])


def bookkeeping(pattern):
    """A warm step of CrAM without the passes of the net, watched."""
    model = net()
    cram = CrAM(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True), model, [pattern], rho=0.05)
    x = torch.randn(8, WIDTH)
    for _ in range(2):
        model(x).square().mean().backward()
        with cram.compressed():
            model(x).square().mean().backward()
        cram.step()
        cram.zero_grad()
    model(x).square().mean().backward()
    block = cram.compressed()
    tracemalloc.start()
    try:
        with Watch() as watch:
            block.__enter__()
        _, numpy_peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    model(x).square().mean().backward()
    with watch:
        block.__exit__(None, None, None)
        cram.step()
    return watch, numpy_peak, model


@pytest.mark.parametrize("pattern", PATTERNS)
def test_nothing_larger_than_a_mask_is_allocated(pattern):
    """One byte for each weight is all that a step needs anew, in pieces of one tensor each, and chunks."""
    watch, numpy_peak, model = bookkeeping(pattern)
    entries = sum(p.numel() for p in model.parameters())
    assert watch.largest <= max(WIDTH * WIDTH, 4 * CHUNK)  # a quarter or a half of the largest tensor here
    assert numpy_peak <= 1.5 * entries + 4 * 2**20  # the masks, a band around the threshold, chunks in the cache


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_weight_is_written_a_few_times(pattern):
    """Perturbed into memory that is kept, and cut there: sweeps over the weights, counted by bytes written."""
    watch, _, model = bookkeeping(pattern)
    copy = sum(4 * p.numel() for p in model.parameters())
    assert watch.written <= 3.2 * copy
    assert watch.written >= copy  # else nothing was watched


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_number_is_asked_for(pattern):
    """Every one of these would make the host wait for an accelerator."""
    watch, *_ = bookkeeping(pattern)
    assert not WAITS & set(watch.names)
    assert "_fused_sgd_" in watch.names
