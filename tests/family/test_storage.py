"""Integers on disk: what stock transformers reads, how large it is, and which models stay dense."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

import hf_compress as hfc
from hf_compress.family.storage import integer_weights, load_model
from tests.conftest import ROOT, image_samples, tiny_resnet, tiny_vit

PATTERNS = ["int8", "2:4+int8"]
SIZES = {"vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 256}
QUERY = "bert.encoder.layer.0.attention.self.query"


def bert(head="QuestionAnswering", **overrides):
    transformers.set_seed(0)
    return getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**{**SIZES, **overrides}))


def llama():
    transformers.set_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))


def inputs_of(model):
    torch.manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 8, 8).to(model.dtype)}
    return {"input_ids": torch.randint(0, 32, (2, 6))}


@torch.no_grad()
def logits_of(model):
    return next(v for v in model.eval()(**inputs_of(model)).values() if torch.is_tensor(v)).float()


def projected(family, variant, **globs):
    """The saved dense checkpoint with the variant's pattern applied here."""
    model = load_model(type_of(family), family.folder / "dense")
    hfc.compress(model, variant.pattern, **globs)
    return model


def type_of(family):
    config = json.loads((family.folder / "dense" / "config.json").read_text())
    return Tied if config["architectures"] == ["Tied"] else getattr(transformers, config["architectures"][0])


MODELS = {"bert": bert, "bert-bf16": lambda: bert("SequenceClassification").bfloat16()}
MODELS |= {"vit": tiny_vit, "llama": llama}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    built = {}
    for name, make in MODELS.items():
        model = make().eval()
        inputs = {k: v[:1] for k, v in inputs_of(model).items()}
        built[name] = hfc.build_family(
            model, PATTERNS, lambda m: {"sum": logits_of(m).sum()}, output_dir=folder / name, example_inputs=inputs
        )
    return built


# Runs where hf_compress cannot be imported; saves the logits and the weights that transformers made of each folder.
STRANGER = """
import importlib.abc, json, sys

class Wall(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_compress":
            raise ImportError(name)

sys.meta_path.insert(0, Wall())
try:
    import hf_compress
except ImportError:
    pass
else:
    raise SystemExit("hf_compress is there")
import torch, transformers
from safetensors.torch import save_file
AUTO = {"BertForQuestionAnswering": "AutoModelForQuestionAnswering", "LlamaForCausalLM": "AutoModelForCausalLM",
        "BertForSequenceClassification": "AutoModelForSequenceClassification",
        "ViTForImageClassification": "AutoModelForImageClassification"}
for folder, out in zip(sys.argv[1::2], sys.argv[2::2]):
    name = json.load(open(folder + "/config.json"))["architectures"][0]
    model, info = getattr(transformers, AUTO[name]).from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == name and not any(info.values()), info
    model.eval()
    torch.manual_seed(1)
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8).to(model.dtype)}
    else:
        inputs = {"input_ids": torch.randint(0, 32, (2, 6))}
    with torch.no_grad():
        logits = next(v for v in model(**inputs).values() if torch.is_tensor(v)).float()
    state = {n: p.clone() for n, p in model.named_parameters()}
    save_file({**state, "logits": logits.contiguous()}, out)
assert "hf_compress" not in sys.modules
"""


@pytest.fixture(scope="module")
def strangers(families, tmp_path_factory):
    folder = tmp_path_factory.mktemp("strangers")
    jobs = {(n, v.pattern): folder / f"{n}-{v.revision}" for n, f in families.items() for v in f.variants}
    words = [str(w) for (n, p), out in jobs.items() for w in (families[n].path_to(p), out)]
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *words], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return {job: load_file(out) for job, out in jobs.items()}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", MODELS)
def test_stock_transformers_reads_the_same_model(families, strangers, name, pattern):
    family, found = families[name], strangers[name, pattern]
    assert family[pattern].storage == "int8"
    assert family[pattern].loads_with == "transformers"
    wanted = projected(family, family[pattern])
    assert (found["logits"] - logits_of(wanted)).abs().max() <= 1e-5
    # Parameters are equal to the last bit, in bfloat16 too: codes and scales lose nothing.
    for parameter_name, parameter in wanted.named_parameters():
        assert torch.equal(found[parameter_name], parameter), parameter_name
        assert found[parameter_name].dtype == parameter.dtype
    dense = load_model(type_of(family), family.folder / "dense")
    assert (found["logits"] - logits_of(dense)).abs().max() > 1e-5  # the comparison above can fail


