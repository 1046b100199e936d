"""Bytes on the wire: all of them where that is cheap, a sample elsewhere that comes close."""

from __future__ import annotations

import zlib

import pytest
import torch
from safetensors.torch import save_file

from hf_compress.family.footprint import disk_bytes
from hf_compress.report import inspect_checkpoint
from hf_compress.report.wire import BUDGET, Wire


def compressed(content):
    return len(zlib.compress(content, 6))


@pytest.mark.parametrize("size", [0, 1, 1000, BUDGET])
@pytest.mark.parametrize("parts", [1, 7])
def test_up_to_the_budget_every_byte_is_compressed(size, parts):
    content = torch.randint(0, 9, (size,), dtype=torch.uint8).numpy().tobytes()
    step = max(1, -(-size // parts))
    pieces = [content[k : k + step] for k in range(0, size, step)]
    wire = Wire(size, len(pieces))
    for number, piece in enumerate(pieces):
        assert wire.wants(number)
        wire.add_bytes(piece)
    assert wire.total() == compressed(content)


@pytest.mark.parametrize("parts", [1, 5, 40, 1000])
def test_a_sample_stands_for_a_larger_tensor(parts):
    """Rows of very different sparsity, so that a sample of some of them would mislead."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2000, 1000, generator=generator)
    weight[torch.rand(2000, 1000, generator=generator) < torch.rand(2000, 1, generator=generator)] = 0
    content = weight.numpy().tobytes()
    step = -(-len(content) // parts)
    wire = Wire(len(content), parts)
    given = 0
    for number in range(parts):
        if wire.wants(number):
            wire.add_bytes(content[number * step : (number + 1) * step])
            given += 1
    assert given <= 64
    assert wire.total() == pytest.approx(compressed(content), rel=0.08)


def test_totals_come_close_to_files_that_are_really_compressed(tmp_path):
    import hf_compress as hfc

    torch.manual_seed(0)
    weights = {f"layers.{i}.weight": torch.randn(700, 500) * torch.rand(700, 1) for i in range(4)}
    (tmp_path / "dense").mkdir()
    save_file(weights, tmp_path / "dense" / "model.safetensors")
    report = inspect_checkpoint(str(tmp_path / "dense"), ["unstructured:0.9", "2:4"])
    assert report.bytes_are == "estimated"
    assert report.compressed_bytes == pytest.approx(disk_bytes(tmp_path / "dense")[1], rel=0.01)
    for pattern in ("unstructured:0.9", "2:4"):
        pruned = {name: weight.clone() for name, weight in weights.items()}
        hfc.parse_pattern(pattern).project_(pruned)
        folder = tmp_path / pattern.replace(":", "-")
        folder.mkdir()
        save_file(pruned, folder / "model.safetensors")
        assert report.patterns[pattern].compressed_bytes == pytest.approx(disk_bytes(folder)[1], rel=0.05)
