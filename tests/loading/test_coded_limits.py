"""What coded checkpoints leave behind in a loaded model (nothing), and ways of loading that they take or refuse."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers as t
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import WeightConverter
from transformers.distributed import DistributedConfig

import hf_compress as hfc
from hf_compress.family.coded import round_rest_, save_coded
from hf_compress.loading import GROUPS
from hf_compress.methods.lilnetx import bake, reparametrize
from hf_compress.structure import describe, remove, write_description
from tests.conftest import tiny_bert, tiny_resnet
from tests.loading.conftest import MODELS, bits, load, same_logits

PATTERNS = ["int8", "int4", "2:4+int8", "unstructured:0.8+int8"]
ALL = {**MODELS, "resnet": tiny_resnet}


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """For each of ALL a model in int8, and a folder with its coded checkpoint."""
    made = {}
    for name, make in ALL.items():
        t.set_seed(0)
        model = make().eval()
        hfc.compress(model, "int8")
        folder = tmp_path_factory.mktemp(name)
        save_coded(model, folder, "int8")
        made[name] = model, folder
    return made


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["vit", "gpt2", "resnet"])
def test_the_patterns_that_end_with_integers(tmp_path, name, pattern):
    t.set_seed(0)
    model = ALL[name]()
    hfc.compress(model, pattern)
    save_coded(model, tmp_path, pattern)
    assert bits(load(tmp_path)) == bits(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_models_in_another_type_than_float32(tmp_path, name, dtype):
    model = ALL[name]().to(dtype)
    hfc.compress(model, "int4")
    save_coded(model, tmp_path, "int4")
    assert bits(load(tmp_path)) == bits(model)


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_left_of_the_loader(coded, tmp_path, name):
    folder = coded[name][1]
    plain_folder = tmp_path / "plain"
    load(folder).save_pretrained(plain_folder)
    loaded, plain = load(folder), load(plain_folder)
    assert vars(loaded).keys() - vars(plain).keys() == {"is_quantized"}
    assert loaded.is_quantized is False
    assert loaded._keys_to_ignore_on_load_unexpected == plain._keys_to_ignore_on_load_unexpected
    assert not any(type(c) is WeightConverter for c in loaded._weight_conversions) or name == "nomic"
    for a, b in zip(loaded.modules(), plain.modules(), strict=True):
        assert (type(a), a.training, set(a._forward_hooks)) == (type(b), False, set())
        if hasattr(a, "config"):
            assert vars(a.config) | {"_name_or_path": ""} == vars(b.config) | {"_name_or_path": ""}
    for a, b in zip(loaded.parameters(), plain.parameters(), strict=True):
        assert (a.dtype, a.requires_grad, a.is_contiguous(), vars(a)) == (b.dtype, True, True, vars(b))
    # The name of the groups has transformers believe that timm's own names were in the file, without "timm_model.".
    names = [
        {n.removeprefix("timm_model.") for n in load_file(f / "model.safetensors")} for f in (folder, plain_folder)
    ]
    assert names[0] - names[1] == {GROUPS}


def test_tied_weights_are_stored_once(tmp_path):
    for name, others in (("gpt2", ["lm_head.weight"]), ("t5", ["encoder.embed_tokens.weight", "lm_head.weight"])):
        model = MODELS[name]()
        round_rest_(model)
        hfc.compress(model, "int8")
        save_coded(model, tmp_path / name, "int8")
        stored = load_file(tmp_path / name / "model.safetensors")
        assert not stored.keys() & set(others)
        assert stored["shared.weight" if name == "t5" else "transformer.wte.weight"].dtype == torch.float16
        assert bits(load(tmp_path / name)) == bits(model)


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "nomic", "timm", "resnet"])
def test_the_bare_model_of_a_task_checkpoint(coded, name):
    model, folder = coded[name]
    bare, info = t.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] - {"pooler.dense.weight", "pooler.dense.bias"}
    own = dict(model.named_parameters())
    prefix = f"{model.base_model_prefix}." if name != "timm" else ""
    for key, parameter in bare.named_parameters():
        if "pooler" not in key or name == "bert":
            assert torch.equal(parameter, own[prefix + key])


def test_weights_whose_names_end_alike(tmp_path):
    """Only conv1 of the stem is coded; every block has a conv1, too."""
    model = MODELS["timm"]()
    globs = ["timm_model.layer1.0.conv1"]
    hfc.compress(model, "int8", include=globs)
    save_coded(model, tmp_path, "int8", include=globs)
    assert [n for n, v in load_file(tmp_path / "model.safetensors").items() if v.dtype == torch.uint8] == [
        GROUPS,
        "timm_model.layer1.0.conv1.weight",
    ]
    assert bits(load(tmp_path)) == bits(model)
    assert bits(load(tmp_path, dtype=torch.bfloat16)) == bits(model.bfloat16())


def test_a_new_head_in_place_of_a_coded_one(coded, caplog):
    model, folder = coded["timm"]
    auto = t.AutoModelForImageClassification
    with pytest.raises(RuntimeError, match="mismatch"):
        auto.from_pretrained(folder, num_labels=5)
    assert "torch.Size([3, 512]) vs model:torch.Size([5, 512])" in caplog.text
    fresh, info = auto.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True)
    assert {key for key, *_ in info["mismatched_keys"]} == {"timm_model.fc.weight", "timm_model.fc.bias"}
    assert 0 < fresh.timm_model.fc.weight.abs().max() < 10
    assert torch.equal(fresh.timm_model.conv1[0].weight, model.timm_model.conv1[0].weight)


def test_a_head_of_another_task(coded):
    model, folder = coded["bert"]
    tagger, info = t.AutoModelForTokenClassification.from_pretrained(folder, num_labels=3, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(
        tagger.bert.encoder.layer[0].output.dense.weight, model.bert.encoder.layer[0].output.dense.weight
    )


def test_neurons_of_different_numbers_and_coded(tmp_path):
    model = tiny_bert().eval()
    hfc.compress(model, "heads:0.5", remove=True)
    remove(model, {"bert.encoder.layer.0.intermediate.dense": [0, 7, 9]})
    write_description(model)
    hfc.compress(model, "2:4+int8")
    save_coded(model, tmp_path, "2:4+int8")
    loaded = load(tmp_path)
    assert describe(loaded) == describe(model) != {}
    assert bits(loaded) == bits(model)
    assert same_logits(loaded, model)


def test_a_state_dict_of_the_caller(coded):
    model, folder = coded["bert"]
    config = t.AutoConfig.from_pretrained(folder)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    loaded = type(model).from_pretrained(None, config=config, state_dict=dict(plain))
    assert bits(loaded) == bits(model)
    assert not hasattr(loaded.config, "quantization_config")
    state = load_file(folder / "model.safetensors")
    before = {name: value.clone() for name, value in state.items()}
    with pytest.raises(ValueError, match=f"there are coded weights, and no file with {GROUPS}"):
        type(model).from_pretrained(None, config=config, state_dict=state)
    assert all(torch.equal(state[name], value) for name, value in before.items())


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_shards_of_others(coded, tmp_path, name):
    """Split again by the Hub's own tools, so that the shared tables lie in any one of the files."""
    model, folder = coded[name]
    save_torch_state_dict(load_file(folder / "model.safetensors"), tmp_path, max_shard_size="2KB")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert bits(load(tmp_path)) == bits(model)


