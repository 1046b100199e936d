"""Checkpoints with layers in two factors: from disk the same model, without us an error, from strangers no harm."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers as t
from safetensors.torch import load_file
from transformers.distributed import DistributedConfig

import hf_compress as hfc
from hf_compress.structure import describe, factored_layers
from tests.conftest import image_samples, text_samples, tiny_bert, tiny_resnet, tiny_vit
from tests.loading.conftest import MODELS, bits, load, logits_of, same_logits

PATTERN = "low_rank:0.75"
# Of these a checkpoint holds query, key and value in one tensor, so that they keep their shape.
MERGED = {"nomic": 6}


@pytest.fixture(scope="module")
def factored(tmp_path_factory):
    """For each of MODELS the dense model, the one in factors, and a folder with its checkpoint."""
    made = {}
    for name, make in MODELS.items():
        t.set_seed(0)
        model = make().eval()
        dense = copy.deepcopy(model)
        report = hfc.compress(model, PATTERN, remove=True)
        assert report.parameters_removed > 0
        assert len(report.skipped) == MERGED.get(name, 0)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        made[name] = dense, model, folder
    return made


@pytest.mark.parametrize("name", MODELS)
def test_from_disk_it_is_the_same_model(factored, name):
    dense, model, folder = factored[name]
    loaded, info = load(folder, output_loading_info=True)
    assert not any(info.values())
    assert bits(loaded) == bits(model)
    assert same_logits(loaded, model)
    before = logits_of(dense)
    hfc.compress(dense, PATTERN)
    torch.testing.assert_close(logits_of(loaded), logits_of(dense), rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits_of(loaded), before)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_a_plain_model_and_can_be_saved_again(factored, tmp_path, name):
    _, model, folder = factored[name]
    loaded = load(folder)
    assert not loaded.is_quantized
    assert getattr(loaded, "hf_quantizer", None) is None
    assert loaded.config.quantization_config == json.loads((folder / "config.json").read_text())["quantization_config"]
    loaded.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert bits(again) == bits(model)
    assert describe(again) == describe(model)
    assert {p.dtype for p in again.half().parameters()} == {torch.float16}


@pytest.mark.parametrize("name", ["bert", "vit", "timm", "gpt2", "t5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_in_another_type(factored, name, dtype):
    _, model, folder = factored[name]
    loaded = load(folder, dtype=dtype)
    for key, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(key).to(parameter.dtype))
    kept = {"wo"} if name == "t5" and dtype == torch.float16 else set()  # transformers keeps it in float32
    for layer_name, layer in factored_layers(loaded):
        wide = dtype == "auto" or layer_name.split(".")[-1] in kept
        assert {p.dtype for p in layer.parameters()} == {torch.float32 if wide else dtype}


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}])
def test_with_a_device_map(factored, options):
    _, model, folder = factored["bert"]
    assert bits(load(folder, **options)) == bits(model)


@pytest.mark.parametrize("name", ["bert", "vit", "timm"])
def test_in_many_files(factored, tmp_path, name):
    _, model, _ = factored[name]
    model.save_pretrained(tmp_path, max_shard_size="4KB" if name != "timm" else "2MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert bits(load(tmp_path)) == bits(model)


def test_auto_classes(factored):
    for name, auto in (
        ("bert", t.AutoModelForSequenceClassification),
        ("vit", t.AutoModelForImageClassification),
        ("timm", t.AutoModelForImageClassification),
        ("gpt2", t.AutoModelForCausalLM),
        ("t5", t.AutoModelForSeq2SeqLM),
    ):
        _, model, folder = factored[name]
        loaded = auto.from_pretrained(folder)
        assert type(loaded) is type(model)
        assert bits(loaded) == bits(model)
        assert same_logits(loaded, model)


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "nomic"])
def test_the_bare_model_of_a_task_checkpoint_and_back(factored, tmp_path, name):
    _, model, folder = factored[name]
    bare = t.AutoModel.from_pretrained(folder)
    backbone = model.base_model
    for key, parameter in backbone.named_parameters():
        assert torch.equal(bare.get_parameter(key), parameter)
    bare.save_pretrained(tmp_path)
    task, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert all(torch.equal(p, task.base_model.get_parameter(n)) for n, p in backbone.named_parameters())
    assert not info["mismatched_keys"]


def test_the_bare_model_of_a_checkpoint_whose_head_has_factors(factored):
    _, model, folder = factored["timm"]
    assert "timm_model.fc" in describe(model)
    bare = t.AutoModel.from_pretrained(folder)
    assert describe(bare) == {n: d for n, d in describe(model).items() if n != "timm_model.fc"}


def test_another_head_on_the_same_body(factored):
    _, model, folder = factored["bert"]
    tagger = t.AutoModelForTokenClassification.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)
    assert tagger.classifier.weight.shape == (5, 16)
    assert describe(tagger) == {n: d for n, d in describe(model).items() if "pooler" not in n}


def test_a_pipeline(factored, tmp_path):
    shutil.copytree(factored["vit"][2], tmp_path, dirs_exist_ok=True)
    t.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    from PIL import Image

    answer = t.pipeline("image-classification", model=str(tmp_path))(Image.new("RGB", (8, 8)), top_k=3)
    assert sorted(a["label"] for a in answer) == ["LABEL_0", "LABEL_1", "LABEL_2"]


@pytest.mark.parametrize("pattern", ["low_rank:0.2:energy", "low_rank:0.6:parameters"])
def test_ranks_of_their_own(tmp_path, pattern):
    for name in ("bert", "nomic"):
        t.set_seed(0)
        model = MODELS[name]().eval()
        hfc.compress(model, pattern, remove=True)
        assert len({d["rank"] for d in describe(model).values()}) > 1
        model.save_pretrained(tmp_path / name)
        assert torch.equal(logits_of(load(tmp_path / name)), logits_of(model))


WITHOUT_US = """
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
            print("mismatched" if "size mismatch" in str(error) or "mismatched" in str(error) else error)
