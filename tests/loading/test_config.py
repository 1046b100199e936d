"""HfCompressConfig: what it takes, what it refuses, and that importing hf_compress is enough."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from transformers.distributed import DistributedConfig
from transformers.quantizers import AutoQuantizationConfig

import hf_compress as hfc
from hf_compress.family.storage import save_model
from tests.conftest import tiny_bert
from tests.loading.conftest import compressed, slide


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("2:4", "2:4"),
        (hfc.NM(2, 4), "2:4"),
        (" unstructured:0.50 ", "unstructured:0.5"),
        ("unstructured:0.5:layer", "unstructured:0.5:layer"),
        (hfc.Unstructured(0), "unstructured:0"),
        (hfc.parse_pattern("2:4+int8"), "2:4+int8"),
    ],
)
@pytest.mark.parametrize("globs", [{}, {"include": ["a.*"]}, {"include": "a", "exclude": ("b", "c")}])
def test_json_there_and_back(pattern, text, globs):
    config = hfc.HfCompressConfig(pattern, **globs)
    assert config.pattern == text
    stored = json.loads(config.to_json_string())
    assert stored == json.loads(json.dumps(config.to_dict()))
    assert stored["quant_method"] == "hf_compress"
    assert hfc.HfCompressConfig.from_dict(stored) == config
    assert AutoQuantizationConfig.from_dict(stored) == config
    assert config != hfc.HfCompressConfig("int3", **globs)


@pytest.mark.parametrize("pattern", ["junk", "unstructured:1.5", "4:2", "", None, 0.5, 124, "int8+2:4"])
def test_a_wrong_pattern_is_refused_by_name(pattern):
    with pytest.raises(ValueError) as expected:
        hfc.parse_pattern(pattern)
    with pytest.raises(ValueError, match=re.escape(str(expected.value))):
        hfc.HfCompressConfig(pattern)


@pytest.mark.parametrize("globs", [[3], [None], ["a", 3.0]])
def test_a_glob_is_a_text(globs):
    with pytest.raises(ValueError, match="exclude is a list of globs"):
        hfc.HfCompressConfig("2:4", exclude=globs)


def test_a_glob_that_matches_nothing(checkpoints):
    with pytest.raises(ValueError, match=r"include='encoderr\.\*' matches no weight"):
        slide(checkpoints / "bert", "2:4", include=["encoderr.*"])


def test_a_model_without_targets(tmp_path):
    model = t.ViTModel(t.ViTConfig(hidden_size=8, num_hidden_layers=0, num_attention_heads=1, intermediate_size=8))
    model.save_pretrained(tmp_path)
    targets = list(hfc.find_targets(model))
    with pytest.raises(ValueError, match="ViTModel has no weight to compress"):
        slide(tmp_path, "2:4", exclude=targets)


def test_nan_is_named(checkpoints, tmp_path):
    stored = load_file(checkpoints / "bert" / "model.safetensors")
    name = "bert.encoder.layer.0.attention.output.dense.weight"
    stored[name][0, 0] = torch.nan
    shutil.copy(checkpoints / "bert" / "config.json", tmp_path)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"weight '{name}' holds NaN"):
        slide(tmp_path, "unstructured:0.5", dtype=torch.float16)


@pytest.mark.parametrize(
    ("device_map", "devices"),
    [({"": "disk"}, "disk"), ({"bert": "cpu", "classifier": "disk"}, "cpu, disk"), ({"bert": "cpu", "": 0}, "0, cpu")],
)
def test_offloaded_weights_are_refused(checkpoints, tmp_path, device_map, devices):
    with pytest.raises(ValueError, match=f"device_map puts weights on {devices}; offloaded weights cannot be pruned"):
        slide(checkpoints / "bert", "2:4", device_map=device_map, offload_folder=tmp_path)


def test_a_device_map_that_turns_out_to_offload_is_refused(checkpoints, tmp_path):
    options = {"device_map": "auto", "max_memory": {"cpu": "8KB"}, "offload_folder": tmp_path}
    with pytest.raises(ValueError, match="offloaded weights cannot be pruned"):
        slide(checkpoints / "bert", "2:4", **options)


def test_weights_dealt_to_processes_are_refused(checkpoints, tmp_path):
    store = (tmp_path / "store").as_uri()
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="dealt to several processes cannot be pruned"):
            slide(checkpoints / "bert", "2:4", distributed_config=DistributedConfig(tp_size=1))
    finally:
        torch.distributed.destroy_process_group()


def test_a_checkpoint_in_integers_is_refused(tmp_path):
    model = t.BertModel(t.BertConfig(vocab_size=64, hidden_size=128, num_hidden_layers=1, num_attention_heads=2))
    hfc.compress(model, "int8")
    assert save_model(model, tmp_path / "int8", hfc.parse_pattern("int8")) == "int8"
    with pytest.raises(ValueError, match="quantized with CompressedTensorsConfig but you are passing a HfCompressConf"):
        slide(tmp_path / "int8", "2:4")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 1, "modules": {}}, "got .*'modules', 'version'"),
        ({"pattern": "2:4", "storage": "coded"}, "got .*'pattern', 'storage'"),
        ({"pattern": "2:4"}, "stored with quant_method 'hf_compress'"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"quantization_config": hfc.HfCompressConfig("2:4")}])
def test_a_checkpoint_of_a_later_version_asks_for_it(checkpoints, tmp_path, fields, message, options):
    shutil.copytree(checkpoints / "bert", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hf_compress", **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{message}.*pip install --upgrade hf_compress"):
        t.AutoModel.from_pretrained(tmp_path, **options)


@pytest.mark.parametrize("trainer", [t.Trainer, hfc.CrAMTrainer])
def test_a_trainer_does_not_take_it_for_its_arguments(trainer):
    with pytest.raises((ValueError, AttributeError), match="HfCompressConfig"):
        trainer(model=tiny_bert(), args=hfc.HfCompressConfig("2:4"))


CHECK = """
import sys
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], quantization_config={"quant_method": "hf_compress", "pattern": "2:4"})
print(sum(int((p == 0).sum()) for n, p in model.named_parameters() if n.endswith("query.weight")))
"""


def in_a_new_process(imports, folder):
    done = subprocess.run([sys.executable, "-c", imports + CHECK, str(folder)], capture_output=True, text=True)
    return done.stdout.strip() or done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_compress, transformers",
        "import transformers.quantizers, hf_compress",
        "from hf_compress import HfCompressConfig",
        "import hf_compress.loading, importlib; importlib.reload(hf_compress.loading); importlib.reload(hf_compress)",
    ],
)
def test_every_order_of_import(checkpoints, imports):
    expected = compressed(checkpoints / "bert", "2:4").bert.encoder.layer[0].attention.self.query.weight
    assert in_a_new_process(imports, checkpoints / "bert") == str(int((expected == 0).sum()))


def test_without_us_it_is_unknown(checkpoints):
    assert "Unknown quantization type, got hf_compress" in in_a_new_process("", checkpoints / "bert")
