"""Every packaged recipe starts: its flags parse, its model is built, trained, cut and saved. Data are random pixels."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import yaml
from PIL import Image

import hf_compress as hfc
from hf_compress.cli import run
from hf_compress.cli.recipes import packaged, read_recipe
from hf_compress.methods.registry import METHODS
from hf_compress.methods.tpp.selection import Rule
from hf_compress.patterns import parse_patterns
from tests.conftest import ROOT, tiny_vit

# Flags that make the run light: the model small, the pictures too.
LIGHT = {
    "cifar10_resnet20_cram": ["--model_args", '{"shortcut": "B", "depth": 8}'],
    "cifar10_resnet18_cram": ["--model_args", '{"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}'],
    "cifar10_resnet20_cram_tune": ["--model_name_or_path", "RESNET20"],
    "cifar10_resnet20_cram_nm_tune": ["--model_name_or_path", "RESNET20"],
    "imagenet_resnet50_cram": ["--model_args", '{"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}'],
    "imagenet_resnet50_cram_nm": ["--model_args", '{"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}'],
    "imagenet_vit_cram": ["--model_name_or_path", "VIT"],
    "cifar10_resnet18_sfw_ksparse": [
        *("--model_args", '{"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}', "--sfw_init_steps", "2"),
    ],
    **{
        f"cifar10_resnet20_sfw_{region}": ["--model_args", '{"depth": 8}']
        for region in ("ksparse", "ksupport", "group", "spectral")
    },
    "imagenet_resnet50_sfw_spectral": ["--model_args", '{"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}'],
    "imagenet_vit_sfw": ["--model_name_or_path", "VIT"],
    "cifar10_resnet20_tpp": ["--dense_epochs", "1"],
    "cifar10_resnet20_tpp_tune": ["--model_name_or_path", "RESNET20"],
    "cifar10_resnet56_tpp": ["--model_args", '{"depth": 8}', "--dense_epochs", "1"],
    "imagenet_resnet34_tpp": ["--model_name_or_path", "RESNET34"],
    "imagenet_resnet50_tpp": ["--model_name_or_path", "RESNET50"],
    "imagenet_vit_tpp": ["--model_name_or_path", "VIT"],
    "cifar10_resnet20_lilnetx": ["--model_args", '{"depth": 8}'],
    "cifar10_resnet20_lilnetx_tune": ["--model_name_or_path", "RESNET20"],
    "imagenet_resnet18_lilnetx": ["--model_args", '{"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}'],
    "imagenet_resnet50_lilnetx": ["--model_args", '{"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}'],
}
SHORT = "--grow_steps 2 --stabilize_steps 2 --grow_every 1 --zero_every 0".split()  # of TPP
FAST = "--max_steps 2 --per_device_train_batch_size 4 --per_device_eval_batch_size 8 --dataloader_num_workers 0"
FAST += " --calibration_samples 8 --use_cpu --disable_tqdm true --dataloader_pin_memory false"
OF_IMAGES = {n: p for n, p in packaged().items() if p.parent.name == "image-classification" and n[:6] != "digits"}
ACCELERATE = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with two classes of random pictures, for training and for validation."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 4)):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A pretrained model that is there without the Hub."""
    from transformers import ViTImageProcessor

    folder = tmp_path_factory.mktemp("vit")
    tiny_vit(image_size=32, patch_size=8).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, vit):
    """Word to folder."""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    folders = {"VIT": vit}
    sizes = {"layers": [3, 4, 6, 3], "channels": [8, 8, 8, 8]}
    for name, args in (("resnet20_cifar", {"depth": 8}), ("resnet34", sizes), ("resnet50", sizes)):
        word = name.removesuffix("_cifar").upper()
        folders[word] = tmp_path_factory.mktemp(name)
        config = TimmWrapperConfig(architecture=name, num_labels=2, model_args=args)
        TimmWrapperForImageClassification(config).save_pretrained(folders[word])
    return {word: str(folder) for word, folder in folders.items()}


@pytest.mark.parametrize("name", sorted(OF_IMAGES))
def test_recipe_starts_and_gives_a_family(name, tmp_path, capsys, pictures, pretrained):
    recipe = read_recipe(name)
    asked = recipe.get("variants", [])
    cut = list(dict.fromkeys([asked[0], asked[-1]])) if asked else []
    flags = [pretrained.get(word, word) for word in LIGHT[name]]
    flags += ["--variants", *cut] if cut else SHORT if recipe["method"] == "tpp" else []
    data = ["--dataset_name", str(pictures), "--image_column", "image"]
    command = ["train", name, *data, *flags, *FAST.split(), "--output_dir", str(tmp_path)]
    assert run(command) == 0, capsys.readouterr().err
    family = hfc.load_family(tmp_path / "_family")
    if cut:
        assert [v.pattern for v in family.variants] == cut
    else:
        assert [v.made_by for v in family.variants] == ["trained"]
        assert family.variants[0].macs < family.dense.macs or recipe["method"] == "lilnetx"
    assert all(v.metrics["accuracy"] is not None for v in family.variants)
    sizes = {v.revision: v.bytes / family.dense.bytes for v in family.variants if v.storage == "coded"}
    assert sizes.keys() == ({"lilnetx-coded"} if recipe["method"] == "lilnetx" else set())
    assert all(share < 0.6 for share in sizes.values())
    assert all(v.sparsity > 0.2 or v.parameters_removed > 0 or v.revision in sizes for v in family.variants)
    # What the run says of itself is the recipe; what equals a default is left out.
    for key in ("rho", "patterns", "optim_args", "augmentation", "lr_scheduler_type"):
        assert family.recipe.get(key, recipe.get(key)) == recipe.get(key), key
    default = METHODS[recipe["method"]].config_class.learning_rate
    assert family.recipe.get("learning_rate", default) == float(recipe["learning_rate"])
    log = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert log["global_step"] == 2


@pytest.mark.parametrize("name", sorted(packaged()))
def test_patterns_of_recipes_are_canonical(name):
    """As the manifest and the card will spell them."""
    recipe = read_recipe(name)
    for key in ("patterns", "variants"):
        written = recipe.get(key) or []
        is_rule = key == "patterns" and recipe["method"] == "tpp"
        assert [str(p) for p in (map(Rule.parse, written) if is_rule else parse_patterns(written))] == written


@pytest.mark.parametrize("name", sorted(packaged()))
def test_the_section_of_the_method_names_the_recipe(name):
    title = {"cram": "CrAM", "sfw": "SFW", "tpp": "TPP", "lilnetx": "LilNetX"}[read_recipe(name)["method"]]
    section = (ROOT / "README.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    (line,) = re.findall(r"^Recipes: (.*)\.$", section, re.M)
    assert f"`{name}`" in line.split(", ")


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_the_file(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    written = yaml.safe_load(path.read_text())
    assert config.to_dict().items() >= {k: v for k, v in written.items() if v != "NO"}.items()
    assert str(config.mixed_precision) == "no"
    assert config.num_processes % config.num_machines == 0


def test_there_is_a_file_for_every_way_to_launch():
    assert [path.stem for path in ACCELERATE] == ["ddp", "fsdp2", "one_process", "two_nodes"]
    fsdp = yaml.safe_load((ROOT / "recipes/accelerate/fsdp2.yaml").read_text())["fsdp_config"]
    assert fsdp["fsdp_version"] == 2