"""


def test_without_us_nothing_is_loaded(factored):
    folders = [str(factored[name][2]) for name in MODELS]
    done = subprocess.run([sys.executable, "-c", WITHOUT_US, *folders], capture_output=True, text=True)
    assert done.stdout.split("\n")[:-1] == ["mismatched"] * 2 * len(MODELS), done.stderr


def test_every_stored_factor_has_an_impossible_shape(factored):
    for name in MODELS:
        dense, model, _ = factored[name]
        modules = dict(dense.named_modules())
        for layer, new in factored_layers(model):
            assert modules[layer].weight.shape != new.weight.shape


WITH_US = """
import sys
import transformers.quantizers, hf_compress
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
print(sum(type(m).__name__ == "FactoredLinear" for m in model.modules()))
"""


def test_importing_us_is_enough(factored):
    _, model, folder = factored["bert"]
    done = subprocess.run([sys.executable, "-c", WITH_US, str(folder)], capture_output=True, text=True)
    assert done.stdout.strip() == str(len(list(factored_layers(model)))), done.stderr


def with_config(folder, destination, layers):
    shutil.copytree(folder, destination, dirs_exist_ok=True)
    config = json.loads((destination / "config.json").read_text())
    config["quantization_config"]["layers"] = layers
    (destination / "config.json").write_text(json.dumps(config))
    return destination


NAME = "bert.encoder.layer.0.intermediate.dense"
GOOD = {"kind": "factored", "rank": 4}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "is an object, got list"),
        ("all", "is an object, got str"),
        ({NAME: {"kind": "factored", "rank": 0}}, "rank of at least 1 and below 16, got 0"),
        ({NAME: {"kind": "factored", "rank": 10**15}}, "rank of at least 1 and below 16, got 1000000000000000"),
        ({NAME: {"kind": "factored", "rank": "4"}}, "rank of at least 1"),
        ({NAME: {"kind": "removed", "rank": 4}}, "described by"),
        ({NAME: {"kind": "factored"}}, "described by"),
        ({NAME: None}, "described by None"),
        ({"bert.encoder.layer.7.intermediate.dense": GOOD}, "no layer of this model"),
        ({"../../secret": GOOD}, "no layer of this model"),
        ({"bert.__class__": GOOD}, "no layer of this model"),
        ({"bert.embeddings.word_embeddings": GOOD}, "no layer of this model"),
        ({NAME: GOOD, NAME.removeprefix("bert."): GOOD}, "described twice"),
    ],
)
def test_a_hostile_config_is_an_error(factored, tmp_path, layers, message):
    folder = with_config(factored["bert"][2], tmp_path, layers)
    with pytest.raises(ValueError, match=f"quantization_config of this checkpoint is wrong.*{message}.*--upgrade"):
        load(folder)


@pytest.mark.parametrize("layers", [{}, {NAME: GOOD}, {NAME: {"kind": "factored", "rank": 5}}])
def test_a_description_that_is_not_of_these_weights(factored, tmp_path, layers):
    folder = with_config(factored["bert"][2], tmp_path, layers)
    with pytest.raises(RuntimeError, match="mismatch"):
        load(folder)


def test_a_factored_checkpoint_is_not_pruned_while_it_is_loaded(factored):
    with pytest.raises(ValueError, match="quantized with StoredConfig but you are passing a HfCompressConfig"):
        load(factored["bert"][2], quantization_config=hfc.HfCompressConfig("2:4"))


def test_layers_are_no_option_of_a_user(checkpoints):
    with pytest.raises(ValueError, match="layers and coded describe a stored checkpoint"):
        load(checkpoints / "bert", quantization_config={"quant_method": "hf_compress", "layers": {}})


def test_weights_dealt_to_processes_are_refused(factored, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="changed shapes cannot be dealt to processes"):
            load(factored["bert"][2], distributed_config=DistributedConfig(tp_size=1))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_the_stock_trainer_fine_tunes_it(factored, tmp_path, name):
    _, model, folder = factored[name]
    options = {"learning_rate": 0.01, "max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 8}
    args = t.TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none", logging_steps=1, **options)
    samples = image_samples() if name == "vit" else text_samples()
    trainer = t.Trainer(model=load(folder), args=args, train_dataset=samples)
    trainer.train()
    moved = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert {f"{n}.weight" for n in describe(model)} | {f"{n}.factor.weight" for n in describe(model)} <= set(moved)
    trainer.save_model(str(tmp_path / "tuned"))
    assert bits(load(tmp_path / "tuned")) == bits(trainer.model)
    if name == "vit":
        return  # names on disk are not those in the model: transformers#43701
    halfway = t.Trainer(model=load(folder), args=args, train_dataset=samples)
    halfway.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert bits(halfway.model) == bits(trainer.model)


def test_while_loading_groups_and_ranks_are_pruned_too(checkpoints):
    for name, pattern in (("bert", "neurons:0.5"), ("bert", "heads:0.5"), ("timm", "filters:0.5"), ("gpt2", PATTERN)):
        expected = load(checkpoints / name)
        hfc.compress(expected, pattern)
        loaded = load(checkpoints / name, quantization_config=hfc.HfCompressConfig(pattern))
        assert bits(loaded) == bits(expected)
        assert not hasattr(loaded.config, "quantization_config")


def test_a_lent_state_keeps_its_biases(checkpoints):
    state = load_file(checkpoints / "bert" / "model.safetensors")
    state = {name: value + 0.5 if name.endswith("bias") else value for name, value in state.items()}
    before = {name: value.clone() for name, value in state.items()}
    config = t.AutoConfig.from_pretrained(checkpoints / "bert")
    model = t.BertForSequenceClassification.from_pretrained(
        None, config=config, state_dict=state, quantization_config=hfc.HfCompressConfig("neurons:0.5")
    )
    assert (model.bert.encoder.layer[0].intermediate.dense.bias == 0).sum() == 12
    assert all(torch.equal(state[name], before[name]) for name in state)


@pytest.mark.parametrize("make", [tiny_bert, tiny_vit, tiny_resnet])
def test_the_stored_model_has_fewer_bytes(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path / "dense")
    hfc.compress(model, PATTERN, remove=True)
    model.save_pretrained(tmp_path / "factored")
    dense, small = (load_file(tmp_path / n / "model.safetensors") for n in ("dense", "factored"))
    assert sum(v.numel() for v in small.values()) < sum(v.numel() for v in dense.values())
