"""Results of plans: each is that of its plan, tables follow from its numbers, README and recipes take what it found."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import fields

import pytest
import yaml

from hf_compress.methods.registry import METHODS
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
BENCHMARKS = ROOT / "recipes" / "benchmarks"
RESULTS = BENCHMARKS / "results"
PLANS = sorted(plan.stem for plan in (BENCHMARKS / "plans").glob("*.yaml") if (RESULTS / f"{plan.stem}.json").is_file())

QUOTED = {
    "digits_methods": ["best", "claims"],
    "minilm_qa": ["claims"],
    "cifar10_resnet20": ["best", "claims"],
    "cifar10_scratch": ["arms", "claims"],
}


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("evidence_tables")


def result_of(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", PLANS)
def test_the_result_is_that_of_the_plan(name):
    plan = yaml.safe_load((BENCHMARKS / "plans" / f"{name}.yaml").read_text())
    result = result_of(name)
    assert result["plan"] == json.loads(json.dumps(plan))
    assert result["mean"]
    for arm, own in result["mean"].items():
        for numbers in own.values():
            assert {len(kind["by_seed"]) for kind in numbers.values()} == {len(result["seeds"][arm])}


@pytest.mark.parametrize("name", PLANS)
def test_tables_and_pictures_are_those_of_the_result(name, tables):
    result = result_of(name)
    assert (RESULTS / f"{name}.md").read_text() == tables.as_markdown(result)
    pictures = [f"{name}.png", *([f"{name}_figure.png"] if "figure" in result["plan"] else [])]
    assert all((RESULTS / picture).stat().st_size > 10_000 for picture in pictures)


@pytest.mark.parametrize("name", PLANS)
def test_a_setting_was_chosen_by_its_points(name):
    result = result_of(name)
    for arm, setting in result["chosen"].items():
        tried = result["tuning"][arm]
        assert setting == max(tried, key=lambda row: row["points"])["setting"], arm
        assert len(tried) == len({json.dumps(row["setting"]) for row in tried})


@pytest.mark.parametrize(("name", "table"), [(name, table) for name, quoted in QUOTED.items() for table in quoted])
def test_the_readme_quotes_the_result(name, table, tables):
    text = getattr(tables, table)(result_of(name))
    assert text.count("\n") > 2
    assert f"\n\n{text}\n\n" in README
    assert f"(recipes/benchmarks/results/{name}.md)" in README


OF_RECIPES = [
    (plan.stem, arm)
    for plan in sorted((BENCHMARKS / "plans").glob("*.yaml"))
    for arm, of_arm in yaml.safe_load(plan.read_text())["arms"].items()
    if "recipe" in of_arm
]


@pytest.mark.parametrize(("name", "arm"), OF_RECIPES)
def test_recipes_train_as_the_plan_with_what_was_chosen(name, arm, monkeypatch):
    """Clipping, for one, decides whether the net of LilNetX is any good."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    plan = yaml.safe_load((BENCHMARKS / "plans" / f"{name}.yaml").read_text())
    of_arm, runs = {"shares": {}, **plan["arms"][arm]}, RESULTS / f"{name}_runs"
    chosen = importlib.import_module("evidence").chosen(plan, runs) if runs.is_dir() else result_of(name)["chosen"]
    recipe = yaml.safe_load((ROOT / f"recipes/image-classification/{of_arm['recipe']}.yaml").read_text())
    defaults = {f.name: f.default for f in fields(METHODS[recipe["method"]].config_class)}
    shares = {name: round(share * plan["epochs"] * plan["steps_per_epoch"]) for name, share in of_arm["shares"].items()}
    if recipe.get("dense_epochs"):  # which the plan has not, so that the other steps differ
        shares = {}
    expected = {**plan["training"], **of_arm["flags"], **shares, **chosen.get(arm, {})}
    if recipe["method"] == "sfw":  # which is the optimizer
        expected = {name: value for name, value in expected.items() if not name.startswith("optim")}
    expected.pop("trainability_samples", None)  # what is logged
    of_recipe = {name: recipe.get(name, defaults[name]) for name in expected}
    assert {n: as_number(v) for n, v in of_recipe.items()} == {n: as_number(v) for n, v in expected.items()}


def as_number(value):
    """Flags are texts in some files."""
    return float(value) if re.fullmatch(r"[\d.e-]+", str(value)) else value
