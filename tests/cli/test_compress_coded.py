"""`hf-compress compress --storage`: coded files of any checkpoint, and plain ones of coded checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer

import hf_compress as hfc
from hf_compress.cli import run
from hf_compress.cli.compress import load_checkpoint
from hf_compress.family.storage import as_plain
from tests.cli.conftest import failure
from tests.conftest import tiny_resnet
from tests.text import tiny_text_model

COMPRESS = "compress"


def size_of(folder):
    return (folder / "model.safetensors").stat().st_size


@pytest.fixture
def bert(tmp_path):
    return tiny_text_model(tmp_path / "bert", "text-classification")


def states(*folders):
    return [AutoModelForSequenceClassification.from_pretrained(folder).state_dict() for folder in folders]


@pytest.mark.parametrize("pattern", ["int8", "unstructured:0.8+int8", "int4"])
def test_a_coded_checkpoint_and_back(bert, tmp_path, capsys, pattern):
    coded, dense, again = (tmp_path / name for name in ("coded", "dense", "again"))
    assert run([COMPRESS, str(bert), "--pattern", pattern, "--storage", "coded", "--output_dir", str(coded)]) == 0
    assert "it loads after `import hf_compress`" in capsys.readouterr().out
    assert run([COMPRESS, str(bert), "--pattern", pattern, "--storage", "dense", "--output_dir", str(dense)]) == 0
    assert run([COMPRESS, str(coded), "--storage", "dense", "--output_dir", str(again)]) == 0
    assert "plain tensors" in capsys.readouterr().out
    found = states(coded, dense, again)
    for name, value in found[1].items():
        assert torch.equal(found[0][name], value)
        assert torch.equal(found[2][name], value)
    assert "quantization_config" not in json.loads((again / "config.json").read_text())
    assert size_of(coded) < size_of(again) == size_of(dense)
    assert AutoTokenizer.from_pretrained(coded)("a good film")["input_ids"]


def test_integers_of_compressed_tensors_and_factors_become_plain(bert, tmp_path, capsys):
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    int8, plain = tmp_path / "int8", tmp_path / "plain"
    assert run([COMPRESS, str(bert), "--pattern", "int8", "--output_dir", str(int8)]) == 0
    assert "quantization_config" in json.loads((int8 / "config.json").read_text())
    assert run([COMPRESS, str(int8), "--storage", "dense", "--output_dir", str(plain)]) == 0, capsys.readouterr().err
    hfc.compress(model, "int8")
    (found,) = states(plain)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    factored = tmp_path / "factored"
    assert run([COMPRESS, str(bert), "--pattern", "low_rank:0.75", "--output_dir", str(factored)]) == 0
    message = failure(capsys, COMPRESS, str(factored), "--storage", "dense", "--output_dir", str(tmp_path / "x"))
    assert "layers in two factors have no plain form" in message
    message = failure(
        *(capsys, COMPRESS, factored, "--pattern", "int8", "--storage", "coded", "--output_dir", tmp_path / "x")
    )
    assert "a layer in two factors cannot be coded; leave storage out" in message
    assert {path.name for path in tmp_path.iterdir()} == {"bert", "int8", "plain", "factored"}


def test_a_family_of_coded_variants(tmp_path, capsys):
    tiny_resnet().save_pretrained(tmp_path / "model")
    argv = [COMPRESS, str(tmp_path / "model"), "--storage", "coded", "--output_dir", str(tmp_path / "family")]
    assert run([*argv, "--pattern", "int8", "--pattern", "2:4+int8"]) == 0, capsys.readouterr().err
    family = hfc.load_family(tmp_path / "family")
    assert [v.storage for v in family.checkpoints] == ["dense", "coded", "coded"]
    assert [v.loads_with for v in family.checkpoints] == ["transformers", "hf_compress", "hf_compress"]
    assert family["2:4+int8"].bytes < family["int8"].bytes < family.dense.bytes


def test_every_coded_variant_has_the_tokenizer(bert, tmp_path):
    argv = [COMPRESS, str(bert), "--storage", "coded", "--output_dir", str(tmp_path / "family")]
    assert run([*argv, "--pattern", "int8", "--pattern", "unstructured:0.8+int8"]) == 0
    family = hfc.load_family(tmp_path / "family")
    for variant in family.checkpoints:
        tokenizer = AutoTokenizer.from_pretrained(family.path_to(variant))
        assert tokenizer("a good film")["input_ids"] == AutoTokenizer.from_pretrained(bert)("a good film")["input_ids"]


def test_smaller_layers_are_coded_in_a_second_step(bert, tmp_path, capsys):
    small, coded, plain = (tmp_path / name for name in ("small", "coded", "plain"))
    assert run([COMPRESS, str(bert), "--pattern", "heads:0.5", "--remove", "--output_dir", str(small)]) == 0
    assert run([COMPRESS, str(small), "--pattern", "int8", "--storage", "coded", "--output_dir", str(coded)]) == 0
    capsys.readouterr()
    assert run([COMPRESS, str(coded), "--storage", "dense", "--output_dir", str(plain)]) == 0
    # Its tensors are plain, but no config can say how many heads each layer has.
    assert "plain tensors; it loads after `import hf_compress`" in capsys.readouterr().out
    kinds = [json.loads((f / "config.json").read_text())["quantization_config"].keys() for f in (coded, plain)]
    assert kinds == [{"quant_method", "layers", "coded"}, {"quant_method", "layers"}]
    found = states(coded, plain)
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


def llama():
    import transformers as t

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = t.LlamaForCausalLM(t.LlamaConfig(vocab_size=64, **sizes, tie_word_embeddings=True)).to(torch.bfloat16)
    model.model.norm.float()
    model.generation_config.max_length = 33
    return model


def test_a_checkpoint_in_integers_is_compressed_like_any_other(tmp_path, capsys):
    """In the types that its parts have, with tied weights and settings of generation."""
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(tmp_path / "model")
    model, int8 = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "int8"
    assert run([COMPRESS, str(tmp_path / "model"), "--pattern", "int8", "--output_dir", str(int8)]) == 0
    assert json.loads((int8 / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    hfc.compress(model, "int8")
    plain = as_plain(load_checkpoint(str(int8))[0])
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    for flags in (["--storage", "dense"], ["--storage", "coded", "--pattern", "int8"], ["--pattern", "2:4"]):
        out = tmp_path / "".join(flags)
        assert run([COMPRESS, str(int8), *flags, "--output_dir", str(out)]) == 0, capsys.readouterr().err
        loaded = AutoModelForCausalLM.from_pretrained(out)
        if "2:4" in flags:
            hfc.compress(model, "2:4")
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert loaded.generation_config.max_length == 33
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)
            assert loaded.state_dict()[name].dtype == value.dtype


def test_the_rest_takes_16_bits_on_request(tmp_path, capsys):
    tiny_resnet().save_pretrained(tmp_path / "model")
    with torch.no_grad():
        model = tiny_resnet().train()
        model(torch.randn(4, 3, 8, 8))
    model.save_pretrained(tmp_path / "model")
    argv = [COMPRESS, str(tmp_path / "model"), "--storage", "coded", "--pattern", "int8", "--output_dir"]
    assert run([*argv, str(tmp_path / "wide")]) == 0
    assert run([*argv, str(tmp_path / "half"), "--half_rest", "--fold_batch_norm"]) == 0, capsys.readouterr().err
    assert size_of(tmp_path / "half") < size_of(tmp_path / "wide")
    wide, half = (
        AutoModelForImageClassification.from_pretrained(tmp_path / name).eval()(torch.ones(1, 3, 8, 8)).logits
        for name in ("wide", "half")
    )
    torch.testing.assert_close(half, wide, rtol=5e-3, atol=5e-3)


def test_mistakes_are_named(bert, tmp_path, capsys):
    out = ["--output_dir", str(tmp_path / "out")]
    message = failure(capsys, COMPRESS, str(bert), "--pattern", "unstructured:0.5", "--storage", "coded", *out)
    assert "storage coded is for whole numbers, which unstructured:0.5 does not give; add int8" in message
    assert "no --pattern: give one" in failure(capsys, COMPRESS, str(bert), *out)
    assert "no --pattern: give one" in failure(capsys, COMPRESS, str(bert), "--storage", "coded", *out)
    coded = ["--storage", "coded", *out]
    assert "made by a training" in failure(capsys, COMPRESS, str(bert), "--pattern", "lilnetx", *coded)
    message = failure(capsys, COMPRESS, str(bert), "--pattern", "int8", "--pattern", "2:4", *coded)
    assert "which 2:4 does not give; add int8, as in 2:4+int8" in message
    message = failure(capsys, COMPRESS, str(bert), "--pattern", "neurons:0.5+int8", "--remove", *coded)
    assert "neurons:0.5+int8 writes zeros or rounds: drop it" in message
    with pytest.raises(SystemExit):
        run([COMPRESS, str(bert), "--pattern", "int8", "--storage", "int8", *out])
    assert "invalid choice: 'int8'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bert"]
