"""Manifests from strangers on a Hub: nothing leaves the cache, and what differs from its hash is not handed out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import hf_compress as hfc
from tests.conftest import tiny_bert
from tests.hub.conftest import here, hub  # noqa: F401, fixtures
from tests.hub.server import File

EDITS = {
    "path outside": lambda c: c["variants"][0].update(path="../../outside"),
    "absolute path": lambda c: c["variants"][0].update(path="/etc"),
    "file outside": lambda c: c["files"].update({"../outside": "0" * 64}),
    "absolute file": lambda c: c["files"].update({"/etc/passwd": "0" * 64}),
    "revision outside": lambda c: c["variants"][0].update(revision="../../outside"),
    "unknown schema": lambda c: c.update(schema=2),
    "huge number": lambda c: c["variants"][0].update(bytes=1e308),
    "no variant": lambda c: c.update(variants=[{}]),
    "no files": lambda c: c.update(files={}),
    "not a mapping": lambda c: c.update(files=[]),
}


@pytest.fixture
def pushed(here, tmp_path):  # noqa: F811
    family = hfc.build_family(tiny_bert(), ["2:4"], None, None, tmp_path / "family")
    family.push_to_hub("six")
    return here.repos["tester/six"]


def replace(repo, name, data):
    tree = dict(repo.commits[repo.branches["main"]])
    tree[name] = File(data, tree[name].is_large)
    repo.commit("main", tree, "edited")


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_hostile_manifests_are_refused(pushed, edit):
    content = json.loads(pushed.files()["family.json"])
    edit(content)
    replace(pushed, "family.json", json.dumps(content).encode())
    with pytest.raises(ValueError, match=r"family\.json is no manifest of a family that this version reads"):
        hfc.load_family("tester/six")


@pytest.mark.parametrize("data", [b"", b"null", b"[" * 100_000, b"\xff\xfe", b'{"schema": 1e999}', b"1" + b"0" * 5000])
def test_hostile_bytes_are_refused(pushed, data):
    replace(pushed, "family.json", data)
    with pytest.raises(ValueError, match="is no manifest"):
        hfc.load_family("tester/six")


def test_wrong_hashes_are_refused(pushed, tmp_path):
    content = json.loads(pushed.files()["family.json"])
    content["files"]["nm-2of4/model.safetensors"] = "0" * 64
    content["files"]["dense/config.json"] = "0" * 64
    replace(pushed, "family.json", json.dumps(content).encode())
    family = hfc.load_family("tester/six")
    for variant in family.checkpoints:
        with pytest.raises(ValueError, match="differs from its hash"):
            family.path_to(variant)
    assert not list(Path(tmp_path).glob("**/outside*"))


def test_plots_that_were_exchanged_are_refused(here, tmp_path):  # noqa: F811
    family = hfc.build_family(tiny_bert(), ["2:4"], lambda m: {"accuracy": 0.5}, None, tmp_path / "family")
    family.push_to_hub("six")
    replace(here.repos["tester/six"], "plots/sparsity.svg", b"<svg onload='alert(1)'/>")
    with pytest.raises(ValueError, match=r"plots/sparsity\.svg differs from its hash"):
        hfc.load_family("tester/six")
