"""Time on one processor and memory of a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read as Linux tells it"),
]
MINILM = ROOT.parent / "shared" / "data" / "minilm_l6"


def cost(folder, *patterns):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.report.budget", str(folder), *patterns]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_cheap(folder, architecture, layers):
    found = cost(folder)
    largest = max(w.nbytes for w in load_file(folder / "model.safetensors").values())
    assert found["architecture"] == architecture
    assert found["layers"] == layers
    assert len(found["patterns"]) == 15
    assert found["seconds"] < 60
    assert found["bytes"] <= largest + 300e6


@pytest.mark.skipif(not MINILM.is_dir(), reason="the shared MiniLM is not here")
def test_minilm():
    assert_cheap(MINILM, "BertModel", 37)


def test_resnet50(tmp_path):
    import transformers as t

    config = t.TimmWrapperConfig(architecture="resnet50", num_labels=1000, model_args={})
    t.TimmWrapperForImageClassification(config).save_pretrained(tmp_path)
    assert_cheap(tmp_path, "TimmWrapperForImageClassification", 54)


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """500 MB of weights in shards, none larger than 8 MB: a process that keeps them would be seen."""
    weight_map = {}
    for shard in range(4):
        weights = {f"layers.{shard}.{i}.weight": torch.randn(512, 4096) for i in range(15)}
        save_file(weights, tmp_path / f"{shard}.safetensors")
        weight_map |= dict.fromkeys(weights, f"{shard}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = cost(tmp_path, "unstructured:0.9")
    assert found["layers"] == 60
    assert found["bytes"] <= 8.4e6 + 300e6
