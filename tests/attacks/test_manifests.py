"""Manifests from strangers: they name no file outside their folder, and fail with an error of ours."""

from __future__ import annotations

import json

import pytest

import hf_compress as hfc


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
