"""The comparison with other tools, with few images and new weights: what it claims of sizes and zeros."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from hf_compress.models.cifar_resnet import CifarResNet
from tests.conftest import ROOT
from tests.integration.test_evidence import write_images

BENCHMARKS = ROOT / "recipes" / "benchmarks"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What the script prints and writes for one checkpoint."""
    folder = tmp_path_factory.mktemp("tools")
    write_images(folder / "cifar10")
    torch.manual_seed(0)
    save_file(CifarResNet(20).state_dict(), folder / "start.safetensors")
    paths = ["--data", folder / "cifar10", "--checkpoint", f"start={folder / 'start.safetensors'}"]
    command = [sys.executable, BENCHMARKS / "todays_tools.py", *paths, "--output", folder / "tools.json"]
    own = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, "--samples", "10"], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout, json.loads((folder / "tools.json").read_text())


@pytest.fixture
def rows(run):
    return run[2]["checkpoints"]["start"]["rows"]


@pytest.mark.parametrize("share", ["0.5", "0.8", "0.9"])
def test_torch_and_we_keep_the_same_weights(rows, share):
    """Bit for bit: new weights have no ties."""
    ours = next(row for row in rows if row["how"] == f"unstructured:{share}")
    torchs = next(row for row in rows if row["how"] == f"global_unstructured, {share}")
    assert ours["share"] == pytest.approx(float(share), abs=1e-4)
    assert torchs["differs"] == 0
    assert all(torchs[key] == ours[key] for key in ("zeros", "parameters", "macs", "as_cut", "recalibrated"))


def test_two_of_four_is_that_of_torch_ao_on_matrices(rows):
    assert next(row for row in rows if row["how"] == "WeightNormSparsifier, 2:4, as matrices")["differs"] == 0
    assert "error" in next(row for row in rows if row["how"] == "WeightNormSparsifier, 2:4, net as it is")


def test_shares_of_layers_differ_by_rounding_alone(rows):
    """torch.ao rounds the count of every one of 20 layers, and we take the whole number below."""
    differs = [row["differs"] for row in rows if row["how"].startswith("WeightNormSparsifier, 0.")]
    assert len(differs) == 3
    assert max(differs) <= 20


def test_filters_are_compared_at_equal_size(rows):
    ours = [row for row in rows if "parameters_off" in row]
    theirs = [row for row in rows if row["tool"] == "torch-pruning"]
    assert (len(theirs), len(ours)) == (12, 18)
    for row in ours:
        other = next(each for each in theirs if row["how"].endswith(f"as large as {each['how']}"))
        assert row["parameters"] == pytest.approx(other["parameters"], rel=0.04)
        assert all(row[key] < rows[0][key] for key in ("parameters", "macs"))


def test_files_of_int8_are_smaller(rows):
    by = {row["how"]: row["bytes"] for row in rows if "bytes" in row}
    quantized = [by["quantize_dynamic"], by["quantize_static, QDQ, per channel"]]
    assert by["unstructured:0.8+int8, coded"] < by["int8, coded"] < min(quantized)
    assert max(quantized) < by["float32"] / 2


def test_the_table_has_every_row_and_what_is_refused(run, rows):
    assert len([line for line in run[1].splitlines() if line.startswith("| ")]) == len(rows) + 2
    assert all(f": {row['error']}" in run[1] for row in rows if "error" in row)


def test_checkpoints_load_with_and_without_the_wrapper(run, monkeypatch):
    folder = run[0]
    monkeypatch.syspath_prepend(BENCHMARKS)
    tools = importlib.import_module("todays_tools")
    net = tools.images(tools.SETTINGS, {"cifar10": str(folder / "cifar10")}).parts["model"]
    plain = tools.loaded(net, folder / "start.safetensors")
    torch.save(plain.state_dict(), folder / "wrapped.pt")
    wrapped = tools.loaded(net, folder / "wrapped.pt").state_dict()
    assert all(torch.equal(value, wrapped[name]) for name, value in plain.state_dict().items())
    assert not torch.equal(plain.timm_model.conv1.weight, net.timm_model.conv1.weight)
    torch.save({"conv1.weight": torch.zeros(16, 3, 3, 3), "other": torch.zeros(1)}, folder / "other.pt")
    with pytest.raises(ValueError, match="is no resnet20_cifar"):
        tools.loaded(net, folder / "other.pt")
