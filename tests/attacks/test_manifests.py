"""Manifests from strangers: they name no file outside their folder, and fail with an error of ours."""

from __future__ import annotations

import json
import re

import pytest

import hf_compress as hfc
from hf_compress.cli import run
from hf_compress.family.manifest import read_manifest
from tests.conftest import ROOT


@pytest.fixture
def manifest(tmp_path, vit):
    family = hfc.build_family(vit, ["2:4"], output_dir=tmp_path / "family")
    return family.folder / "family.json"


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


ESCAPES = ["../secret", "/etc/passwd", "dense/../../secret", "..\\secret", "dense/../../../etc/passwd"]


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("place", ["files", "path"])
def test_no_path_leads_out_of_the_folder(manifest, name, place):
    (manifest.parent.parent / "secret").write_text("secret")

    def edit(content):
        if place == "files":
            content["files"][name] = "0" * 64
        else:
            content["variants"][0]["path"] = name

    change(manifest, edit)
    with pytest.raises(ValueError, match="is not inside the folder"):
        hfc.load_family(manifest.parent)


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c.update(schema=2),
        lambda c: c.pop("schema"),
        lambda c: c.update(variants={}),
        lambda c: c.update(variants=None),
        lambda c: c.update(variants=[{}]),
        lambda c: c.update(files=["a"]),
        lambda c: c.update(files={"dense": 1}),
        lambda c: c.pop("dense"),
        lambda c: c["variants"][0].pop("bytes"),
        lambda c: c["variants"][0].update(path=7),
        lambda c: c["variants"][0].update(path="dense\0x"),
        lambda c: c["variants"][0].update(metrics={"accuracy": "high"}),
        lambda c: c["variants"][0].update(bytes=True),
        lambda c: c["files"].update({"dense\0x": "0"}),
        lambda c: c["variants"][0].update(revision="../../../x"),
        lambda c: c["variants"][0].update(revision="/etc/passwd"),
        lambda c: c["variants"][0].update(revision="a..b"),
        lambda c: c["variants"][0].update(revision="refs/heads/main"),
        lambda c: c["variants"][0].update(revision=""),
        lambda c: c["dense"].update(revision="-x"),
        lambda c: c["variants"][0].update(bytes=1e300),
        lambda c: c["variants"][0].update(parameters="9" * 400),
    ],
)
def test_other_shapes_are_errors_of_ours(manifest, edit):
    change(manifest, edit)
    with pytest.raises(ValueError):
        hfc.load_family(manifest.parent)


@pytest.mark.parametrize("text", ["", "[]", "null", "1e999", '{"schema": 1}', "[" * 100_000, "\ud800"])
def test_other_texts_are_errors_of_ours(manifest, text):
    manifest.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError):
        hfc.load_family(manifest.parent)


def test_numbers_that_are_too_long_are_errors_of_ours(manifest):
    text = manifest.read_text()
    manifest.write_text(text.replace('"schema": 1', '"schema": 1' + "0" * 5000))
    with pytest.raises(ValueError, match="is no manifest"):
        hfc.load_family(manifest.parent)


TIMES = {"milliseconds": 1.0, "dense_milliseconds": 1.0, "device": "x86_64", "threads": 1, "batch_size": 1}


def twice(content):
    content["variants"].append({**content["variants"][0], "pattern": "2:4 "})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda c: c["variants"][0].update(pattern="2:4\x1b[2J"), "is no pattern"),
        (lambda c: c["variants"][0].update(pattern=None), "is no pattern"),
        (lambda c: c["variants"][0].update(revision="main"), "the revision of 2:4 is nm-2of4, got 'main'"),
        (lambda c: c["variants"][0].update(revision="nm-4of8"), "the revision of 2:4 is nm-2of4"),
        (lambda c: c["variants"][0].update(path="dense"), "is the name of two checkpoints"),
        (lambda c: c["dense"].update(pattern="4:8"), "the dense checkpoint has no pattern"),
        (lambda c: c["dense"].update(revision="v1"), "the dense checkpoint has no pattern, and the revision main"),
        (twice, "is the name of two checkpoints"),
        (lambda c: c["variants"][0].update(bytes=10**400), "bytes of nm-2of4 is not finite, or larger"),
        (lambda c: c["variants"][0].update(metrics={"accuracy": 10**400}), "accuracy of nm-2of4 is not finite"),
        (lambda c: c["variants"][0].update(metrics={"bytes": float("nan")}), "bytes of nm-2of4 is not finite"),
        (lambda c: c["variants"][0].update(sparsity=float("inf")), "sparsity of nm-2of4 is not finite"),
        (lambda c: c["variants"][0].update(latency={}), "latency of nm-2of4 lacks batch_size, dense_milliseconds"),
        (lambda c: c["dense"].update(latency={**TIMES, "dense_milliseconds": 0}), "which is no time above 0"),
        (lambda c: c["variants"][0].update(latency={**TIMES, "milliseconds": "1"}), "which is no time above 0"),
        (lambda c: c["variants"][0].update(latency={**TIMES, "milliseconds": True}), "which is no time above 0"),
    ],
)
def test_names_and_numbers_that_no_family_has(manifest, capsys, edit, said):
    change(manifest, edit)
    with pytest.raises(ValueError, match=re.escape(said)):
        hfc.load_family(manifest.parent)
    assert run(["report", str(manifest.parent), "--output_dir", str(manifest.parent.parent / "out")]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["main", "v"])
def test_a_folder_is_of_one_checkpoint_and_not_called_main(manifest, folder):
    (manifest.parent / "nm-2of4").rename(manifest.parent / folder)

    def edit(content):
        content["variants"][0]["path"] = folder
        content["files"] = {name.replace("nm-2of4/", f"{folder}/"): v for name, v in content["files"].items()}

    change(manifest, edit)
    if folder == "v":
        assert hfc.load_family(manifest.parent).variants[0].path == "v"
        return
    with pytest.raises(ValueError, match="is the name of two checkpoints"):
        hfc.load_family(manifest.parent)


@pytest.mark.parametrize("path", sorted((ROOT / "model_cards").glob("*/family.json")), ids=lambda p: p.parent.name)
def test_families_that_were_published_are_read(path):
    assert len(read_manifest(path.parent).variants) >= 1


def test_two_dots_in_a_label_are_no_revision():
    with pytest.raises(ValueError, match=r"a label has small letters, digits and dots inside, got 'a\.\.b'"):
        hfc.parse_pattern("lilnetx:a..b")
    assert hfc.parse_pattern("lilnetx:a.b").revision == "lilnetx-a.b-coded"
