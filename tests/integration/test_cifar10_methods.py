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

REGIONS = {
    "K-sparse": "k_sparse",
    "K-sparse with SFW-Init": "k_sparse_init",
    "K-support": "k_support",
    "group-K-support": "group",
    "spectral K-support": "spectral",
}


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("evidence_tables")


def mean(arm, pattern):
    numbers = RESULT["mean"][arm][pattern]
    return numbers["recalibrated" if pattern in PLAN["variants"] else "as_trained"]["mean"]


def test_every_arm_that_is_there_has_all_seeds_and_the_figure_has_all_its_arms():
    assert {len(RESULT["seeds"][arm]) for arm in RESULT["mean"]} == {len(PLAN["seeds"])}
    assert set(PLAN["figure"]["arms"]) <= set(RESULT["mean"])
    assert {len(tried) for tried in RESULT["tuning"].values()} == {4}


def test_numbers_of_sfw_are_those_of_the_result(tables):
    body = (ROOT / "README.md").read_text().split("| region, ResNet-20 | one-shot |")[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in body.splitlines()[2:]]
    assert {row[0] for row in rows} == set(REGIONS)
    for region, pattern, *cells in rows:
        assert cells == tables.beside(RESULT, REGIONS[region], "sgd", pattern)


def test_where_sfw_gains_from_trained_weights(tables):
    """More accurate when dense, behind where single weights are cut, level or ahead where most filters or ranks go."""
    for arm in ("k_sparse", "k_support"):
        assert tables.verdict(RESULT, arm, "sgd", "dense") == "yes"
        assert all(tables.verdict(RESULT, arm, "sgd", f"unstructured:{s}") == "no" for s in (0.9, 0.95))
    assert tables.verdict(RESULT, "group", "sgd", "low_rank:0.75") == "yes"
    assert tables.verdict(RESULT, "group", "sgd", "filters:0.7") == "within the spread"
    for pattern in (p for p in PLAN["variants"] if p.startswith("unstructured")):
        assert tables.verdict(RESULT, "k_sparse_init", "k_sparse", pattern) == "within the spread"


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


def test_what_is_trained_for_one_sparsity():
    below, level, above = (
        mean(f"gradual_{n}", p) - mean("cram_multi", p)
        for n, p in ((80, "unstructured:0.8"), (90, "unstructured:0.9"), (95, "unstructured:0.95"))
    )
    assert f"level with CrAM+ at 90 % and {above:.1f} points above it at 95 %, and {-below:.1f} below at 80 %" in README
    assert abs(level) < 0.5


def test_tpp_is_above_l1_where_much_goes(tables):
    more = mean("tpp_70", "blocks:filters:0.7") - mean("l1_70", "blocks:filters:0.7")
    assert f"TPP is {more:.1f} above L1 where 70 % of the filters inside the blocks go" in README
    assert tables.verdict(RESULT, "tpp_70", "l1_70", "blocks:filters:0.7") == "yes"
    assert tables.verdict(RESULT, "tpp_50", "l1_50", "blocks:filters:0.5") == "within the spread"


def test_lilnetx_writes_smaller_files():
    def file(arm, form):
        found = RESULT["files"][arm][form]
        return found["bytes"]["mean"] / 1000, found["as_loaded"]["mean"]

    coded, gradual = file("lilnetx", "lilnetx"), file("gradual_90", "int8")
    assert f"LilNetX writes {coded[0]:.0f} kB at {coded[1]:.1f} points" in README
    assert f"gradual pruning at 90 % followed by int8 ({gradual[0]:.0f} kB, {gradual[1]:.1f})" in README
    assert coded[0] < gradual[0]
    assert coded[1] > gradual[1]
    cut = [
        file(arm, "unstructured:0.8+int8")[0]
        for arm, forms in RESULT["files"].items()
        if "unstructured:0.8+int8" in forms
    ]
    assert coded[0] / min(cut) == pytest.approx(0.5, abs=0.05)


def test_what_training_adds_to_a_cut_that_looks_at_data():
    rows = json.loads((BENCHMARKS / "results" / "todays_tools.json").read_text())["checkpoints"]["start"]["rows"]
    by_data = {
        row["how"]: row["recalibrated"] for row in rows if row["how"].startswith("SparseGPT") and "error" not in row
    }
    nm, *shares = (
        (mean(arm, pattern), by_data[f"SparseGPTModifier, {how}, as matrices"])
        for arm, pattern, how in (
            ("cram_nm", "2:4", "2:4"),
            ("cram_multi", "unstructured:0.8", "0.8"),
            ("cram_multi", "unstructured:0.9", "0.9"),
        )
    )
    assert f"leave {nm[0]:.1f} at 2:4 where SparseGPT leaves {nm[1]:.1f}" in README
    assert "{:.1f} at 80 % ({:.1f}) and {:.1f} at 90 % ({:.1f})".format(*shares[0], *shares[1]) in README
    assert all(ours > theirs for ours, theirs in (nm, *shares))


def test_the_radius_trades_accuracy_for_sparsity_as_weight_decay_does():
    radii = json.loads((BENCHMARKS / "results" / "cifar10_sfw_radii.json").read_text())
    assert radii["plan"]["task"] == PLAN["task"]
    shares = ["dense", "unstructured:0.8", "unstructured:0.9", "unstructured:0.95"]

    def points(result, arm):
        kinds = [result["mean"][arm][p] for p in shares]
        return [kind.get("recalibrated", kind.get("as_trained"))["mean"] for kind in kinds]

    found = {int(arm.split("_")[1]): points(radii, arm) for arm in radii["mean"]}
    for radius, row in found.items():
        assert f"| SFW, radius `weights:{radius}` | {' | '.join(f'{x:.1f}' for x in row)} |" in README
    for arm, label in (("sgd", "weight decay 0.005, rate 0.1"), ("sgd_dense", "weight decay 0.0005, rate 0.05")):
        assert f"| SGD, {label} | {' | '.join(f'{x:.1f}' for x in points(RESULT, arm))} |" in README
        weight_decay, rate = (RESULT["chosen"][arm][name] for name in ("weight_decay", "learning_rate"))
        assert label == f"weight decay {weight_decay:g}, rate {rate:g}"
    assert sorted(found) == [1, 2, 3, 10]
    rows = [found[radius] for radius in sorted(found)]
    behind = points(RESULT, "sgd")[3] - max(row[3] for row in rows)
    assert f"the best of them stays {behind:.1f} points behind SGD at 95 %" in README
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)  # larger: more accurate when dense,
    assert [row[3] for row in rows] == sorted((row[3] for row in rows), reverse=True)  # and less so at 95 %


def test_from_new_weights_sfw_is_a_small_gain(tables):
    """A point above SGD tuned for cuts up to 80 %, level with it behind, and below SGD tuned dense when dense."""
    result = json.loads((BENCHMARKS / "results" / "cifar10_scratch.json").read_text())
    above = {p: by["difference"] for p, by in result["minus"]["k_sparse"]["sgd"].items()}
    verdicts = {p: tables.verdict(result, "k_sparse", "sgd", p) for p in above}
    less = ("dense", "unstructured:0.5", "unstructured:0.7", "unstructured:0.8")
    assert all(verdicts[p] == "yes" and round(above[p]) == 1 for p in less)
    assert {verdicts[p] for p in above if p not in less} == {"within the spread"}
    below = -result["minus"]["k_sparse"]["sgd_dense"]["dense"]["difference"]
    assert f"and {below:.1f} below SGD that was tuned dense when dense" in README
