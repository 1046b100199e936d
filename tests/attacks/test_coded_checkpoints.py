"""Checkpoints from strangers: whatever is wrong with coded weights is an error, and never a model of random weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import hf_compress as hfc
from hf_compress.family.coded import save_coded
from hf_compress.loading import GROUPS
from tests.conftest import tiny_bert

QUERY, FIRST = "bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.0.intermediate.dense.weight"


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coded")
    model = tiny_bert()
    hfc.compress(model, "int8")
    save_coded(model, folder, "int8")
    return folder


def copy_of(coded, tmp_path):
    shutil.copytree(coded, tmp_path / "it")
    return tmp_path / "it"


def load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder)


def flipped(tensors):
    tensors[QUERY][len(tensors[QUERY]) // 2] ^= 255


def cut(tensors):
    tensors[QUERY] = tensors[QUERY][:-7].clone()


def swapped(tensors):
    tensors[QUERY], tensors[FIRST] = tensors[FIRST], tensors[QUERY]


def without_groups(tensors):
    del tensors[GROUPS]


def empty(tensors):
    tensors[QUERY] = torch.zeros(0, dtype=torch.uint8)


def huge_dimensions(tensors):
    tensors[QUERY][8:16] = 255


def groups_of_noise(tensors):
    tensors[GROUPS] = torch.randint(0, 256, (4000,), dtype=torch.uint8)


@pytest.mark.parametrize("change", [flipped, cut, swapped, without_groups, empty, huge_dimensions, groups_of_noise])
def test_damaged_bytes_are_an_error(coded, tmp_path, change):
    folder = copy_of(coded, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="this checkpoint cannot be decoded: "):
        load(folder)


def test_a_coded_weight_that_is_missing_is_an_error(coded, tmp_path):
    folder = copy_of(coded, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors[QUERY]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 of its coded weights, first {QUERY}"):
        load(folder)


def test_a_truncated_file_is_an_error(coded, tmp_path):
    folder = copy_of(coded, tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)safetensor|header|incomplete|deserializ"):
        load(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], r'coded is {"version": 1'),
        ({"version": 2, "weights": []}, r'coded is {"version": 1'),
        ({"version": 1, "weights": "all"}, "no list of texts"),
        ({"version": 1, "weights": [1]}, "no list of texts"),
        ({"version": 1, "weights": [QUERY, QUERY]}, "is named twice"),
        ({"version": 1, "weights": ["bert.embeddings.word_embeddings.weight"]}, "is no weight of this model"),
        ({"version": 1, "weights": ["bert.embeddings.LayerNorm.weight"]}, "is no weight of this model"),
        ({"version": 1, "weights": ["../../etc/passwd"]}, "is no weight of this model"),
        ({"version": 1, "weights": [f"x{i}" for i in range(100_000)]}, "is no weight of this model"),
        ({"version": 1, "weights": [], "code": "import os"}, r'coded is {"version": 1'),
    ],
)
def test_a_hostile_config_is_an_error(coded, tmp_path, entry, message):
    folder = copy_of(coded, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["coded"] = entry
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_bytes_of_a_weight_that_the_config_does_not_name_are_an_error(coded, tmp_path):
    folder = copy_of(coded, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["coded"]["weights"].remove(QUERY)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        load(folder)
