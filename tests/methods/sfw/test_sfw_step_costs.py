"""What a warm step of SFW allocates and writes, and that the path of accelerators never waits: counted."""

from __future__ import annotations

import tracemalloc

import pytest
import torch

from hf_compress.methods.sfw import create_sfw
from hf_compress.selection import CHUNK
from tests.methods.watch import Watch

WIDTH = 1024
WRITTEN = {  # copies of the weights: sweeps over them, and pieces in the cache
    ("k_sparse", "diameter", "tensor"): 7,
    ("k_sparse", "gradient", "tensor"): 11,
    ("k_sparse", "gradient", "global"): 11,
    ("k_support", "gradient", "tensor"): 15,
    ("group_k_support", "gradient", "tensor"): 5,
    ("spectral_k_support", "gradient", "tensor"): 8,
}


def warm_step(region, rescale, scope):
    """The third step of an optimizer, watched."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)])
    sfw = create_sfw(model, f"{region}(k=0.1, radius=init:10)", lr=1e-3, rescale=rescale, scope=scope)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        tracemalloc.start()
        try:
            with Watch() as watch:
                sfw.step()
            _, numpy_peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    return watch, numpy_peak, 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("case", WRITTEN, ids=" ".join)
def test_nothing_of_the_size_of_a_weight_is_allocated(case):
    """Chunks that fit the cache, the band around a threshold, and the factors of a spectral vertex."""
    watch, numpy_peak, _ = warm_step(*case)
    assert 0 < watch.largest <= max(4 * CHUNK, WIDTH**2)  # a quarter of a weight is 1 MiB
    assert numpy_peak <= 3 * 2**20


@pytest.mark.parametrize("case", WRITTEN, ids=" ".join)
def test_each_weight_is_written_a_few_times(case):
    watch, _, copy = warm_step(*case)
    assert 2 * copy <= watch.written <= WRITTEN[case] * copy  # momentum and weights at least


@pytest.mark.parametrize("rescale", ["diameter", "gradient", "fast_gradient", "none"])
@pytest.mark.parametrize(
    "region", ["k_sparse(k=0.1", "k_support(k=0.1", "group_k_support(k=0.1", "lp(p=2", "lp(p=1", "lp(p=3"]
)
def test_no_number_is_asked_of_an_accelerator(region, rescale):
    """Tensors of the meta device hold no numbers: whoever asks for one, and so would wait, gets an error."""
    model = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH) for _ in range(2)]).to("meta")
    sfw = create_sfw(model, f"{region}, radius=init:10)", lr=1e-3, rescale=rescale, shrink=False)
    sfw.tracks_gap = True
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    for _ in range(2):
        sfw.step()
    assert sfw.gap.device.type == "meta"


@pytest.mark.parametrize("region", ["k_sparse", "k_support"])
def test_calls_to_an_accelerator_grow_by_a_few_for_each_weight(region):
    """Every call starts a kernel: momentum, threshold, and what clears a momentum that is lost; the rest is common."""

    def calls(layers):
        model = torch.nn.Sequential(*[torch.nn.Linear(64, 64, bias=False) for _ in range(layers)]).to("meta")
        sfw = create_sfw(model, f"{region}(k=0.1, radius=init:10)", lr=1e-3, shrink=False)
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
            with Watch() as watch:
                sfw.step()
        views = {"view", "_unsafe_view", "detach", "expand", "split", "slice", "unbind", "alias", "select", "device"}
        return len([name for name in watch.names if name not in views])

    assert calls(40) - calls(20) <= 20 * 5
    assert calls(20) <= 20 * 5 + 80


def test_a_number_that_is_asked_for_is_an_error():
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(torch.empty((), device="meta"))
