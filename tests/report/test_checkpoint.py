"""Files from strangers: what cannot be read is refused with a reason, and nothing in them is ever run."""

from __future__ import annotations

import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_compress.report import inspect_checkpoint
from hf_compress.report.checkpoint import open_checkpoint
from tests.conftest import tiny_vit


@pytest.fixture
def folder(tmp_path):
    tiny_vit().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    tiny_vit().save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    return tmp_path / "sharded"


def refusal(path):
    with pytest.raises(ValueError) as caught:
        inspect_checkpoint(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_headers_and_values(folder):
    checkpoint = open_checkpoint(str(folder))
    weights = load_file(folder / "model.safetensors")
    assert set(checkpoint.tensors) == set(weights)
    for name, stored in checkpoint.tensors.items():
        assert stored.shape == tuple(weights[name].shape)
        assert stored.dtype == "F32"
        assert stored.bytes == weights[name].nbytes
        assert torch.equal(checkpoint.read(name), weights[name])
        assert checkpoint.read_bytes(name, 0, 1 << 30) == weights[name].numpy().tobytes()
        assert checkpoint.read_bytes(name, 4, 8) == weights[name].numpy().tobytes()[4:12]


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -4000])
def test_a_truncated_file(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert f"cannot read {file}" in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 60) + b'{"a.weight":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'[:60],
        struct.pack("<Q", 62) + b'{"a.weight":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}',
        struct.pack("<Q", 8) + b"\xff" * 8,
        b"PK\x03\x04" + b"0" * 100,
    ],
)
def test_headers_that_lie(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "truncated or no safetensors file" in refusal(tmp_path)


def test_a_file_without_tensors(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    assert "holds no tensor" in refusal(tmp_path)


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"{shard} is missing: the checkpoint is incomplete" in refusal(sharded)


def test_a_shard_without_what_the_index_promises(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    name, file = next(iter(index["weight_map"].items()))
    weights = load_file(sharded / file)
    del weights[name]
    save_file(weights, sharded / file)
    assert f"lacks {name!r}, which the index promises" in refusal(sharded)


@pytest.mark.parametrize("file", ["../model/model.safetensors", "/etc/passwd", "a\\b.safetensors", "model.bin", ""])
def test_an_index_leads_to_no_other_place(sharded, folder, file):
    index = {"weight_map": {"a.weight": file}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which is no safetensors file beside it" in refusal(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_an_index_that_is_none(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    assert "has no weight_map of tensors to files" in refusal(sharded)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "weights.pth", "x.pkl"])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_pickle_is_refused_and_never_opened(tmp_path, name, whole_folder):
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / name
    file.write_bytes(pickle.dumps(Payload(tmp_path / "run")))
    message = refusal(file.parent if whole_folder else file)
    assert f"{file} is pickled, and reading a pickle runs what is in it" in message
    assert not (tmp_path / "run").exists()
    pickle.loads(file.read_bytes())
    assert (tmp_path / "run").exists()


def test_a_pickle_under_the_name_of_a_safetensors_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "run")))
    refusal(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such", "./none", "../none"])
def test_no_folder(name):
    assert f"there is no folder {name}" in refusal(name)


@pytest.mark.parametrize("name", ["me/nothing-here", "nothing-here", "bad name!"])
def test_no_model_on_the_hub(name):
    message = refusal(name)
    assert message.startswith("cannot find ")
    assert name in message


def test_an_empty_folder(tmp_path):
    assert f"{tmp_path} holds no safetensors file" in refusal(tmp_path)


def test_one_file_of_any_name_but_not_several(tmp_path):
    save_file({"layers.0.weight": torch.randn(4, 4)}, tmp_path / "a.safetensors")
    assert len(inspect_checkpoint(str(tmp_path)).layers) == 1
    save_file({"layers.0.weight": torch.randn(4, 4)}, tmp_path / "b.safetensors")
    assert "several safetensors files and no model.safetensors.index.json: a.safetensors, b.safet" in refusal(tmp_path)
    assert len(inspect_checkpoint(str(tmp_path / "b.safetensors")).layers) == 1


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "is stored by gptq,"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "by compressed-tensors (pack-quantized)"),
        ({"quant_method": "fp8"}, "is stored by fp8"),
    ],
)
def test_packed_weights_are_refused(folder, quantization, name):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    assert name in refusal(folder)


def test_integers_without_scales_are_left_out(tmp_path):
    weights = {"layers.0.weight": torch.ones(4, 4, dtype=torch.int8), "layers.1.weight": torch.randn(4, 4)}
    save_file(weights, tmp_path / "model.safetensors")
    report = inspect_checkpoint(str(tmp_path))
    assert [layer.name for layer in report.layers] == ["layers.1.weight"]
    assert "layers.0.weight: it is stored as I8" in report.notes[1]
    save_file({"layers.0.weight": weights["layers.0.weight"]}, tmp_path / "model.safetensors")
    assert "has no weight to compress" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[1]", '{"model_type": 3}', '{"architectures": "x"}'])
def test_a_config_that_cannot_be_read(folder, text):
    (folder / "config.json").write_text(text)
    report = inspect_checkpoint(str(folder), "2:4")
    assert report.architecture is None
    assert "names and shapes decided" in report.notes[0]


@pytest.mark.parametrize("name", [".weight", "..weight", "a..weight", "weight", "a.0.weight", "é.weight"])
def test_strange_names(tmp_path, name):
    save_file({name: torch.randn(4, 4), "layers.0.weight": torch.randn(4, 4)}, tmp_path / "model.safetensors")
    assert "layers.0.weight" in [layer.name for layer in inspect_checkpoint(str(tmp_path)).layers]


def test_a_hub_id_in_the_offline_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    for sharded in (False, True):
        cache = tmp_path / f"cache{sharded}"
        snapshot = cache / "models--me--net" / "snapshots" / ("a" * 40)
        tiny_vit().save_pretrained(snapshot, max_shard_size="8KB" if sharded else "1GB")
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        report = inspect_checkpoint("me/net", "2:4", revision="main")
        assert report.architecture == "ViTForImageClassification"
        assert [n.energy for n in report.patterns.values()] == [
            n.energy for n in inspect_checkpoint(str(snapshot), "2:4").patterns.values()
        ]
        with pytest.raises(ValueError, match="cannot find model.safetensors of me/net"):
            inspect_checkpoint("me/net", revision="other")


def test_one_file_goes_before_an_older_index(sharded, folder):
    """As in `from_pretrained`: what was saved again in one file leaves the index of its shards behind."""
    for shard in sharded.glob("*.safetensors"):
        shard.unlink()
    (sharded / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert (sharded / "model.safetensors.index.json").is_file()
    assert open_checkpoint(str(sharded)).tensors.keys() == open_checkpoint(str(folder)).tensors.keys()


def test_a_folder_has_no_revisions(folder):
    with pytest.raises(ValueError, match="is on this disk, where it has no revisions: --revision is of a Hub id"):
        inspect_checkpoint(str(folder), revision="main")
