"""Families: cut, measured from disk, saved as a whole or not at all."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

import hf_compress as hfc
from tests.conftest import image_samples, tiny_resnet, tiny_vit

PATTERNS = ["unstructured:0.5", "unstructured:0.9", "2:4"]


def batches():
    samples = image_samples(40)
    return [
        {key: torch.stack([s[key] for s in samples[i : i + 8]]) for key in ("pixel_values", "labels")}
        for i in range(0, 40, 8)
    ]


def evaluate(model):
    correct = [
        (model(pixel_values=b["pixel_values"]).logits.argmax(1) == b["labels"]).float().mean() for b in batches()
    ]
    return {"accuracy": torch.stack(correct).mean()}


@pytest.fixture
def family(tmp_path, resnet):
    return hfc.build_family(resnet, PATTERNS, evaluate, batches(), tmp_path / "family", recipe={"rho": 0.1})


def test_every_folder_loads_and_measures_what_the_manifest_says(family):
    from transformers import AutoModelForImageClassification

    for variant in (family.dense, *family.variants):
        model = AutoModelForImageClassification.from_pretrained(family.folder / variant.path).eval()
        with torch.no_grad():
            assert variant.metrics == {"accuracy": pytest.approx(evaluate(model)["accuracy"].item())}
        targets = [t.parameter for t in hfc.find_targets(model).values()]
        zeros = sum(int((p == 0).sum()) for p in targets) / sum(p.numel() for p in targets)
        assert variant.sparsity == pytest.approx(zeros)
        files = [p for p in (family.folder / variant.path).rglob("*") if p.is_file()]
        assert variant.bytes == sum(p.stat().st_size for p in files)
        assert variant.parameters == sum(p.numel() for p in model.parameters())
        assert variant.nonzero == sum(int((p != 0).sum()) for p in model.parameters())
        assert variant.loads_with == "transformers"
        assert variant.latency["milliseconds"] > 0
        assert variant.macs == family.dense.macs > 0
    assert family["unstructured:0.9"].compressed_bytes < 0.5 * family.dense.compressed_bytes


def test_variants_are_cut_from_the_dense_weights_and_statistics_are_new(family, resnet):
    for variant in family.variants:
        expected = tiny_resnet()
        expected.load_state_dict(resnet.state_dict())
        hfc.compress(expected, variant.pattern)
        hfc.recalibrate_batch_norm(expected, batches())
        stored = load_file(family.path_to(variant) / "model.safetensors")
        assert all(torch.equal(stored[name], value) for name, value in expected.state_dict().items())


def test_names_and_facts(family):
    assert [v.revision for v in family.variants] == ["unstructured-0.50", "unstructured-0.90", "nm-2of4"]
    assert (family.dense.pattern, family.dense.revision, family.dense.path) == (None, "main", "dense")
    assert family["2:4"] is family["nm-2of4"] is family[hfc.NM(2, 4)] is family.variants[2]
    assert "embedder" in next(iter(family["2:4"].skipped))
    assert family.recipe == {"rho": 0.1}
    assert family.method == "one_shot"
    assert set(family.versions) >= {"hf_compress", "torch", "transformers"}
    with pytest.raises(KeyError, match=r"no variant '4:8'; there are: unstructured:0\.5"):
        family["4:8"]


def test_the_model_that_was_given_stays_as_it_is(tmp_path, resnet):
    resnet.train()
    before = {k: v.clone() for k, v in resnet.state_dict().items()}
    hfc.build_family(resnet, ["unstructured:0.9"], evaluate, batches(), tmp_path / "family")
    assert resnet.training
    assert all(torch.equal(v, before[k]) for k, v in resnet.state_dict().items())


def test_the_manifest_hashes_every_file(family):
    manifest = json.loads((family.folder / "family.json").read_text())
    files = {p.relative_to(family.folder).as_posix() for p in family.folder.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files - {"family.json"}
    wanted = ["schema", "method", "task", "base_model", "dense", "variants", "recipe", "versions", "files"]
    assert set(wanted) <= set(manifest)
    wanted = (
        "pattern made_by storage revision path metrics bytes compressed_bytes parameters parameters_removed nonzero"
    )
    assert {*wanted.split(), "macs", "latency", "loads_with"} <= set(manifest["variants"][0])
    assert hfc.load_family(family.folder) == family


@pytest.mark.parametrize("place", ["owner/net", "out/net", None])
def test_the_base_model_is_named_without_the_path_of_a_machine(tmp_path, vit, place):
    """A folder that is given whole tells who trained where."""
    name = str(tmp_path / "net") if place is None else place
    vit.save_pretrained(tmp_path / "net")
    model = type(vit).from_pretrained(tmp_path / "net")
    model.config._name_or_path = name
    family = hfc.build_family(model, ["2:4"], None, None, tmp_path / "family")
    assert family.base_model == place
    files = [f for f in family.folder.rglob("*") if f.suffix in (".json", ".md", ".yaml", ".svg")]
    assert len(files) == 3
    assert not [f for f in files if str(tmp_path) in f.read_text()]


def test_pictures_are_drawn(family):
    png, svg = (family.folder / "plots" / f"sparsity.{kind}" for kind in ("png", "svg"))
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    assert "<svg" in text
    from PIL import Image

    colors = Image.open(png).convert("RGB").getcolors(1 << 24)
    assert {(42, 111, 187), (209, 96, 61)} <= {color for _, color in colors}  # the curve and the 2:4 mark


def test_without_evaluation_and_data(tmp_path, vit):
    family = hfc.build_family(vit, ["2:4"], output_dir=tmp_path / "family")
    assert family["2:4"].metrics == {}
    assert family["2:4"].latency is None
    assert not (family.folder / "plots").exists()


def test_an_older_family_is_replaced_whole(tmp_path, vit):
    folder = tmp_path / "family"
    hfc.build_family(vit, ["2:4"], output_dir=folder)
    hfc.build_family(vit, ["unstructured:0.5"], output_dir=folder)
    assert sorted(p.name for p in folder.iterdir()) == ["dense", "family.json", "unstructured-0.50"]
    assert [p.name for p in tmp_path.iterdir()] == ["family"]


@pytest.mark.parametrize("dies", ["before", "between", "fails"])
def test_a_process_that_dies_while_it_puts_the_new_family_in_place(tmp_path, vit, monkeypatch, dies):
    """Between the two renames the old family lies aside; the next build finds it."""
    from pathlib import Path

    folder = tmp_path / "family"
    old = hfc.build_family(vit, ["2:4"], output_dir=folder)
    if dies == "fails":
        rename = Path.rename
        monkeypatch.setattr(
            Path, "rename", lambda self, to: 1 / 0 if self.name == ".family.partial" else rename(self, to)
        )
        with pytest.raises(ZeroDivisionError):
            hfc.build_family(vit, ["4:8"], output_dir=folder)
        assert hfc.load_family(folder) == old
        return
    (tmp_path / ".family.partial").mkdir()
    if dies == "between":
        folder.rename(tmp_path / ".family.old")
    with pytest.raises(RuntimeError):
        hfc.build_family(vit, ["4:8"], failing, output_dir=folder)
    assert hfc.load_family(folder) == old
    assert [p.name for p in tmp_path.iterdir()] == ["family"]


def failing(model):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("stage", ["evaluation", "nan"])
def test_a_failure_leaves_nothing_half_written_and_the_old_family_alone(tmp_path, stage):
    folder = tmp_path / "family"
    old = hfc.build_family(tiny_vit(), ["2:4"], output_dir=folder)
    broken = tiny_vit()
    if stage == "nan":
        with torch.no_grad():
            broken.vit.layers[1].mlp.fc1.weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"mlp\.fc1\.weight' holds NaN"):
            hfc.build_family(broken, ["unstructured:0.5"], output_dir=folder)
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            hfc.build_family(broken, ["unstructured:0.5"], failing, output_dir=folder)
    assert hfc.load_family(folder) == old
    assert [p.name for p in tmp_path.iterdir()] == ["family"]


def test_a_folder_of_something_else_is_not_touched(tmp_path, vit):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no family"):
        hfc.build_family(vit, ["2:4"], output_dir=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        hfc.build_family(vit, ["2:4"], output_dir=tmp_path / "thesis.tex")
    with pytest.raises(ValueError, match="cannot write to"):
        hfc.build_family(vit, ["2:4"], output_dir=tmp_path / "thesis.tex" / "family")


def test_a_full_disk_leaves_nothing(tmp_path, vit):
    """A real one: a file system of 200 kB."""
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=200k tmpfs {small} 2>/dev/null") != 0:
        pytest.skip("mounting a small file system needs more rights")
    try:
        with pytest.raises(OSError, match="No space left|os error 28"):
            hfc.build_family(tiny_vit(hidden_size=64), ["2:4"], output_dir=small / "family")
        assert list(small.iterdir()) == []
    finally:
        os.system(f"umount {small}")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["2:4", "2:4"], "have the same revision nm-2of4"),
        (["unstructured:0.5", "unstructured:0.50"], "have the same revision"),
        ([248], 'write "4:8"'),
        (["spectral"], "allowed"),
    ],
)
def test_wrong_patterns(tmp_path, vit, patterns, message):
    with pytest.raises(ValueError, match=message):
        hfc.build_family(vit, patterns, output_dir=tmp_path / "family")
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_saved_and_data_that_is_used_up(tmp_path, vit, mlp):
    with pytest.raises(ValueError, match="Sequential has no save_pretrained"):
        hfc.build_family(mlp, ["2:4"], output_dir=tmp_path / "family")
    with pytest.raises(ValueError, match="is an iterator"):
        hfc.build_family(vit, ["2:4"], calibration_data=iter(batches()), output_dir=tmp_path / "family")


def test_half_precision_and_tied_weights(tmp_path):
    import transformers as t

    sizes = {
        "vocab_size": 32,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 12,
    }
    model = t.BertForMaskedLM(t.BertConfig(**sizes)).to(torch.bfloat16).eval()
    family = hfc.build_family(model, ["unstructured:0.5"], output_dir=tmp_path / "family")
    loaded = t.AutoModelForMaskedLM.from_pretrained(family.path_to("unstructured:0.5"), dtype="auto")
    assert loaded.dtype == torch.bfloat16
    hfc.compress(model, "unstructured:0.5")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert family.dense.parameters == sum(p.numel() for p in model.parameters())


def test_nets_of_ours_say_that_they_need_us(tmp_path):
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    config = TimmWrapperConfig(architecture="resnet20_cifar", num_labels=3, model_args={"width": 4})
    family = hfc.build_family(TimmWrapperForImageClassification(config), ["2:4"], output_dir=tmp_path / "family")
    assert family["2:4"].loads_with == "hf_compress"


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "no manifest", "not json", "not a manifest"])
def test_damage_is_found(family, damage):
    weights, manifest = family.folder / "nm-2of4" / "model.safetensors", family.folder / "family.json"
    content = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(content[:-1])
    elif damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        shutil.rmtree(weights.parent)
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "not json":
        manifest.write_bytes(manifest.read_bytes()[:-5])
    else:
        manifest.write_text('["schema"]')
    message = "family.json" if "manifest" in damage or damage == "not json" else "nm-2of4/.* (differs|is missing)"
    with pytest.raises(ValueError, match=message):
        hfc.load_family(family.folder)
