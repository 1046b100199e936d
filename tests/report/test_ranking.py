"""The data-free ranking of layers against measured losses of accuracy: what the documentation claims."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.conftest import ROOT

DATA = ROOT.parent / "shared" / "data"
RESULT = ROOT / "recipes" / "benchmarks" / "results" / "report_ranking.json"


def benchmark():
    spec = importlib.util.spec_from_file_location("report_ranking", ROOT / "recipes/benchmarks/report_ranking.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_score_was_the_best_where_it_was_chosen_and_holds_where_it_was_not():
    result = json.loads(RESULT.read_text())
    score, means = result["score_of_the_report"], {name: net["mean"] for name, net in result["nets"].items()}
    assert max(means[result["chosen_on"]], key=means[result["chosen_on"]].get) == score
    assert set(means) == {"resnet20_jpeg", "resnet32"}
    for name, mean in means.items():
        assert mean[score] > 0.5, name
        assert mean[score] > mean["energy lost"], name
        assert mean[score] > mean["early in the net"], name


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not here")
def test_on_resnet20():
    """The whole measurement on fewer images, and a ranking that must not agree."""
    script = benchmark()
    pixels, labels = script.test_images(DATA / "cifar10", 500)
    found = script.study(DATA / "resnet_cifar10" / "resnet20_jpeg.safetensors", "resnet20_cifar", pixels, labels)
    assert found["dense"]["accuracy"] == pytest.approx(88.5, abs=3)
    assert set(found["conditions"]) == set(script.CONDITIONS)
    assert all(len(condition["loss"]) == 20 for condition in found["conditions"].values())
    assert found["mean"][script.SCORE] > 0.6
    assert found["mean"]["early in the net"] < 0
