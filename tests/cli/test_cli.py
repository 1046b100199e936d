"""The command line as a user meets it: what is said, what is written, what is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hf_compress as hfc
from hf_compress.__main__ import main
from hf_compress.cli import run
from hf_compress.cli.recipes import ABOUT, packaged, read_recipe
from tests.cli.conftest import failure
from tests.conftest import tiny_vit

FAST = "--max_steps 2 --max_train_samples 64 --max_eval_samples 32 --use_cpu --disable_tqdm true".split()


def test_no_command_prints_the_usage(capsys):
    assert run([]) == 2
    assert run(["--help"]) == 0
    assert "hf-compress train RECIPE" in capsys.readouterr().out
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == hfc.__version__
    assert "no command 'tarin'; there are: train, compress, report, push, recipes" in failure(capsys, "tarin")


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--method", "cram", "-h"], ["--help", "digits_cram"]])
def test_train_help_without_a_recipe_says_what_there_is(capsys, argv):
    assert run(["train", *argv]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: hf-compress train RECIPE")
    for word in ("digits_cram", "cram", "image-classification", "`hf-compress train RECIPE --help` lists all flags"):
        assert word in out


@pytest.mark.parametrize("argv", [["digits_cram"], ["--method", "cram", "--task", "image-classification"]])
def test_train_help_with_a_recipe_or_method_and_task_lists_all_flags(capsys, argv):
    with pytest.raises(SystemExit, match="0"):
        run(["train", *argv, "--help"])
    out = capsys.readouterr().out
    assert "--rho" in out
    assert "--dataset_name" in out
    assert "--learning_rate" in out


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


def test_a_run_without_a_recipe_needs_no_flags_of_the_trainer(tmp_path):
    out = tmp_path / "out"
    flags = ["--method", "cram", "--task", "image-classification", "--architecture", "resnet20_cifar"]
    assert run(["train", *flags, "--image_size", "16", *FAST, "--output_dir", str(out)]) == 0
    assert (out / "model.safetensors").is_file()
    assert "remove_unused_columns" not in read_recipe("digits_cram")


def test_flags_and_recipes_override_the_flags_of_the_task(tmp_path, capsys):
    from hf_compress.cli.train import parse

    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: cram\ntask: image-classification\narchitecture: vit\nremove_unused_columns: true\n")
    argv = [str(recipe), "--output_dir", str(tmp_path), "--use_cpu"]
    assert parse(argv).args.remove_unused_columns is True
    assert parse(["digits_cram", *argv[1:]]).args.remove_unused_columns is False
    argv = ["digits_cram", "--remove_unused_columns", "true", *FAST, "--output_dir", tmp_path / "out"]
    assert "column 'image' was dropped; set remove_unused_columns to False" in failure(capsys, "train", *argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rho", "0.1", "base.yaml"], "the recipe comes first, and only one: hf-compress train base.yaml"),
        (["--no_plus", "digits_cram"], "the recipe comes first, and only one: hf-compress train digits_cram"),
        (["digits_cram", "--rho", "0.1", "base.yaml"], "the recipe comes first, and only one"),
        (["--deepspeed", "ds.json"], "no method: give a recipe ("),
        (["digits_cram", "--model_args", "5"], "model_args must be a JSON object, got '5'"),
        (["digits_cram", "--max_train_samples", "0"], "max_train_samples must be at least 1, got 0"),
        (["digits_crm"], "no recipe and no file 'digits_crm'; did you mean 'digits_cram'?"),
        (["missing/recipe.yaml"], "no file 'missing/recipe.yaml'"),
        ([], "no method: give a recipe ("),
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
        (["digits_cram", "--patterns", "unstructred:0.5"], '; did you mean "unstructured:..."?; allowed: '),
        (["digits_cram", "--patterns", "filter:0.5"], '; did you mean "filters:..."?; allowed: '),
        (["digits_cram", "--patterns", "heads:0.5"], "patterns has heads:0.5, and heads:0.5 leaves all 7 targets"),
        (["digits_cram", "--constraint", "l1"], "no flag '--constraint'; it is one of sfw"),
        (["digits_cram", "--model_name_or_path", "no/model"], "there is no no/model here, and as a Hub id: "),
        (["digits_cram", "--dataset_name", "no/data"], "there is no no/data here, and as a Hub id: "),
    ],
)
def test_mistakes_are_explained(tmp_path, capsys, argv, message):
    flags = ["--output_dir", str(tmp_path / "out"), "--use_cpu"] if argv[:1] == ["digits_cram"] else []
    assert message in failure(capsys, "train", *argv, *flags)
    assert not list(tmp_path.iterdir())  # no empty folder either


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
        ("method: cram\ntask: image-classification\narchitecture: vit\nrho: null", "rho: null, but this flag needs a"),
        ("method: cram\ntask: image-classification\narchitecture: vit\npatterns:", "patterns: null, but this flag"),
        (
            "method: cram\ntask: image-classification\narchitecture: vit\nrho: [1]",
            "rho: [1], but this flag takes float",
        ),
        (
            "method: cram\ntask: image-classification\narchitecture: vit\nrho: yes",
            "rho: True, but this flag takes float",
        ),
        (
            "method: cram\ntask: image-classification\narchitecture: vit\nmodel_args: 5",
            "5, but this flag takes dict or str",
        ),
        (
            "method: cram\ntask: image-classification\narchitecture: 5",
            'this flag takes str; YAML reads a bare 5 as 5: write "5"',
        ),
        ("method: cram\ntask: image-classification\narchitecture: vit\nsave_strategy: no", 'write "no"'),
        (
            "method: cram\ntask: image-classification\narchitecture: vit\ninclude: [5]",
            "include: 5, where a text is needed",
        ),
        (
            "method: cram\ntask: image-classification\narchitecture: vit\ninclude: {a: 1}",
            "include: {'a': 1}, where a text",
        ),
    ],
)
def test_wrong_recipes_are_explained(tmp_path, capsys, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert message in failure(capsys, "train", path, "--output_dir", tmp_path / "out", "--use_cpu")


def test_null_in_a_recipe_is_none(tmp_path):
    from hf_compress.cli.train import parse

    recipe = tmp_path / "mine.yaml"
    base = "method: cram\ntask: image-classification\narchitecture: vit\n"
    recipe.write_text(base + "include: null\nvariants:\nmax_train_samples: null\nplus: 'no'\nmodel_args: {depth: 1}\n")
    spec = parse([str(recipe), "--output_dir", str(tmp_path), "--use_cpu"])
    assert (spec.args.include, spec.args.variants, spec.task_args.max_train_samples) == (None, None, None)
    assert spec.args.plus is False
    assert spec.task_args.model_args == {"depth": 1}


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


def test_python_m_and_passive_threads(monkeypatch, capsys):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(sys, "argv", ["hf-compress", "--version"])
    assert main() == 0
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    done = subprocess.run([sys.executable, "-m", "hf_compress", "recipes"], capture_output=True, text=True, check=True)
    assert "digits_cram" in done.stdout


def test_a_pretrained_model_takes_the_place_of_the_architecture_of_a_recipe(tmp_path):
    from hf_compress.cli.train import parse

    flags = ["--output_dir", str(tmp_path), "--use_cpu"]
    task = parse(["digits_cram", "--model_name_or_path", "mine", *flags]).task_args
    assert (task.model_name_or_path, task.architecture, task.model_args) == ("mine", None, None)
    task = parse(["cifar10_resnet20_cram_tune", "--architecture", "resnet56_cifar", *flags]).task_args
    assert (task.model_name_or_path, task.architecture) == (None, "resnet56_cifar")
