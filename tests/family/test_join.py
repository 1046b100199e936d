"""Variants of several trainings join one family: copied, measured numbers kept, whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageClassification

import hf_compress as hfc
from tests.conftest import tiny_resnet

INPUTS = {"pixel_values": torch.randn(1, 3, 8, 8)}


def build(folder, *patterns, model=None, trained=None, **options):
    model = tiny_resnet() if model is None else model
    options = {"recipe": {"seed": 1}, "task": "image-classification", "example_inputs": INPUTS, **options}
    return hfc.build_family(model, patterns, lambda m: {"accuracy": 0.5}, output_dir=folder, trained=trained, **options)


def smaller():
    model = tiny_resnet()
    hfc.compress(model, "filters:0.5", remove=True)
    return model


@pytest.fixture
def families(tmp_path):
    one = build(tmp_path / "one", "unstructured:0.5", "2:4")
    two = build(tmp_path / "two", trained={"filters:0.5": smaller()}, recipe={"method": "tpp", "seed": 2})
    return one, two


def test_a_trained_variant_joins(families):
    one, two = families
    stale = hfc.load_family(one.folder)
    joined = one.add(two.folder)
    assert joined is one
    assert [v.pattern for v in joined.variants] == ["unstructured:0.5", "2:4", "filters:0.5"]
    variant = joined["filters:0.5"]
    assert (variant.made_by, variant.metrics, variant.latency) == (
        "trained",
        {"accuracy": 0.5},
        two.variants[0].latency,
    )
    assert variant.parameters_removed == joined.dense.parameters - variant.parameters > 0
    assert joined.recipe == {"seed": 1, "trained": {"filters-0.50": two.recipe}}
    loaded = AutoModelForImageClassification.from_pretrained(joined.path_to("filters:0.5"))
    assert all(torch.equal(v, smaller().state_dict()[n]) for n, v in loaded.state_dict().items())
    assert set(one.files) | {f"filters-0.50/{n}" for n in two.files_of(two.variants[0])} == set(joined.files)
    assert hfc.load_family(two.folder).variants == two.variants
    build(one.folder.parent / "run" / "_family", "filters:0.25")  # as a trainer leaves it
    stale.add(one.folder.parent / "run")  # reads what has joined meanwhile
    again = hfc.load_family(one.folder)
    assert again == stale
    assert list(again.recipe["trained"]) == ["filters-0.50", "filters-0.25"]
    assert len(again.variants) == 4
    assert "repo_id" not in json.loads((one.folder / "family.json").read_text())


def test_what_does_not_fit_is_refused_by_name(families, tmp_path):
    one, two = families
    before = (one.folder / "family.json").read_text()
    bigger = build(tmp_path / "bigger", "filters:0.5", model=tiny_resnet(hidden_sizes=[8, 16]))
    for other, message in (
        (build(tmp_path / "same", "2:4"), "there is a variant 2:4 already"),
        (build(tmp_path / "none"), "none has no variants to add"),
        (build(tmp_path / "task", "filters:0.5", task="other"), "is a family of other, this one of image-classificat"),
        (bigger, "is of a dense model of .* parameters, this family of one of"),
        (replace(two, repo_id="me/tpp"), "me/tpp lies on the Hub"),
    ):
        with pytest.raises(ValueError, match=message):
            one.add(other)
    (two.folder / "filters-0.50" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="differs from its hash"):
        one.add(two)
    assert (one.folder / "family.json").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_names_in_a_manifest_of_others_choose_no_folder(families):
    """A path is a text of whoever wrote the manifest; the folder follows from the pattern."""
    one, two = families
    content = json.loads((two.folder / "family.json").read_text())
    (two.folder / "filters-0.50").rename(two.folder / "other")
    content["variants"][0]["path"] = "other"
    content["files"] = {k.replace("filters-0.50/", "other/"): v for k, v in content["files"].items()}
    (two.folder / "family.json").write_text(json.dumps(content))
    joined = one.add(two.folder)
    assert joined.variants[-1].path == joined.variants[-1].revision == "filters-0.50"
    content["variants"][0]["revision"] = "dense"
    (two.folder / "family.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the revision of filters:0.5 is filters-0.50, got 'dense'"):
        one.add(two.folder)
    content["variants"][0]["revision"] = "../../outside"
    (two.folder / "family.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is no revision of ours"):
        one.add(two.folder)
    assert not (one.folder.parent.parent / "outside").exists()


def test_nothing_changes_when_a_file_is_missing(families):
    one, two = families
    before = {p: p.read_bytes() for p in one.folder.rglob("*") if p.is_file()}
    (two.folder / "filters-0.50" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="is missing"):
        one.add(two)
    assert {p: p.read_bytes() for p in one.folder.rglob("*") if p.is_file()} == before
