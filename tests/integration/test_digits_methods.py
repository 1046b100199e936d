"""The comparison that the README opens with: its tables, its bars, and the recipes that take what was chosen."""

from __future__ import annotations

import importlib
import json
import re

import pytest
import yaml

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
BENCHMARKS = ROOT / "recipes" / "benchmarks"
RESULTS = BENCHMARKS / "results"
RESULT = json.loads((RESULTS / "digits_methods.json").read_text())
PLAN = yaml.safe_load((BENCHMARKS / "plans" / "digits_methods.yaml").read_text())

REGIONS = {
    "K-sparse": "k_sparse",
    "K-sparse with SFW-Init": "k_sparse_init",
    "K-sparse, by the gradient": "k_sparse_gradient",
    "K-sparse, not rescaled": "k_sparse_none",
    "K-support": "k_support",
    "group-K-support": "group",
    "spectral K-support": "spectral",
}


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("evidence_tables")


def rows_behind(head):
    body = README.split(head)[1].split("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in body.strip().splitlines() if not line.startswith("| ---")]


def test_the_result_is_that_of_the_plan_and_whole():
    assert RESULT["plan"] == json.loads(json.dumps(PLAN))
    assert all(len(seeds) == 5 for seeds in RESULT["seeds"].values())
    assert all(row["points"] is not None for tried in RESULT["tuning"].values() for row in tried)
    assert {len(tried) for tried in RESULT["tuning"].values()} == {4}


def test_tables_are_those_of_the_result(tables):
    assert (RESULTS / "digits_methods.md").read_text() == tables.as_markdown(RESULT)
    assert tables.best(RESULT) in README
    assert tables.claims(RESULT) in README
    assert tables.claims(RESULT).count("\n") == 7
    assert (RESULTS / "digits_methods_figure.png").stat().st_size > 10_000


def test_numbers_of_sfw_are_those_of_the_result(tables):
    rows = rows_behind("| region | one-shot | SFW | SGD, weight decay | SFW - SGD (standard error) |\n")
    assert {row[0] for row in rows} == set(REGIONS)
    for region, pattern, *cells in rows:
        arm = REGIONS[region]
        assert cells == tables.beside(RESULT, arm, "sgd", pattern)


def test_files_are_those_of_the_result(tables):
    known = {
        (f"{numbers['bytes']['mean'] / 1000:.1f}", tables.points(numbers["as_loaded"]))
        for own in RESULT["files"].values()
        for numbers in own.values()
    }
    rows = rows_behind("| coded file | kB | points as loaded |\n")
    assert len(rows) == 7
    assert {(size, points) for _, size, points in rows} <= known


def test_the_result_meets_its_bars():
    """CrAM loses nothing when dense, and methods are ahead behind the cuts that they are for."""
    minus = RESULT["minus"]
    assert minus["cram_multi"]["sgd"]["dense"]["difference"] >= -0.5
    ahead = [("cram_multi", "unstructured:0.95"), ("k_sparse", "unstructured:0.95"), ("spectral", "low_rank:0.75")]
    for arm, pattern in [*ahead, ("group", "filters:0.5")]:
        by = minus[arm]["sgd"][pattern]
        assert by["difference"] > 2 * by["standard_error"], arm


@pytest.mark.parametrize("arm", [name for name, arm in PLAN["arms"].items() if "recipe" in arm])
def test_recipes_have_the_settings_that_were_chosen(arm):
    recipe = yaml.safe_load((ROOT / f"recipes/image-classification/{PLAN['arms'][arm]['recipe']}.yaml").read_text())
    chosen = RESULT["chosen"][arm]
    of_recipe = {name: recipe.get(name, DEFAULTS.get(name)) for name in chosen}
    assert {n: float(v) if re.fullmatch(r"[\d.e-]+", str(v)) else v for n, v in of_recipe.items()} == {
        n: float(v) if re.fullmatch(r"[\d.e-]+", str(v)) else v for n, v in chosen.items()
    }


DEFAULTS = {"rescale": "gradient"}
