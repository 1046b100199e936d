"""The command line as a user meets it: what is said, what is written, what is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import hf_compress as hfc
from hf_compress.__main__ import main
from hf_compress.cli import run
from hf_compress.cli.recipes import ABOUT, packaged, read_recipe
from tests.conftest import tiny_resnet, tiny_vit

FAST = "--max_steps 2 --max_train_samples 64 --max_eval_samples 32 --use_cpu --disable_tqdm true".split()


def failure(capsys, *argv):
    """The message of a command that must fail: one line, no traceback."""
    assert run([str(word) for word in argv]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_no_command_prints_the_usage(capsys):
    assert run([]) == 2
    assert run(["--help"]) == 0
    assert "hf-compress train RECIPE" in capsys.readouterr().out
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == hfc.__version__
    assert "no command 'tarin'; there are: train, compress, recipes" in failure(capsys, "tarin")


def test_recipes_are_listed_with_cost_and_goal(capsys):
    assert run(["recipes"]) == 0
    out = capsys.readouterr().out
    assert "digits_cram" in out
    for name, path in packaged().items():
        recipe = read_recipe(str(path))
        assert all(recipe.get(key) for key in ABOUT), name
        assert f"{name}\n" in out
        assert recipe["goal"] in out


def test_a_run_writes_checkpoint_family_and_table(tmp_path, capsys):
    out = tmp_path / "out"
    code = run(["train", "digits_cram", *FAST, "--output_dir", str(out), "--variants", "unstructured:0.5", "2:4"])
    assert code == 0
    printed = capsys.readouterr().out
    assert "saved nm-2of4: 44.6 % zeros, accuracy 0." in printed
    assert "variant" in printed
    assert "vs dense" in printed
    assert "plot " in printed
    family = hfc.load_family(out / "_family")
    assert [v.pattern for v in family.variants] == ["unstructured:0.5", "2:4"]
    assert family.task == "image-classification"
    assert family.method == "cram"
    assert family.recipe["rho"] == 0.1
    assert family.recipe["max_steps"] == 2  # what ran, not what the recipe said
    assert (out / "model.safetensors").is_file()


def test_flags_override_the_recipe_and_the_recipe_the_defaults(tmp_path):
    from hf_compress.cli.train import parse

    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: cram\ntask: image-classification\narchitecture: vit\nrho: 5e-2\nlearning_rate: 1e-3\n")
    for argv in (["train", str(recipe)], ["train", "--config", str(recipe)], ["train", f"--config={recipe}"]):
        run_spec = parse([*argv[1:], "--learning_rate", "0.5", "--no_plus", "--output_dir", str(tmp_path), "--use_cpu"])
        assert run_spec.args.rho == 0.05
        assert run_spec.args.learning_rate == 0.5
        assert run_spec.args.plus is False
        assert run_spec.args.mask_gradient is True
        assert run_spec.args.patterns == ["unstructured:0.5", "unstructured:0.7", "unstructured:0.9"]
        assert run_spec.method.name == "cram"
    (tmp_path / "mine.json").write_text(json.dumps(yaml.safe_load(recipe.read_text())))
    assert parse([str(tmp_path / "mine.json"), "--output_dir", str(tmp_path), "--use_cpu"]).args.rho == 0.05


def test_without_a_recipe(tmp_path):
    from hf_compress.cli.train import parse

    flags = "--method cram --task image-classification --architecture vit --patterns 2:4 unstructured:0.3 --use_cpu"
    spec = parse([*flags.split(), "--model_args", '{"hidden_size": 8}', "--output_dir", str(tmp_path)])
    assert spec.args.patterns == ["2:4", "unstructured:0.3"]
    assert spec.task_args.model_args == '{"hidden_size": 8}'


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["digits_crm"], "no recipe and no file 'digits_crm'; did you mean 'digits_cram'?"),
        (["missing/recipe.yaml"], "no file 'missing/recipe.yaml'"),
        ([], "no method: give a recipe (digits_cram"),
        (["--method", "cram"], "no task: give a recipe"),
        (["--method", "crma", "--task", "image-classification"], "no method 'crma'; did you mean 'cram'?"),
        (["digits_cram", "--task", "image"], "no task 'image'; did you mean 'image-classification'?"),
        (["digits_cram", "--config", "x.yaml"], "two recipes"),
        (["digits_cram", "--learning_rte", "1"], "no flag '--learning_rte'; did you mean 'learning_rate'?"),
        (["digits_cram", "--rho", "big"], "argument --rho: invalid float value: 'big'"),
        (["digits_cram", "--rho", "-1"], "rho must be a finite number of at least 0"),
        (["digits_cram", "--patterns", "3:2"], "3:2 is no pattern"),
        (["digits_cram", "--variants", "unstructured:90"], "the share removed must be at least 0 and below 1"),
        (["--rho", "1", "--config"], "--config needs a value"),
        (["digits_cram", "--architecture", "resnet_x"], "neither a model of timm"),
        (["digits_cram", "--include", "*attention*"], "include='*attention*' matches no weight"),
    ],
)
def test_mistakes_are_explained(tmp_path, capsys, argv, message):
    flags = ["--output_dir", str(tmp_path / "out"), "--use_cpu"] if argv[:1] == ["digits_cram"] else []
    assert message in failure(capsys, "train", *argv, *flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "method: cram\ntask: image-classification\nlearning_rte: 1",
            "key 'learning_rte' that is no flag; did you mean 'learning_rate'?",
        ),
        ("method: cram\ntask: image-classification\narchitecture: vit\npatterns: [2:4]", 'write "2:4"'),
        ("method: cram\ntask: image-classification\narchitecture: vit\nvariants: [4:8]", 'write "4:8"'),
        ("- a\n- b", "must be a mapping of flags to values"),
        ("a: [", "cannot be read"),
        ("\x00", "cannot be read"),
        ("", "must be a mapping"),
        ("method: cram\ntask: image-classification\narchitecture: vit\nrho: large", "rho"),
        ("method: cram\ntask: image-classification\narchitecture: vit\npatterns: 2:4", 'write "2:4"'),
    ],
)
def test_wrong_recipes_are_explained(tmp_path, capsys, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert message in failure(capsys, "train", path, "--output_dir", tmp_path / "out", "--use_cpu")


@pytest.mark.parametrize("folder", ["file", "/proc/hf_compress/out"])
def test_an_output_that_cannot_be_written_fails_before_the_training(tmp_path, capsys, folder):
    (tmp_path / "file").write_text("x")
    target = tmp_path / folder / "out" if folder == "file" else folder
    assert "cannot write to" in failure(capsys, "train", "digits_cram", *FAST, "--output_dir", target)
    model = tmp_path / "model"
    tiny_vit().save_pretrained(model)
    assert "cannot write to" in failure(capsys, "compress", model, "--pattern", "2:4", "--output_dir", target)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_a_read_only_folder(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    code = (
        "import os, sys; from hf_compress.cli.train import check_output; from pathlib import Path\n"
        "os.setuid(65534)\n"
        f"check_output(Path({str(locked / 'out')!r}))"
    )
    for parent in [tmp_path, *tmp_path.parents]:
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError: cannot write to" in done.stderr
    assert "Permission denied; choose another --output_dir" in done.stderr


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
    assert "is not empty and holds no family" in failure(capsys, *argv)


def test_compress_several_patterns_gives_a_family(tmp_path, capsys):
    import transformers as t

    sizes = {
        "vocab_size": 32,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 12,
    }
    t.BertForQuestionAnswering(t.BertConfig(**sizes)).save_pretrained(tmp_path / "model")
    argv = ["compress", tmp_path / "model", "--pattern", "2:4", "--pattern", "unstructured:0.8", "--output_dir"]
    assert run([str(w) for w in [*argv, tmp_path / "out"]]) == 0
    family = hfc.load_family(tmp_path / "out")
    assert [v.pattern for v in family.variants] == ["2:4", "unstructured:0.8"]
    assert family.method == "one_shot"
    assert "unstructured:0.8  79.9 %" in capsys.readouterr().out
    t.AutoModelForQuestionAnswering.from_pretrained(family.path_to("2:4"))


def test_compress_a_timm_checkpoint(tmp_path):
    from transformers import AutoModelForImageClassification, TimmWrapperConfig, TimmWrapperForImageClassification

    config = TimmWrapperConfig(architecture="resnet20_cifar", num_labels=3, model_args={"width": 4})
    TimmWrapperForImageClassification(config).save_pretrained(tmp_path / "model")
    assert run(["compress", str(tmp_path / "model"), "--pattern", "2:4", "--output_dir", str(tmp_path / "out")]) == 0
    weight = AutoModelForImageClassification.from_pretrained(tmp_path / "out").timm_model.layer1[0].conv1.weight
    assert (weight.movedim(1, -1).unflatten(-1, (-1, 4)) != 0).sum(-1).eq(2).all()


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


def test_python_m_and_passive_threads(monkeypatch, capsys):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(sys, "argv", ["hf-compress", "--version"])
    assert main() == 0
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    done = subprocess.run([sys.executable, "-m", "hf_compress", "recipes"], capture_output=True, text=True, check=True)
    assert "digits_cram" in done.stdout