@pytest.mark.parametrize("name", MODELS)
def test_pruned_weights_stay_pruned(families, strangers, name):
    family, found = families[name], strangers[name, "2:4+int8"]
    dense = load_model(type_of(family), family.folder / "dense")
    for target_name, target in hfc.find_targets(dense).items():
        if target.kind != "linear":
            continue
        mask = hfc.NM(2, 4).masks({"w": target.parameter})["w"]
        assert (found[target_name][~mask] == 0).all()
        assert ((found[target_name] != 0).view(-1, 4).sum(1) <= 2).all()
        assert (strangers[name, "int8"][target_name][~mask] != 0).any()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_linear_weights_take_less_than_a_third_of_their_bytes(families, name, pattern):
    family = families[name]
    stored = load_file(family.path_to(pattern) / "model.safetensors")
    targets = hfc.find_targets(load_model(type_of(family), family.folder / "dense"))
    assert len(targets) >= 12
    integers = sum(stored[n].nbytes + stored[f"{n}_scale"].nbytes for n in targets)
    assert integers <= 0.30 * 4 * sum(t.parameter.numel() for t in targets.values())
    assert all(stored[n].dtype == torch.int8 for n in targets)
    saved = family.dense.bytes - family[pattern].bytes
    assert saved >= 0.69 * 4 * sum(t.parameter.numel() for t in targets.values())


@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_those_of_the_weights_and_not_of_their_storage(families, name):
    family = families[name]
    for variant in family.variants:
        wanted = projected(family, variant)
        assert variant.parameters == family.dense.parameters == sum(p.numel() for p in wanted.parameters())
        assert variant.parameters_removed == 0
        assert variant.nonzero == sum(int(torch.count_nonzero(p)) for p in wanted.parameters())
        targets = [t.parameter for t in hfc.find_targets(wanted).values()]
        zeros = sum(int((p == 0).sum()) for p in targets) / sum(p.numel() for p in targets)
        assert variant.sparsity == pytest.approx(zeros)
        assert variant.metrics["sum"] == pytest.approx(logits_of(wanted).sum().item(), abs=1e-4)
        assert variant.macs == family.dense.macs > 0
        assert variant.latency["milliseconds"] > 0
        files = [p for p in family.path_to(variant).rglob("*") if p.is_file()]
        assert variant.bytes == sum(p.stat().st_size for p in files)
    assert family["2:4+int8"].sparsity > 0.4


