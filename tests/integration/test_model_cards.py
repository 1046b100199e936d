"""The cards in model_cards/ say what the manifests beside them say, of runs of the packaged recipes."""

from __future__ import annotations

import importlib
import re

import pytest
import yaml

from hf_compress.family.manifest import read_manifest, sha256
from hf_compress.family.table import main_metric, table_rows
from hf_compress.methods.registry import METHODS
from tests.conftest import ROOT

CARDS = sorted(p.parent for p in (ROOT / "model_cards").glob("*/README.md"))


def test_there_is_one_of_every_method():
    assert {read_manifest(card).method for card in CARDS} == set(METHODS)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_number_is_that_of_the_manifest(card):
    manifest, text = read_manifest(card), (card / "README.md").read_text()
    header, *rows = table_rows(manifest)
    assert f"| {' | '.join([*header, 'revision'])} |" in text
    for row, variant in zip(rows, manifest.checkpoints, strict=True):
        assert f"| {' | '.join([*row, f'`{variant.revision}`'])} |" in text
    metadata = yaml.safe_load(text.split("---\n")[1])
    values = [r["metrics"] for r in metadata["model-index"][0]["results"]]
    found = [metric["value"] for metrics in values for metric in metrics]
    name = main_metric(manifest.dense.metrics)
    assert found == [pytest.approx(v.metrics[name], abs=1e-6) for v in manifest.checkpoints]
    assert METHODS[manifest.method].paper.removeprefix("arXiv:") in text


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_picture_is_that_of_the_run_and_no_path_of_a_machine_is_told(card):
    manifest = read_manifest(card)
    assert sha256(card / "plots" / "sparsity.png") == manifest.files["plots/sparsity.png"]
    recipes = [yaml.safe_load(p.read_text()) for p in (ROOT / "recipes").glob(f"*/{card.name}.yaml")]
    assert len(recipes) == 1
    assert manifest.recipe["method"] == recipes[0]["method"]
    for name in ("family.json", "README.md"):
        assert not re.search(r"/(tmp|home|root|work)/", (card / name).read_text()), name


def test_cards_say_what_data_a_manifest_does_not_know(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    known = importlib.import_module("model_cards").DATA
    local = {card.name for card in CARDS if "local" in read_manifest(card).recipe}
    assert set(known) == local
    for name, text in known.items():
        assert f"## Limits\n\n- {text}\n" in (ROOT / "model_cards" / name / "README.md").read_text()