def test_devices(coded, tmp_path):
    model, folder = coded["bert"]
    for device_map in ("auto", "cpu", {"": "cpu"}):
        assert bits(load(folder, device_map=device_map)) == bits(model)
    shapes = {name: value.shape for name, value in load(folder, device_map="meta").state_dict().items()}
    assert shapes == {name: value.shape for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="device_map puts weights on disk; offloaded weights cannot be decoded"):
        load(folder, device_map="auto", max_memory={"cpu": "4KB"}, offload_folder=tmp_path)


def test_processes_and_other_configs_are_refused(coded, checkpoints, tmp_path):
    folder = coded["bert"][1]
    with pytest.raises(ValueError, match="quantized with StoredConfig but you are passing a HfCompressConfig"):
        load(folder, quantization_config=hfc.HfCompressConfig("2:4"))
    entry = {"quant_method": "hf_compress", "coded": {"version": 1, "weights": []}}
    with pytest.raises(ValueError, match="layers and coded describe a stored checkpoint"):
        load(checkpoints / "bert", quantization_config=entry)
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="coded weights cannot be dealt to processes"):
            load(folder, distributed_config=DistributedConfig(tp_size=1))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("change", ["uncompressed", "cast", "more bits"])
def test_only_what_comes_back_as_it_is_is_saved(tmp_path, change):
    model = tiny_bert()
    if change != "uncompressed":
        hfc.compress(model, "int8")
    model = model.half() if change == "cast" else model
    with pytest.raises(ValueError, match="has other values than int. gives it; compress the model in the type"):
        save_coded(model, tmp_path / "out", "int4" if change == "more bits" else "int8")
    assert not (tmp_path / "out").exists()


def test_latents_with_a_head_and_slices_of_every_kind(tmp_path):
    t.set_seed(0)
    model = tiny_resnet().eval()
    reparametrize(model, include=["*"], decoders="layer", init="uniform")
    save_coded(model, tmp_path)
    assert (
        "classifier.1.weight"
        in json.loads((tmp_path / "config.json").read_text())["quantization_config"]["coded"]["weights"]
    )
    bake(model)
    loaded = load(tmp_path)
    assert bits(loaded) == bits(model)
    assert same_logits(loaded, model)


STRANGER = """
import sys
sys.modules["hf_compress"] = None
import transformers
for folder in sys.argv[1:]:
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    for auto in (getattr(transformers, name), transformers.AutoModel):
        try:
            auto.from_pretrained(folder)
            print("loaded")
        except RuntimeError as error:
            print("mismatched" if "mismatched" in str(error) else error)
"""


def test_without_us_none_of_them_is_loaded(coded):
    names = [name for name in ALL if name != "t5"]  # AutoModel of it asks for nothing that the others do not
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *(str(coded[name][1]) for name in names)], capture_output=True, text=True
    )
    assert done.stdout.split("\n")[:-1] == ["mismatched"] * 2 * len(names), done.stderr


def test_training_goes_on_from_its_checkpoint(coded, tmp_path):
    _, folder = coded["bert"]
    ids = torch.randint(5, 64, (16, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row.sum() % 3} for row in ids]
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 0.01}
    args = t.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, **options)
    trainer = t.Trainer(model=load(folder), args=args, train_dataset=data)
    trainer.train()
    halfway = t.Trainer(model=load(folder), args=args, train_dataset=data)
    halfway.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert bits(halfway.model) == bits(trainer.model)
    assert bits(load(tmp_path / "checkpoint-4")) == bits(trainer.model)


def test_a_file_of_plain_tensors_that_kept_the_config(coded, tmp_path):
    model, folder = coded["vit"]
    model.save_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert bits(load(tmp_path)) == bits(model)
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if name.endswith("query.weight"))
    save_file(
        {key: value for key, value in state.items() if key != name}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="it lacks 1 of its coded weights, first vit"):
        load(tmp_path)
