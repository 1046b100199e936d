"""`hf-compress compress`: what it takes, what it writes, and what it leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import hf_compress as hfc
from hf_compress.cli import run
from hf_compress.cli.table import VariantPrinter
from tests.cli.conftest import failure
from tests.conftest import image_samples, tiny_resnet, tiny_vit


def test_compress_one_pattern_gives_a_checkpoint(tmp_path, capsys):
    from transformers import AutoModelForImageClassification, ViTImageProcessor

    model = tiny_resnet()
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    argv = ["compress", str(tmp_path / "model"), "--pattern", "2:4", "--output_dir", str(tmp_path / "out")]
    assert run(argv) == 0
    out = capsys.readouterr().out
    assert "left dense: resnet.embedder.embedder.convolution.weight, its reduction axis of 3 is no multiple of 4" in out
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    hfc.compress(model, "2:4")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    assert "out is not empty; choose a new folder" in failure(capsys, *argv)


def test_one_pattern_does_not_take_the_place_of_a_family(tmp_path, capsys):
    tiny_vit().save_pretrained(tmp_path / "model")
    argv = ["compress", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--pattern", "2:4"]
    assert run([*argv, "--pattern", "unstructured:0.5"]) == 0
    assert "only several patterns may replace a family" in failure(capsys, *argv)
    (tmp_path / "out").rename(tmp_path / ".out.old")  # as a process leaves it that dies while it replaces the family
    assert "only several patterns may replace a family" in failure(capsys, *argv)
    assert len(hfc.load_family(tmp_path / "out").variants) == 2
    assert run([*argv, "--pattern", "unstructured:0.9"]) == 0
    assert [v.pattern for v in hfc.load_family(tmp_path / "out").variants] == ["2:4", "unstructured:0.9"]
    (tmp_path / "empty").mkdir()
    assert run(["compress", str(tmp_path / "model"), "--output_dir", str(tmp_path / "empty"), "--pattern", "2:4"]) == 0


def tiny_bert():
    import transformers as t

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    return t.BertForQuestionAnswering(t.BertConfig(vocab_size=32, **sizes))


def test_a_tokenizer_is_saved_only_where_there_is_one(tmp_path, capsys):
    model = tmp_path / "model"
    tiny_bert().save_pretrained(model)
    argv = ["compress", str(model), "--pattern", "2:4", "--output_dir"]
    assert run([*argv, str(tmp_path / "without")]) == 0
    assert {p.name for p in (tmp_path / "without").iterdir()} == {"config.json", "model.safetensors"}
    (model / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word"]))
    assert run([*argv, str(tmp_path / "with")]) == 0
    tokens = json.loads((tmp_path / "with" / "tokenizer.json").read_text())["model"]["vocab"]
    assert "word" in tokens
    (model / "vocab.txt").unlink()
    (model / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    capsys.readouterr()
    assert run([*argv, str(tmp_path / "broken")]) == 0
    assert "left out: the tokenizer or processor of" in capsys.readouterr().err


def test_an_image_processor_alone_does_not_bring_a_tokenizer(tmp_path):
    import transformers as t

    part = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = t.CLIPConfig(
        text_config={**part, "vocab_size": 16}, vision_config={**part, "image_size": 8, "patch_size": 4}
    )
    t.CLIPModel(config).save_pretrained(tmp_path / "model")
    t.CLIPImageProcessor().save_pretrained(tmp_path / "model")
    assert run(["compress", str(tmp_path / "model"), "--pattern", "2:4", "--output_dir", str(tmp_path / "out")]) == 0
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_a_tokenizer_of_a_hub_id_in_the_offline_cache(tmp_path, has_tokenizer):
    snapshot = tmp_path / "home" / "hub" / "models--me--net" / "snapshots" / ("a" * 40)
    tiny_bert().save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    if has_tokenizer:
        (snapshot / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word"]))
    argv = ["compress", "me/net", "--pattern", "2:4", "--output_dir", str(tmp_path / "out")]
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hf_compress", *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "tokenizer.json").is_file() == has_tokenizer


def test_compress_several_patterns_gives_a_family(tmp_path, capsys):
    from transformers import AutoModelForQuestionAnswering

    tiny_bert().save_pretrained(tmp_path / "model")
    argv = ["compress", tmp_path / "model", "--pattern", "2:4", "--pattern", "unstructured:0.8", "--output_dir"]
    assert run([str(w) for w in [*argv, tmp_path / "out"]]) == 0
    family = hfc.load_family(tmp_path / "out")
    assert [v.pattern for v in family.variants] == ["2:4", "unstructured:0.8"]
    assert family.method == "one_shot"
    assert "unstructured:0.8  79.9 %" in capsys.readouterr().out
    AutoModelForQuestionAnswering.from_pretrained(family.path_to("2:4"))


def test_remove_cuts_neurons_and_filters_out(tmp_path, capsys):
    from transformers import AutoModelForImageClassification, TimmWrapperConfig, TimmWrapperForImageClassification

    text, images = tmp_path / "text", tmp_path / "images"
    tiny_bert().save_pretrained(text)
    config = TimmWrapperConfig(architecture="resnet20_cifar", num_labels=3, model_args={"width": 4})
    TimmWrapperForImageClassification(config).save_pretrained(images)
    out = [tmp_path / "neurons", tmp_path / "filters"]
    for model, pattern, folder, more in (
        (text, "neurons:0.8", out[0], ["--multiple_of", "8"]),
        (images, "filters:0.5", out[1], []),
    ):
        flags = ["--pattern", pattern, "--output_dir", str(folder), "--remove", *more]
        assert run(["compress", str(model), *flags]) == 0
    plain, described = (line for line in capsys.readouterr().out.splitlines() if line.startswith("saved"))
    assert "parameters removed" in plain
    assert "import hf_compress" not in plain
    assert "kB; it loads after `import hf_compress`" in described
    assert json.loads((out[0] / "config.json").read_text())["intermediate_size"] == 8  # 4 of 16 without a multiple
    assert AutoModelForImageClassification.from_pretrained(out[1]).timm_model.layer1[0].conv1.out_channels == 2
    assert run(["compress", str(text), "--pattern", "2:4", "--remove", "--output_dir", str(tmp_path / "no")]) != 0
    assert "2:4 writes zeros" in capsys.readouterr().err


def test_a_family_of_smaller_models(tmp_path, capsys):
    tiny_bert().save_pretrained(tmp_path / "model")
    patterns = [word for pattern in ("neurons:0.5", "heads:0.5", "2:4") for word in ("--pattern", pattern)]
    assert run(["compress", str(tmp_path / "model"), *patterns, "--remove", "--output_dir", str(tmp_path / "out")]) == 0
    dense, neurons, heads, zeros = hfc.load_family(tmp_path / "out").checkpoints
    assert [v.loads_with == "hf_compress" for v in (dense, neurons, heads, zeros)] == [False, False, True, False]
    assert [v.parameters_removed > 0 for v in (dense, neurons, heads, zeros)] == [False, True, True, False]
    assert heads.parameters == dense.parameters - heads.parameters_removed


def test_compress_a_timm_checkpoint(tmp_path):
    from transformers import AutoModelForImageClassification, TimmWrapperConfig, TimmWrapperForImageClassification

    config = TimmWrapperConfig(architecture="resnet20_cifar", num_labels=3, model_args={"width": 4})
    TimmWrapperForImageClassification(config).save_pretrained(tmp_path / "model")
    assert run(["compress", str(tmp_path / "model"), "--pattern", "2:4", "--output_dir", str(tmp_path / "out")]) == 0
    weight = AutoModelForImageClassification.from_pretrained(tmp_path / "out").timm_model.layer1[0].conv1.weight
    assert (weight.movedim(1, -1).unflatten(-1, (-1, 4)) != 0).sum(-1).eq(2).all()


def test_compress_a_checkpoint_that_timm_saved(tmp_path):
    import timm
    from timm.models import save_for_hf
    from transformers import AutoModelForImageClassification

    save_for_hf(
        timm.create_model("resnet20_cifar", num_classes=3, width=4), tmp_path / "model", safe_serialization=True
    )
    assert "num_classes" in json.loads((tmp_path / "model" / "config.json").read_text())["model_args"]
    assert run(["compress", str(tmp_path / "model"), "--pattern", "2:4", "--output_dir", str(tmp_path / "out")]) == 0
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out").timm_model
    native = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(native.parameters(), loaded.parameters(), strict=True))
    assert native.num_classes == 3


@pytest.mark.parametrize("field", ["hidden_size", "model_args", "architecture"])
def test_a_config_that_makes_no_model(tmp_path, capsys, field):
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    model = tiny_vit()
    if field != "hidden_size":
        arguments = {"architecture": "resnet20_cifar", "model_args": {"width": 4}}
        model = TimmWrapperForImageClassification(TimmWrapperConfig(num_labels=3, **arguments))
    model.save_pretrained(tmp_path / "model")
    wrong = {"hidden_size": "wide", "model_args": {"foo": 1}, "architecture": "no_such_net"}[field]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, field: wrong}))
    message = failure(capsys, "compress", tmp_path / "model", "--pattern", "2:4", "--output_dir", tmp_path / "out")
    assert f"cannot load {tmp_path / 'model'}" in message


@pytest.mark.parametrize("damage", ["missing", "truncated", "no weights", "lacks a weight", "class"])
def test_compress_a_broken_checkpoint(tmp_path, capsys, damage):
    from safetensors.torch import load_file, save_file

    model, weights = tmp_path / "model", tmp_path / "model" / "model.safetensors"
    if damage != "missing":
        tiny_vit().save_pretrained(model)
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "lacks a weight":
        tensors = load_file(weights)
        tensors.pop("classifier.weight")
        save_file(tensors, weights, {"format": "pt"})
    elif damage == "class":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchNet"]}))
    message = failure(capsys, "compress", model, "--pattern", "2:4", "--output_dir", tmp_path / "out")
    wanted = {"lacks a weight": "is incomplete: it lacks 1 weights", "class": "was saved by NoSuchNet"}
    assert wanted.get(damage, "cannot load") in message
    assert str(model) in message
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_a_nan_checkpoint_is_named(tmp_path, capsys):
    model = tiny_vit()
    with torch.no_grad():
        model.vit.layers[0].mlp.fc1.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    message = failure(capsys, "compress", tmp_path / "model", "--pattern", "2:4", "--output_dir", tmp_path / "out")
    assert "mlp.fc1.weight' holds NaN" in message
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def trained_cnn(tmp_path):
    """As a Trainer leaves it: the model, and its family with statistics inside."""
    samples = torch.stack([s["pixel_values"] for s in image_samples()])
    model = tiny_resnet()
    hfc.recalibrate_batch_norm(model, [samples])
    model.save_pretrained(tmp_path / "cnn")
    data = [{"pixel_values": samples}]
    hfc.build_family(model, ["2:4"], None, data, tmp_path / "cnn" / "_family")
    return tmp_path / "cnn"


def statistics_of(folder):
    stored = load_file(folder / "model.safetensors")
    return {name: value for name, value in stored.items() if "running" in name}


@pytest.mark.parametrize("patterns", [["2:4"], ["2:4", "unstructured:0.5"]])
def test_statistics_that_are_stored_are_taken(trained_cnn, tmp_path, capsys, patterns):
    argv = ["compress", str(trained_cnn), "--output_dir", str(tmp_path / "out")]
    assert run([*argv, *(f"--pattern={p}" for p in patterns)]) == 0
    assert "batch norms" not in capsys.readouterr().out
    found = statistics_of(tmp_path / "out" / "nm-2of4" if len(patterns) > 1 else tmp_path / "out")
    wanted = statistics_of(trained_cnn / "_family" / "nm-2of4")
    dense = statistics_of(trained_cnn)
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert not all(torch.equal(found[name], dense[name]) for name in found)
    if len(patterns) > 1:  # the slider of the new family works too
        assert (tmp_path / "out" / "batch_norm.safetensors").is_file()


def test_statistics_that_are_not_there_are_said_to_be_missing(trained_cnn, tmp_path, capsys):
    for pattern, said in (("3:4", "the checkpoint's batch_norm.safetensors is for"), ("2:4+int8", "patterns near 2:4")):
        name = pattern.replace(":", "-")
        assert run(["compress", str(trained_cnn), "--pattern", pattern, "--output_dir", str(tmp_path / name)]) == 0
        out = capsys.readouterr().out
        assert said in out
        assert "recalibrate_batch_norm" in out
    assert run(["compress", str(trained_cnn), "--pattern=filters:0.5", "--remove", f"--output_dir={tmp_path}/r"]) == 0
    assert "batch norms keep the statistics of the dense weights" in capsys.readouterr().out
    tiny_vit().save_pretrained(tmp_path / "vit")
    assert run(["compress", str(tmp_path / "vit"), "--pattern", "2:4", "--output_dir", str(tmp_path / "v")]) == 0
    assert "batch norm" not in capsys.readouterr().out


def test_a_family_is_told_to_be_one(trained_cnn, tmp_path, capsys):
    argv = ["--pattern", "2:4", "--output_dir", str(tmp_path / "out")]
    assert run(["compress", str(trained_cnn / "_family"), *argv]) == 2
    assert "is a family; give one of its checkpoints, such as" in capsys.readouterr().err
    assert run(["compress", str(tmp_path / "nothing"), *argv]) == 2
    assert "there is no such folder here" in capsys.readouterr().err
    assert hfc.load_family(trained_cnn).folder == trained_cnn / "_family"


@pytest.mark.parametrize(("accuracy", "is_noted"), [(0.1, True), (0.9, False)])
def test_a_variant_above_dense_is_explained(trained_cnn, capsys, accuracy, is_noted):
    family = hfc.load_family(trained_cnn)
    dense = replace(family.dense, metrics={"accuracy": accuracy})
    variants = tuple(replace(variant, metrics={"accuracy": 0.5}) for variant in family.variants)
    VariantPrinter().finish(replace(family, dense=dense, variants=variants))
    note = f"note: {', '.join(str(v.pattern) for v in variants)} above dense, whose batch norms are as trained"
    assert (note in capsys.readouterr().out) == is_noted
