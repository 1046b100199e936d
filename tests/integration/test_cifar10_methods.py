"""All methods on ResNet-20: what the README says of them beside its tables."""

from __future__ import annotations

import importlib
import json

import pytest
import yaml

from tests.conftest import ROOT

README = " ".join((ROOT / "README.md").read_text().split())
BENCHMARKS = ROOT / "recipes" / "benchmarks"
RESULT = json.loads((BENCHMARKS / "results" / "cifar10_resnet20.json").read_text())
PLAN = yaml.safe_load((BENCHMARKS / "plans" / "cifar10_resnet20.yaml").read_text())
SINGLE_WEIGHTS = [p for p in PLAN["variants"] if p.startswith("unstructured") or p in ("2:4", "4:8")]


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("evidence_tables")


def mean(arm, pattern):
    numbers = RESULT["mean"][arm][pattern]
    return numbers["as_trained" if pattern == "dense" else "recalibrated"]["mean"]


def test_every_arm_that_is_there_has_all_seeds_and_the_figure_has_all_its_arms():
    assert {len(RESULT["seeds"][arm]) for arm in RESULT["mean"]} == {len(PLAN["seeds"])}
    assert set(PLAN["figure"]["arms"]) <= set(RESULT["mean"])
    assert {len(tried) for tried in RESULT["tuning"].values()} == {4}


def test_sgd_pays_dense_for_what_it_keeps():
    kept, paid = mean("sgd", "unstructured:0.95"), mean("sgd_dense", "dense") - mean("sgd", "dense")
    assert f"keeps {kept:.0f} points at 95 % and gives up {paid:.0f} dense ones" in README
    decays = [RESULT["chosen"][arm]["weight_decay"] for arm in ("sgd", "sgd_dense")]
    rates = [RESULT["chosen"][arm]["learning_rate"] for arm in ("sgd", "sgd_dense")]
    assert decays[0] / decays[1] == pytest.approx(10)
    assert rates[0] / rates[1] == pytest.approx(2)


@pytest.mark.parametrize("pattern", SINGLE_WEIGHTS)
def test_cram_is_ahead_wherever_single_weights_are_cut(pattern, tables):
    for other in ("sgd", "sgd_dense", "sam"):
        assert tables.verdict(RESULT, "cram_multi", other, pattern) == "yes"


@pytest.mark.parametrize("arm", ["cram_multi", "cram_nm"])
def test_recipes_of_cram_keep_their_goals(arm, tables):
    """Ahead of SGD at what they train for (from 70 % on), and as accurate when dense."""
    trained_for = {"cram_multi": PLAN["arms"]["cram_multi"]["judged_by"][1:], "cram_nm": ["2:4", "4:8"]}[arm]
    for pattern in trained_for:
        assert tables.verdict(RESULT, arm, tables.highest(RESULT, PLAN["plain"], pattern), pattern) == "yes"
    assert tables.verdict(RESULT, arm, "sgd_dense", "dense") != "no"


def test_cram_is_no_gain_for_filters_and_rank(tables):
    others = [p for p in PLAN["variants"] if p not in SINGLE_WEIGHTS]
    assert len(others) == 6
    for pattern in others:
        plain = tables.highest(RESULT, PLAN["plain"], pattern)
        assert tables.verdict(RESULT, "cram_multi", plain, pattern) != "yes"


def test_the_best_stands_beside_the_better_of_both_sgd(tables):
    for line in tables.best(RESULT).splitlines()[2:]:
        pattern, _, _, plain, _ = line.strip("| ").split(" | ")
        assert float(plain.split()[0]) == round(max(mean("sgd", pattern), mean("sgd_dense", pattern)), 1)
