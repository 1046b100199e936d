"""Coded checkpoints load as the models that were saved, bit for bit, and never without us."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers as t

import hf_compress as hfc
from hf_compress.family.coded import save_coded
from hf_compress.loading import stored
from hf_compress.methods.lilnetx import bake, reparametrize
from tests.conftest import ROOT, tiny_bert, tiny_resnet
from tests.loading.conftest import MODELS, bits, load, same_logits

PATTERNS = ["int8", "int4", "2:4+int8", "unstructured:0.8+int8"]


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def with_pattern(name, pattern, dtype=torch.float32):
    t.set_seed(0)
    model = MODELS[name]().to(dtype)
    hfc.compress(model, pattern)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pattern", ["int8", "unstructured:0.8+int4"])
def test_all_architectures_load_bit_for_bit(tmp_path, name, pattern):
    """Also where names on disk differ, weights are transposed, or joined with others in the file."""
    model = with_pattern(name, pattern)
    save_coded(model, tmp_path / "coded", pattern)
    assert config_of(tmp_path / "coded")["quantization_config"]["coded"]["weights"]
    loaded, info = load(tmp_path / "coded", output_loading_info=True)
    assert not any(info.values())
    assert bits(loaded) == bits(model)
    assert same_logits(loaded, model)
    loaded.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in config_of(tmp_path / "plain")
    assert bits(load(tmp_path / "plain")) == bits(model)


@pytest.mark.parametrize("name", MODELS)
def test_latents_load_as_they_are_baked(tmp_path, name):
    t.set_seed(0)
    model = MODELS[name]().eval()
    reparametrize(model, steps_per_std=2)
    save_coded(model, tmp_path)
    bake(model)
    assert bits(load(tmp_path)) == bits(model)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept(tmp_path, pattern, dtype):
    model = with_pattern("bert", pattern, dtype)
    save_coded(model, tmp_path, pattern)
    assert bits(load(tmp_path, dtype="auto")) == bits(model)


def test_another_type_is_that_of_the_weights_cast(tmp_path):
    model = with_pattern("gpt2", "int8")
    save_coded(model, tmp_path, "int8")
    assert bits(load(tmp_path, dtype=torch.bfloat16)) == bits(model.bfloat16())


def test_bare_models_devices_and_shards(tmp_path):
    model = with_pattern("bert", "int8")
    save_coded(model, tmp_path / "one", "int8")
    bare = t.AutoModel.from_pretrained(tmp_path / "one")
    assert torch.equal(bare.encoder.layer[0].output.dense.weight, model.bert.encoder.layer[0].output.dense.weight)
    assert bits(load(tmp_path / "one", device_map="cpu")) == bits(model)
    save_coded(model, tmp_path / "many", "int8", max_shard_size="3KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert bits(load(tmp_path / "many")) == bits(model)
    for device_map in ({"": "disk"}, {"bert": 0, "classifier": "cpu"}):
        with pytest.raises(ValueError, match="offloaded weights cannot be decoded. Load with device_map='cpu', save"):
            load(tmp_path / "one", device_map=device_map)


def test_a_head_that_is_new_is_added_to_a_coded_backbone(tmp_path):
    base = tiny_bert().bert
    hfc.compress(base, "int8")
    save_coded(base, tmp_path, "int8")
    model = t.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert torch.equal(model.bert.encoder.layer[0].output.dense.weight, base.encoder.layer[0].output.dense.weight)


def test_a_loaded_model_is_an_ordinary_one(tmp_path):
    model = with_pattern("vit", "int8")
    save_coded(model, tmp_path / "coded", "int8")
    loaded = load(tmp_path / "coded")
    assert not getattr(loaded, "is_quantized", False)
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.half().dtype == torch.float16
    loaded = load(tmp_path / "coded")
    args = t.TrainingArguments(str(tmp_path / "out"), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    data = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 3} for i in range(4)]
    t.Trainer(model=loaded, args=args, train_dataset=data).train()
    assert bits(loaded) != bits(model)


@pytest.mark.parametrize(("make", "pattern"), [(tiny_bert, "heads:0.5"), (tiny_resnet, "filters:0.5")])
def test_smaller_layers_are_coded_too(tmp_path, make, pattern):
    model = make()
    hfc.compress(model, pattern, remove=True)
    hfc.compress(model, "int8")
    save_coded(model, tmp_path, "int8")
    assert config_of(tmp_path)["quantization_config"].keys() == {"quant_method", "layers", "coded"}
    loaded = load(tmp_path)
    assert bits(loaded) == bits(model)
    loaded.save_pretrained(tmp_path / "plain")
    assert config_of(tmp_path / "plain")["quantization_config"].keys() == {"quant_method", "layers"}
    assert bits(load(tmp_path / "plain")) == bits(model)


def test_several_processes_decode_the_same(tmp_path, monkeypatch):
    model = with_pattern("bert", "int8")
    save_coded(model, tmp_path, "int8")
    counts = []
    decode_all = stored.decode_all
    monkeypatch.setattr(stored, "decode_all", lambda *a: (counts.append(a[3]), decode_all(*a))[1])
    monkeypatch.setattr(stored, "_MANY", 0)
    monkeypatch.setattr(stored.os, "cpu_count", lambda: 2)
    assert bits(load(tmp_path)) == bits(model)
    assert counts == [2]


ALONE = """
import sys
sys.modules["hf_compress"] = None
import transformers
try:
    transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print("refused", "mismatch" in str(error) or "size" in str(error))
transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[2])
print("plain")
"""


def test_without_us_loading_fails_and_a_saved_copy_loads(tmp_path):
    model = with_pattern("bert", "int8")
    save_coded(model, tmp_path / "coded", "int8")
    load(tmp_path / "coded").save_pretrained(tmp_path / "plain")
    command = [sys.executable, "-c", ALONE, str(tmp_path / "coded"), str(tmp_path / "plain")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split("\n")[0].startswith("refused"), done.stderr
    assert "plain" in done.stdout


MINILM = ROOT.parent / "shared" / "data" / "minilm_l6"
LOGITS = """
import sys, torch, hf_compress
from transformers import AutoModel
from safetensors.torch import save_file
model = AutoModel.from_pretrained(sys.argv[1]).eval()
ids = torch.arange(2, 1002).reshape(4, 250)
with torch.no_grad():
    save_file({"found": model(ids).last_hidden_state}, sys.argv[2])
"""


@pytest.mark.skipif(not MINILM.is_dir(), reason="the shared MiniLM is not here")
def test_minilm_in_a_fresh_process_gives_what_the_int8_model_gives(tmp_path):
    from safetensors.torch import load_file

    model = t.AutoModel.from_pretrained(MINILM).eval()
    hfc.compress(model, "int8")
    save_coded(model, tmp_path / "coded", "int8")
    found = tmp_path / "found.safetensors"
    subprocess.run([sys.executable, "-c", LOGITS, str(tmp_path / "coded"), str(found)], check=True)
    with torch.no_grad():
        wanted = model(torch.arange(2, 1002).reshape(4, 250)).last_hidden_state
    torch.testing.assert_close(load_file(found)["found"], wanted, rtol=1e-5, atol=1e-5)


def test_what_has_no_whole_numbers_is_refused(tmp_path):
    model = tiny_bert()
    for pattern in (None, "unstructured:0.5", "2:4"):
        with pytest.raises(ValueError, match="storage coded is for whole numbers, and .* has none; use a pattern"):
            save_coded(model, tmp_path / "out", pattern)
    hfc.compress(model, "low_rank:0.75", remove=True)
    with pytest.raises(ValueError, match="a layer in two factors cannot be coded"):
        save_coded(model, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()
