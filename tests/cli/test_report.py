"""`hf-compress report`: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hf_compress as hfc
from hf_compress.cli import run
from hf_compress.cli.table import render
from hf_compress.report import inspect_checkpoint
from tests.cli.conftest import failure
from tests.conftest import ROOT, tiny_resnet, tiny_vit


@pytest.fixture
def model(tmp_path):
    tiny_vit().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def report(capsys, *argv):
    assert run(["report", *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_a_checkpoint(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = report(capsys, "model")
    found = inspect_checkpoint(str(model))
    assert out.startswith("model: ViTForImageClassification, ")
    assert ", 13 layers to compress\n" in out
    for pattern, numbers in found.patterns.items():
        if not pattern.endswith(":layer"):
            energy = f"{100 * numbers.energy:.{2 if numbers.energy > 0.999 else 1}f} %"
            assert re.search(rf"^{pattern} +{100 * numbers.sparsity:.1f} % +{energy} ", out, re.M), pattern
    for name in found.bottlenecks[:8]:
        assert name.removesuffix(".weight") in out
    assert found.bottlenecks[8].removesuffix(".weight") not in out
    folder = tmp_path / "out" / "report" / "model"
    assert f"report   {Path('out/report/model/report.json')}" in out
    assert sorted(p.name for p in folder.iterdir()) == ["report.json", "report.png", "report.svg"]
    content = json.loads((folder / "report.json").read_text())
    assert content["schema"] == 1
    assert content == {**json.loads(found.to_json()), "model": "model"}
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (
        "vit.layers.0.mlp.fc1" in (folder / "report.svg").read_text() or "<svg" in (folder / "report.svg").read_text()
    )
    assert run(["report", "model"]) == 0  # again, over the older one


def test_options_reach_the_report(model, tmp_path, capsys):
    argv = ["--pattern", "2:4", "--pattern", "unstructured:0.6", "--include", "*mlp*", "--exclude", "*fc2*"]
    out = report(capsys, model, *argv, "--output_dir", tmp_path / "here")
    assert ", 2 layers to compress" in out
    content = json.loads((tmp_path / "here" / "report.json").read_text())
    assert list(content["patterns"]) == ["2:4", "unstructured:0.6"]
    assert content["reference"] == "2:4"
    assert "Most sensitive to 2:4, without data" in out


def test_json_goes_to_the_terminal_and_nowhere_else(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = json.loads(report(capsys, "model", "--json", "--pattern", "2:4"))
    assert content["architecture"] == "ViTForImageClassification"
    assert not (tmp_path / "out").exists()
    report(capsys, "model", "--json", "--pattern", "2:4", "--output_dir", "there")
    assert (tmp_path / "there" / "report.png").is_file()


def test_lines_fit_a_terminal(tmp_path, capsys):
    torch.manual_seed(0)
    names = [f"model.language_model.layers.{i}.some_rather_long_module.attention.output_projection" for i in range(12)]
    weights = {f"{name}.weight": torch.randn(64, 16, 3, 3) / (i + 1) for i, name in enumerate(names)}
    weights["layers.broken.weight"] = torch.full((4, 4), float("nan"))
    save_file(weights, tmp_path / "weights.safetensors")
    out = report(capsys, tmp_path / "weights.safetensors", "--output_dir", tmp_path / "out")
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 110
    out = re.sub(r"\n  +", " ", out)
    assert "note: names and shapes decided" in out
    assert "note: layers.broken.weight is left out: it holds NaN or infinity" in out
    assert "leaves less than 10 % of the energy of " in out


def test_pictures_of_few_and_of_many_layers(tmp_path, capsys):
    for count in (1, 20, 150):
        weights = {f"layers.{i}.weight": torch.randn(8, 8) for i in range(count)}
        save_file(weights, tmp_path / f"{count}.safetensors")
        report(capsys, tmp_path / f"{count}.safetensors", "--output_dir", tmp_path / f"{count}")
        assert 20_000 < (tmp_path / f"{count}" / "report.png").stat().st_size < 400_000


def test_a_layer_that_a_pattern_skips(tmp_path, capsys):
    tiny_resnet().save_pretrained(tmp_path / "model")
    argv = ["--pattern", "2:4", "--include", "*embedder*", "--output_dir", tmp_path / "out"]
    assert re.search(
        r"^resnet.embedder.embedder.convolution .* dense$", report(capsys, tmp_path / "model", *argv), re.M
    )


def test_a_family_from_its_manifest(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    family = hfc.build_family(
        tiny_vit(), ["unstructured:0.5", "2:4"], lambda m: {"accuracy": 0.5}, output_dir="run/_family"
    )
    before = {p: p.stat().st_mtime_ns for p in family.folder.rglob("*")}
    monkeypatch.setattr(type(tiny_vit()), "from_pretrained", None)  # nothing is loaded, so nothing is measured
    out = report(capsys, "run/_family")
    assert out.startswith(render(family))
    picture = tmp_path / "out" / "report" / "run_family" / "sparsity.png"
    assert picture.read_bytes() == (family.folder / "plots" / "sparsity.png").read_bytes()
    assert {p: p.stat().st_mtime_ns for p in family.folder.rglob("*")} == before
    manifest = json.loads((family.folder / "family.json").read_text())
    assert json.loads(report(capsys, "run/_family", "--json")) == manifest
    assert "is a family, whose numbers are in its manifest" in failure(
        capsys, "report", "run/_family", "--pattern", "2:4"
    )
    assert report(capsys, "run/_family/dense", "--pattern", "2:4").startswith("run/_family/dense: ViT")


def test_mistakes_are_explained_in_one_line(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "pickled").mkdir()
    torch.save({"w": torch.ones(2)}, tmp_path / "pickled" / "pytorch_model.bin")
    for argv, message in [
        (["nowhere/at/all"], "there is no folder nowhere/at/all"),
        (["pickled"], "is pickled, and reading a pickle runs what is in it"),
        (["model", "--pattern", "3:2"], "is no pattern; allowed"),
        (["model", "--pattern", "low_rank:0.5"], "a report cannot measure low_rank:0.5"),
        (["model", "--include", "nothing"], "include='nothing' matches no weight"),
        (["model", "--output_dir", "file"], "cannot write to file"),
    ]:
        error = failure(capsys, "report", *argv)
        assert message in error
        assert error.count("\n") == 1


def test_the_command_in_a_process_of_its_own(model, tmp_path):
    """Nothing is said on stderr that a user has no use for, and a picture needs no display."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "DISPLAY")}
    command = [sys.executable, "-m", "hf_compress", "report", str(model)]
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "out" / "report" / "model" / "report.png").is_file()


def test_what_cannot_be_reported_leaves_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no such folder here" in failure(capsys, "report", "no/such")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    failure(capsys, "report", "no/such", "--output_dir", "mine/deep/er")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_folder_with_a_revision_is_refused(model, tmp_path, capsys):
    message = failure(capsys, "report", model, "--revision", "v1", "--output_dir", tmp_path / "out")
    assert "--revision is of a Hub id" in message
