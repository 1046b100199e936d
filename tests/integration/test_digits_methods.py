"""The comparison that the README opens with: its tables, its bars and what is said of them."""

from __future__ import annotations

import importlib
import json

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


def test_the_result_is_whole():
    assert all(len(seeds) == 5 for seeds in RESULT["seeds"].values())
    assert all(row["points"] is not None for tried in RESULT["tuning"].values() for row in tried)
    assert {len(tried) for tried in RESULT["tuning"].values()} == {8}


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
    assert len(rows) == 8
    assert {(size, points) for _, size, points in rows} <= known


def test_the_result_meets_its_bars():
    """CrAM loses nothing when dense, and methods are ahead behind the cuts that they are for."""
    minus = RESULT["minus"]
    assert minus["cram_multi"]["sgd"]["dense"]["difference"] >= -0.5
    ahead = [("cram_multi", "unstructured:0.95"), ("k_sparse", "unstructured:0.95"), ("spectral", "low_rank:0.75")]
    for arm, pattern in [*ahead, ("group", "filters:0.5")]:
        by = minus[arm]["sgd"][pattern]
        assert by["difference"] > 2 * by["standard_error"], arm


def points_of(arm, **setting):
    """On what was held out, of the settings that have these values."""
    return [row["points"] for row in RESULT["tuning"][arm] if setting.items() <= row["setting"].items()]


def test_what_the_readme_says_of_tuning():
    assert RESULT["chosen"]["sgd"]["weight_decay"] == 0.02
    mean = {arm: own["unstructured:0.8"]["recalibrated"]["mean"] for arm, own in RESULT["mean"].items() if len(own) > 2}
    assert max(mean.values()) - mean["sgd"] < 1
    assert RESULT["chosen"]["k_sparse_none"] == {"learning_rate": 0.3}
    at = {"k": "0.3", "radius": "init:1", "learning_rate": 0.1}
    by_rescaling = [round(*points_of("group", rescale=rescale, **at)) for rescale in ("fast_gradient", "gradient")]
    assert "({} points on held-out images against {} at the same learning rate)".format(*by_rescaling) in README
    assert RESULT["chosen"]["group"]["rescale"] == "fast_gradient"
    assert max(points_of("k_sparse_init")) < max(points_of("k_sparse"))
    for pattern in ("filters:0.3", "filters:0.5", "filters:0.7"):  # as well or better
        polytope, ball = (RESULT["mean"][arm][pattern]["recalibrated"] for arm in ("k_sparse", "group"))
        assert polytope["mean"] > ball["mean"] - max(polytope["std"], ball["std"])
    for share in (80, 90, 95):
        ours, cram = (RESULT["mean"][a][f"unstructured:{share / 100:g}"] for a in (f"gradual_{share}", "cram_multi"))
        assert ours["recalibrated"]["mean"] >= cram["recalibrated"]["mean"]


def test_lilnetx_is_smaller_than_what_is_cut_in_one_shot():
    size = {(arm, name): file["bytes"]["mean"] for arm, own in RESULT["files"].items() for name, file in own.items()}
    one_shot = [size[key] for key in size if key[1] == "unstructured:0.8+int8"]
    assert max(size["lilnetx", "lilnetx"], size["lilnetx_coarse", "lilnetx"]) < min(one_shot)
    assert size["gradual_95", "int8"] < size["lilnetx_coarse", "lilnetx"]
    decoder = 4 * 49**2  # float32, of the stem: nearly half of a file that would hold it
    assert 0.4 < decoder / (decoder + size["lilnetx", "lilnetx"]) < 0.5