def test_the_config_says_what_is_stored(families):
    config = json.loads((families["bert"].path_to("int8") / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert (config["format"], config["quantization_status"]) == ("int-quantized", "compressed")
    (group,) = config["config_groups"].values()
    assert group["format"] == "int-quantized"
    assert group["targets"] == ["Linear"]
    wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    assert {k: group["weights"][k] for k in wanted} == wanted
    assert group["input_activations"] is None
    assert config["ignore"] == ["qa_outputs"]


def test_the_manifest_keeps_the_storage(families):
    for family in families.values():
        assert hfc.load_family(family.folder) == family
        content = json.loads((family.folder / "family.json").read_text())
        assert content["dense"]["storage"] == family.dense.storage == "dense"
        assert [v["storage"] for v in content["variants"]] == ["int8", "int8"]
        assert "compressed-tensors" in content["versions"]


def test_tied_embeddings_stay_tied(families):
    family = families["llama"]
    model = transformers.AutoModelForCausalLM.from_pretrained(family.path_to("int8"))
    logits_of(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32
    assert "lm_head.weight" not in load_file(family.path_to("int8") / "model.safetensors")


def test_parts_of_the_model_can_be_called_by_evaluate(tmp_path):
    """The stock model decodes when it is called as a whole; the one that is evaluated has been decoded."""
    model = bert()
    evaluate = lambda m: {"hidden": m.bert(**inputs_of(m)).last_hidden_state.abs().mean()}  # noqa: E731
    family = hfc.build_family(model, ["int8"], evaluate, output_dir=tmp_path / "family")
    assert family["int8"].metrics["hidden"] == pytest.approx(family.dense.metrics["hidden"], rel=0.05)


def test_layers_that_are_no_targets_stay_dense(tmp_path):
    family = hfc.build_family(bert(), ["int8"], output_dir=tmp_path / "family", exclude=[QUERY])
    folder = family.path_to("int8")
    stored = load_file(folder / "model.safetensors")
    assert stored[f"{QUERY}.weight"].dtype == torch.float32
    assert f"{QUERY}.weight_scale" not in stored
    wanted = projected(family, family["int8"], exclude=[QUERY])
    assert torch.equal(stored[f"{QUERY}.weight"], wanted.get_parameter(f"{QUERY}.weight"))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert {QUERY, "qa_outputs"} <= set(config["ignore"])
    # The backbone alone has the same layers under shorter names.
    backbone = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        hidden = backbone(**inputs_of(backbone)).last_hidden_state
        expected = wanted.eval().bert(**inputs_of(wanted)).last_hidden_state
    assert (hidden - expected).abs().max() <= 1e-5


def test_the_patch_embedding_stays_dense_with_rounded_values(families):
    family = families["vit"]
    (name,) = [n for n, t in hfc.find_targets(tiny_vit()).items() if t.kind == "conv"]
    stored = load_file(family.path_to("int8") / "model.safetensors")
    (patches,) = [v for n, v in stored.items() if n.endswith("projection.weight")]
    assert patches.dtype == torch.float32
    assert torch.equal(patches, projected(family, family["int8"]).get_parameter(name))
    assert not torch.equal(patches, tiny_vit().get_parameter(name))


def gpt2():
    transformers.set_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    )


def mixtral():
    """A mixture of experts: transformers wants those in the format too."""
    transformers.set_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_key_value_heads=2))


class Tied(transformers.BertForQuestionAnswering):
    """Two linear layers with one weight."""

    _tied_weights_keys = {  # noqa: RUF012
        "bert.encoder.layer.1.output.dense.weight": "bert.encoder.layer.0.output.dense.weight"
    }


def tied():
    transformers.set_seed(0)
    model = Tied(transformers.BertConfig(**SIZES, tie_word_embeddings=True))
    layers = model.bert.encoder.layer
    assert layers[0].output.dense.weight is layers[1].output.dense.weight
    return model


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (tiny_resnet, "int8"),
        (tiny_resnet, "2:4+int8"),
        (gpt2, "int8"),
        (gpt2, "2:4+int8"),
        (bert, "int4"),
        (bert, "2:4+int6"),
        (tied, "int8"),
        (mixtral, "int8"),
        (lambda: bert().double(), "int8"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_stays_dense(tmp_path, make, pattern):
    family = hfc.build_family(make(), [pattern], output_dir=tmp_path / "family")
    assert family[pattern].storage == "dense"
    folder = family.path_to(pattern)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    loaded = load_model(type_of(family), folder)
    wanted = projected(family, family[pattern])
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), wanted.parameters(), strict=True))
    bits = int(pattern[-1])
    targets = hfc.find_targets(loaded)
    for target in targets.values():
        channels = target.parameter.T if target.kind == "conv1d" else target.parameter.flatten(1)
        assert all(channel.unique().numel() < 2**bits for channel in channels)
    # "claims no size": the files are as large as the dense ones
    assert family[pattern].bytes == pytest.approx(family.dense.bytes, rel=0.01)


