"""Pruning a CNN on load takes its batch-norm statistics from the pack that the family made, without any data."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

import hf_compress as hfc
from hf_compress.calibration import batch_norm_statistics
from hf_compress.loading.statistics import STATISTICS, StatisticsPack
from tests.conftest import image_samples, tiny_resnet, tiny_vit
from tests.loading.conftest import bits

SAMPLES = torch.stack([s["pixel_values"] for s in image_samples()])
BATCHES = [{"pixel_values": SAMPLES[:24]}, {"pixel_values": SAMPLES[24:]}]
VARIANTS = ["unstructured:0.9", "2:4", "filters:0.25", "int8", "low_rank:0.5", "unstructured:0.7:layer"]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    model = tiny_resnet()
    hfc.recalibrate_batch_norm(model, BATCHES)
    folder = tmp_path_factory.mktemp("families") / "cnn"
    return hfc.build_family(model, VARIANTS, None, BATCHES, folder)


@pytest.fixture
def dense(family, tmp_path):
    """A copy of the dense checkpoint with the pack beside it, as on main of a repository."""
    shutil.copytree(family.path_to(family.dense), tmp_path / "dense")
    shutil.copy(family.folder / STATISTICS, tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def warnings(monkeypatch):
    """What the loader warned of."""
    from hf_compress.loading import prune

    found = []
    monkeypatch.setattr(prune.logger, "warning", found.append)
    return found


def slide(folder, pattern, kind=t.ResNetForImageClassification, **globs):
    return kind.from_pretrained(folder, quantization_config=hfc.HfCompressConfig(pattern, **globs))


@pytest.mark.parametrize("pattern", [p for p in VARIANTS if not p.startswith("low_rank")])
def test_the_slider_gives_the_variant_bit_by_bit(family, pattern):
    slid = slide(family.path_to(family.dense), pattern)
    assert bits(slid) == bits(t.ResNetForImageClassification.from_pretrained(family.path_to(pattern)))
    with_data = t.ResNetForImageClassification.from_pretrained(family.path_to(family.dense))
    hfc.compress(with_data, pattern)
    assert bits(slid) != bits(with_data)
    hfc.recalibrate_batch_norm(with_data, BATCHES)
    assert bits(slid) == bits(with_data)


@pytest.mark.parametrize(("share", "below", "above"), [(0.82, 0.8, 0.85), (0.525, 0.5, 0.6), (0.25, 0.0, 0.5)])
def test_between_two_shares_both_are_mixed(family, dense, warnings, share, below, above):
    stored = StatisticsPack.read(family.folder / STATISTICS).tensors
    found = batch_norm_statistics(slide(dense, f"unstructured:{share}"))
    low, high = (stored[f"unstructured:{s:g}"] for s in (below, above))
    weight = (share - below) / (above - below)
    assert len(found) == len(low) > 4
    for name, value in found.items():
        torch.testing.assert_close(value, (1 - weight) * low[name] + weight * high[name])
        assert not torch.equal(low[name], high[name])
    assert [
        text for text in warnings if f"statistics of patterns near unstructured:{share}; that can cost accuracy" in text
    ]


def test_a_model_without_the_head_finds_its_names(dense):
    whole = slide(dense, "unstructured:0.9")
    backbone = slide(dense, "unstructured:0.9", t.ResNetModel, include=None)
    ours, own = batch_norm_statistics(whole), batch_norm_statistics(backbone)
    assert [f"resnet.{name}" for name in own] == list(ours)
    assert all(torch.equal(ours[f"resnet.{name}"], value) for name, value in own.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_other_model(dense, dtype, warnings):
    config = hfc.HfCompressConfig("2:4")
    model = t.ResNetForImageClassification.from_pretrained(dense, dtype=dtype, quantization_config=config)
    wanted = batch_norm_statistics(slide(dense, "2:4"))
    assert all(torch.equal(v, wanted[n].to(dtype)) for n, v in batch_norm_statistics(model).items())
    assert not [text for text in warnings if "statistics" in text]


@pytest.mark.parametrize(
    ("pattern", "globs", "why"),
    [
        ("unstructured:0.97", {}, "the checkpoint's batch_norm.safetensors is for "),
        ("3:4", {}, "the checkpoint's batch_norm.safetensors is for "),
        ("unstructured:0.8:layer", {}, "unstructured:0.7:layer"),
        ("unstructured:0.9", {"exclude": ["*classifier*"]}, "is for include=None and exclude=None"),
    ],
)
def test_what_the_pack_does_not_know_is_said(family, dense, warnings, pattern, globs, why):
    model = slide(dense, pattern, **globs)
    own = batch_norm_statistics(t.ResNetForImageClassification.from_pretrained(family.path_to(family.dense)))
    said = [text for text in warnings if "batch norms keep the statistics of the dense weights" in text]
    assert len(said) == 1
    assert why in said[0]
    assert "recalibrate_batch_norm" in said[0]
    assert all(torch.equal(value, own[name]) for name, value in batch_norm_statistics(model).items())


def test_without_a_pack_it_is_said_and_with_nothing_to_renew_it_is_not(dense, tmp_path, warnings):
    (dense / STATISTICS).unlink()
    slide(dense, "unstructured:0.9")
    assert len([text for text in warnings if "the checkpoint has no batch_norm.safetensors" in text]) == 1
    warnings.clear()
    slide(dense, "unstructured:0")
    vit = hfc.build_family(tiny_vit(), ["2:4"], None, BATCHES, tmp_path / "vit")
    slide(vit.path_to(vit.dense), "unstructured:0.9", t.ViTForImageClassification)
    assert not [text for text in warnings if "statistics" in text]
    assert not (vit.folder / STATISTICS).exists()


def test_a_pack_of_other_weights_is_left_out(dense, warnings):
    stored = load_file(dense / "model.safetensors")
    for name in (n for n in stored if n.endswith("running_mean")):
        stored[name] = stored[name] + 1.0
    save_file(stored, dense / "model.safetensors", metadata={"format": "pt"})
    slide(dense, "unstructured:0.9")
    assert any("made for other weights" in text for text in warnings)


def edited(path, edit, **metadata):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as content:
        facts = content.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={**facts, **metadata})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v[:-1].clone(), "does not fit this model: .* is \\(7,\\) of torch.float32"),
        (lambda v: v.double(), "does not fit this model: .* of torch.float64"),
        (lambda v: v * float("nan"), "is not finite, or negative"),
        (lambda v: -v - 1, "is not finite, or negative"),
        (None, "is missing"),
    ],
)
def test_packs_that_are_wrong_are_errors(dense, edit, message):
    key = "2:4 resnet.embedder.embedder.normalization.running_var"

    def change(tensors):
        value = tensors.pop(key)
        if edit is not None:
            tensors[key] = edit(value)

    edited(dense / STATISTICS, change)
    with pytest.raises(ValueError, match=message):
        slide(dense, "2:4")


def test_files_that_are_no_packs_are_errors(dense):
    path = dense / STATISTICS
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:9], b"\xff" * 8 + whole[8:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"batch_norm\.safetensors of this checkpoint cannot be read"):
            slide(dense, "2:4")
    path.write_bytes(whole)
    edited(path, lambda tensors: None, schema="2")
    with pytest.raises(ValueError, match="its schema is not 1"):
        slide(dense, "2:4")
    path.write_bytes(whole)
    edited(path, lambda tensors: None, include="[" * 100_000)
    with pytest.raises(ValueError, match="cannot be read"):
        slide(dense, "2:4")


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from hf_compress.loading.statistics import StatisticsPack
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    StatisticsPack({"unstructured:0": {"norm.running_mean": torch.zeros(5000)}}).save(Path(sys.argv[1]))
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="it has no limit on the size of files")
def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"cannot write {tmp_path}: ")
