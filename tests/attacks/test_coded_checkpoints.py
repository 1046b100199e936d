"""Checkpoints from strangers: whatever is wrong with coded weights is an error, and never a model of random weights."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_compress as hfc
from hf_compress.codec import Latents, encode
from hf_compress.family.coded import save_coded
from hf_compress.loading import GROUPS
from tests.conftest import tiny_bert
from tests.loading.conftest import gpt2

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


def without_groups(tensors):
    del tensors[GROUPS]


def empty(tensors):
    tensors[QUERY] = torch.zeros(0, dtype=torch.uint8)


def huge_dimensions(tensors):
    tensors[QUERY][8:16] = 255


def groups_of_noise(tensors):
    tensors[GROUPS] = torch.randint(0, 256, (4000,), dtype=torch.uint8)


def groups_cut(tensors):
    tensors[GROUPS] = tensors[GROUPS][:-1].clone()


def groups_of_numbers(tensors):
    tensors[GROUPS] = tensors[GROUPS].float()


def groups_in_rows(tensors):
    tensors[GROUPS] = tensors[GROUPS][None]


def groups_of_another_model(tensors):
    tensors[GROUPS] = bytes_of(encode({}, [np.eye(9, dtype=np.float32)])[1])


def a_group_that_is_not_there(tensors):
    values = np.zeros((16, 16), np.int8)
    blobs, _ = encode({QUERY: Latents(values, group=3)}, [np.ones((1, 1), np.float32)] * 4)
    tensors[QUERY] = bytes_of(blobs[QUERY])


def bytes_of(blob):
    return torch.frombuffer(bytearray(blob), dtype=torch.uint8)


DAMAGES = [flipped, cut, empty, huge_dimensions, a_group_that_is_not_there, without_groups, groups_of_noise, groups_cut]
DAMAGES += [groups_of_numbers, groups_in_rows, groups_of_another_model]


def changed(coded, tmp_path, change):
    folder = copy_of(coded, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("change", DAMAGES)
def test_damaged_bytes_are_an_error(coded, tmp_path, change):
    folder = changed(coded, tmp_path, change)
    with pytest.raises(ValueError, match=r"this checkpoint cannot be decoded: .* download it again, or"):
        load(folder)


@pytest.mark.parametrize("byte", range(0, 60, 7))
def test_no_byte_of_a_header_can_be_changed(coded, tmp_path, byte):
    def change(tensors):
        tensors[QUERY][byte] ^= 1

    with pytest.raises(ValueError, match=f"this checkpoint cannot be decoded: {QUERY}: "):
        load(changed(coded, tmp_path, change))


def swapped(tensors):
    tensors[QUERY], tensors[FIRST] = tensors[FIRST], tensors[QUERY]


def other_shape(tensors):
    tensors[QUERY] = forged(tensors[QUERY], (16, 17))


def flat(tensors):
    tensors[QUERY] = forged(tensors[QUERY], (256, 1))


def of_a_norm(tensors):
    tensors["bert.embeddings.LayerNorm.weight"] = tensors[QUERY].clone()


def of_an_embedding(tensors):
    tensors["bert.embeddings.word_embeddings.weight"] = tensors[QUERY].clone()


def forged(blob, shape):
    """The same bytes with other dimensions and a check sum that agrees."""
    data = bytearray(blob.numpy().tobytes())
    data[8:16] = struct.pack("<2I", *shape)
    data[-4:] = zlib.crc32(data[:-4]).to_bytes(4, "little")
    return bytes_of(data)


@pytest.mark.parametrize("change", [swapped, other_shape, flat, of_a_norm, of_an_embedding])
def test_bytes_of_another_shape_are_an_error(coded, tmp_path, caplog, change):
    folder = changed(coded, tmp_path, change)
    with pytest.raises(RuntimeError, match="mismatch"):
        load(folder)
    assert "MISMATCH" in caplog.text


TIGHT = """
import resource, sys
import torch, hf_compress
from transformers import AutoModelForSequenceClassification as Auto
Auto.from_pretrained(sys.argv[1])
now = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, now + 2**28))
for folder in sys.argv[2:]:
    try:
        Auto.from_pretrained(folder)
        print("loaded")
    except (ValueError, RuntimeError) as error:
        print(type(error).__name__, "mismatch" in str(error))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_size_in_a_file_is_believed(coded, tmp_path):
    """4 GB of weights, more than a machine has, and more than there are numbers: none takes 256 MB."""
    folders = []
    for i, shape in enumerate([(2**15, 2**15), (2**31, 2**31), (2**32 - 1, 2**32 - 1)]):
        folders.append(
            changed(
                coded, tmp_path / str(i), lambda tensors, s=shape: tensors.update({QUERY: forged(tensors[QUERY], s)})
            )
        )
    command = [sys.executable, "-c", TIGHT, str(coded), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split("\n")[:-1] == ["RuntimeError True", "RuntimeError False", "RuntimeError False"], (
        done.stderr
    )


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
    with pytest.raises(ValueError, match=r"this checkpoint cannot be decoded: .*model.safetensors cannot be read"):
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
        ({"version": 1}, r'coded is {"version": 1'),
        ({"version": 1, "weights": None}, "no list of texts"),
        ({"version": 1, "weights": {QUERY: 1}}, "no list of texts"),
        ({"version": 1, "weights": [[QUERY]]}, "no list of texts"),
        ({"version": [1], "weights": []}, r'coded is {"version": 1'),
        ("all" * 1_000_000, r'coded is {"version": 1.{,200}$'),
        ({"version": 1, "weights": [QUERY, QUERY.removeprefix("bert.")]}, "is named twice"),
        ({"version": 1, "weights": ["bert.encoder"]}, "is no weight of this model"),
        ({"version": 1, "weights": ["bert.pooler.dense.bias"]}, "is no weight of this model"),
        ({"version": 1, "weights": ["config.__class__"]}, "is no weight of this model"),
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


def test_a_config_without_the_entry_never_gives_random_weights(coded, tmp_path):
    folder = copy_of(coded, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for entry, error in (({}, ValueError), ({"coded": None}, RuntimeError), ({"coded": [], "code": 1}, ValueError)):
        content = {**config, "quantization_config": {"quant_method": "hf_compress", **entry}}
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(error):
            load(folder)
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        load(folder)


def test_a_part_of_the_model_ignores_names_that_it_does_not_have_and_no_bytes(coded, tmp_path):
    folder = copy_of(coded, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["coded"]["weights"][0] = "classifier.weight" * 1000
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModel.from_pretrained(folder)


def test_a_weight_that_is_tied_to_an_embedding_cannot_be_coded(tmp_path):
    model = gpt2()
    hfc.compress(model, "int8")
    save_coded(model, tmp_path, "int8")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["coded"]["weights"].append("lm_head.weight")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'lm_head.weight' is no weight of this model|lacks 1 of its coded weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = next(v for v in tensors.values() if v.dtype == torch.uint8).clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match="mismatch|cannot be decoded: lm_head.weight: "):
        AutoModelForCausalLM.from_pretrained(tmp_path)