@pytest.mark.parametrize("make", [mixtral, lambda: bert().double()])
def test_a_model_that_would_come_back_different_is_saved_dense(tmp_path, monkeypatch, make):
    said = []
    monkeypatch.setattr(transformers.utils.logging.get_logger("hf_compress.family.storage"), "warning", said.append)
    model = make()
    assert integer_weights(model, hfc.parse_pattern("int8"))  # it was tried
    family = hfc.build_family(model, ["int8", "2:4"], output_dir=tmp_path / "family")
    assert [v.storage for v in family.variants] == ["dense", "dense"]
    assert len(said) == 1
    assert f"{type(model).__name__} back from int-quantized" in said[0]


def test_which_weights_become_integers():
    linear = set(hfc.find_targets(bert()))
    for pattern in ("int8", "2:4+int8", "unstructured:0.5+int8"):
        assert set(integer_weights(bert(), hfc.parse_pattern(pattern))) == linear
    for pattern in (None, "2:4", "int7", "2:4+4:8", "unstructured:0.5+int4"):
        assert integer_weights(bert(), hfc.parse_pattern(pattern) if pattern else None) == {}
    assert set(integer_weights(bert(), hfc.parse_pattern("int8"), include=["*query"])) == {
        n for n in linear if n.endswith("query.weight")
    }
    assert integer_weights(tiny_resnet(), hfc.parse_pattern("int8")) == {}
    assert integer_weights(gpt2(), hfc.parse_pattern("int8")) == {}
    vit = integer_weights(tiny_vit(), hfc.parse_pattern("int8"))
    assert len(vit) == len(hfc.find_targets(tiny_vit())) - 1


def test_no_progress_bars_and_no_words(tmp_path, capfd):
    hfc.build_family(tiny_vit(), ["int8"], output_dir=tmp_path / "family")
    assert capfd.readouterr().err == ""


def test_a_trainer_measures_integers(tmp_path):
    args = hfc.CrAMConfig(
        str(tmp_path), max_steps=1, use_cpu=True, report_to="none", patterns=["int8"], disable_tqdm=True
    )
    trainer = hfc.CrAMTrainer(
        model=tiny_vit(),
        args=args,
        train_dataset=image_samples(),
        eval_dataset=image_samples(),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train()
    family = trainer.build_family(["int8", "2:4"])
    assert [v.storage for v in family.variants] == ["int8", "dense"]
    assert set(family["int8"].metrics) == {"loss", "accuracy"}
    assert family["int8"].metrics["loss"] == pytest.approx(family.dense.metrics["loss"], abs=0.02)


RANK = """
import sys, torch, torch.distributed as dist
import hf_compress as hfc
from tests.conftest import tiny_vit
from tests.distributed.launch import end
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}.store", rank=rank, world_size=2)
pixels = torch.ones(1, 3, 8, 8)
evaluate = lambda m: {"sum": m(pixel_values=pixels).logits.sum()}
family = hfc.build_family(tiny_vit(), ["int8"], evaluate, output_dir=folder, example_inputs={"pixel_values": pixels})
print("METRIC", family["int8"].storage, family["int8"].metrics["sum"])
end()
"""


def test_two_processes_write_one_family(tmp_path):
    """Rank 0 alone reads back what it wrote, and compressed-tensors would wait for the other."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words, pipe = [sys.executable, "-c", RANK], subprocess.PIPE
    jobs = [[*words, str(rank), str(tmp_path / "family")] for rank in range(2)]
    ranks = [subprocess.Popen(job, env=environment, stdout=pipe, stderr=pipe, text=True) for job in jobs]
    try:
        outputs = [process.communicate(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [p.returncode for p in ranks] == [0, 0], outputs
    lines = [out.split("METRIC ")[1] for out, _ in outputs]
    assert lines[0] == lines[1]
    assert lines[0].startswith("int8")
    alone = hfc.build_family(tiny_vit(), ["int8"], output_dir=tmp_path / "alone")
    both = hfc.load_family(tmp_path / "family")
    assert replace(both["int8"], metrics={}, macs=None, latency=None) == alone["int8"]
