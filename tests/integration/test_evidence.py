"""Plans of benchmarks: one runs to its end, also when it is killed on the way; that of the GPU runs for two steps."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.conftest import ROOT

BENCHMARKS = ROOT / "recipes" / "benchmarks"
PLANS = sorted((BENCHMARKS / "plans").glob("*.yaml"))


def command(plan, folder, *more):
    paths = ["--runs", folder / "runs", "--output", folder / "summary.json"]
    file = plan if isinstance(plan, Path) else BENCHMARKS / "plans" / f"{plan}.yaml"
    return [sys.executable, BENCHMARKS / "evidence.py", file, *paths, *more]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(plan, folder, *more):
    done = subprocess.run(command(plan, folder, *more), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def finished(folder):
    return {file.name: file.stat().st_mtime_ns for file in (folder / "runs").glob("*.json")}


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory):
    """The plan of the digits, killed after three runs, and run again to its end, by two processes."""
    folder = tmp_path_factory.mktemp("digits")
    process = subprocess.Popen(command("digits", folder), env=environment(), stdout=subprocess.DEVNULL)
    while len(finished(folder)) < 3 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = finished(folder)
    some = command("digits", folder, "--arms", "cram", "sgd_twice", "--output", folder / "some.json")
    beside = subprocess.Popen(some, env=environment(), stdout=subprocess.PIPE, text=True)
    output = run("digits", folder)
    of_some, _ = beside.communicate(timeout=300)
    assert beside.returncode == 0
    return folder, before, (output, of_some)


@pytest.mark.slow
def test_a_killed_plan_goes_on_where_it_was(killed_and_resumed):
    folder, before, (output, _) = killed_and_resumed
    after = finished(folder)
    assert 3 <= len(before) < len(after)
    assert {name: after[name] for name in before} == before  # not run again
    assert "h on one thread, budget" in output
    assert output.splitlines()[-1].startswith(str(folder / "summary.md"))
    assert "## Best of each pattern" in output
    assert "## Tried" not in output
    assert not list((folder / "runs").glob("*.claim"))


@pytest.mark.slow
def test_processes_share_the_runs(killed_and_resumed):
    """None is run twice, and the one with two arms of the plan runs nothing of the others."""
    folder, before, outputs = killed_and_resumed
    made = [[line for line in text.splitlines() if line.startswith("{'scores'")] for text in outputs]
    assert all(made)
    assert sum(map(len, made)) == len(finished(folder)) - len(before)
    assert not any("'gradual': {" in line for line in made[1])
    assert set(json.loads((folder / "some.json").read_text())["seeds"]) == {"sgd", "sgd_twice", "cram", "gradual"}


@pytest.mark.slow
def test_the_summary_is_that_of_the_runs(killed_and_resumed):
    folder, _, _ = killed_and_resumed
    result = json.loads((folder / "summary.json").read_text())
    assert all(seeds == [0, 1] or seeds == ["0", "1"] for seeds in result["seeds"].values())
    rows = [json.loads(file.read_text()) for file in (folder / "runs").glob("*.json")]
    rate = result["chosen"]["sgd"]["learning_rate"]
    values = [
        row["scores"]["2:4"]["recalibrated"]
        for row in rows
        if row["settings"]["held_out"] == 0
        and row["settings"]["method"] == "plain"
        and row["settings"]["flags"]["max_steps"] == 32
        and row["settings"]["flags"]["learning_rate"] == rate
        and "gradual" not in row["settings"]
    ]
    assert len(values) == 2
    mean = result["mean"]["sgd"]["2:4"]["recalibrated"]
    assert sorted(mean["by_seed"]) == sorted(values)
    assert mean["mean"] == pytest.approx(statistics.mean(values), abs=1e-3)
    assert mean["std"] == pytest.approx(statistics.stdev(values), abs=1e-3)
    ours = result["mean"]["cram"]["2:4"]["recalibrated"]["by_seed"]
    minus = result["minus"]["cram"]["sgd"]["2:4"]
    assert minus["by_seed"] == pytest.approx([a - b for a, b in zip(ours, mean["by_seed"], strict=True)], abs=2e-3)


@pytest.mark.slow
def test_the_best_of_a_pattern_is_named_with_its_margin(killed_and_resumed):
    folder, _, _ = killed_and_resumed
    result = json.loads((folder / "summary.json").read_text())
    table = (folder / "summary.md").read_text().split("## Best of each pattern\n\n")[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert {row[0] for row in rows} == {"dense", "unstructured:0.5", "unstructured:0.8", "2:4", "filters:0.5"}
    for pattern, best, points, _, margin in rows:
        kind = "as_trained" if pattern == "dense" else "recalibrated"
        found = {arm: own[pattern][kind] for arm, own in result["mean"].items() if pattern in own}
        plain = found.pop("sgd")
        arm = max(found, key=lambda name: found[name]["mean"])
        by_seed = [a - b for a, b in zip(found[arm]["by_seed"], plain["by_seed"], strict=True)]
        ahead = statistics.mean(by_seed)
        assert (best, points.split()[0]) == (result["plan"]["arms"][arm]["label"], f"{found[arm]['mean']:.1f}")
        assert float(margin.split()[0]) == pytest.approx(ahead, abs=0.06)
        assert margin.endswith(" *") == (ahead <= max(found[arm]["std"], plain["std"], statistics.stdev(by_seed)))


@pytest.mark.slow
def test_the_setting_is_chosen_by_what_was_held_out(killed_and_resumed):
    folder, _, _ = killed_and_resumed
    result = json.loads((folder / "summary.json").read_text())
    for arm, tried in result["tuning"].items():
        best = max(tried, key=lambda row: row["points"])
        assert result["chosen"][arm] == best["setting"]
    rows = [json.loads(file.read_text())["settings"] for file in (folder / "runs").glob("*.json")]
    assert sum(row["held_out"] > 0 for row in rows) == sum(map(len, result["tuning"].values()))


@pytest.mark.slow
def test_plots_come_from_the_summary_alone(killed_and_resumed, tmp_path):
    folder, _, _ = killed_and_resumed
    for suffix in (".png", ".svg"):
        assert (folder / "summary").with_suffix(suffix).stat().st_size > 10_000
    (tmp_path / "summary.json").write_text((folder / "summary.json").read_text())
    run("digits", tmp_path, "--plot")
    for picture in ("summary.png", "summary.svg", "summary_figure.png", "summary_figure.svg"):
        assert (tmp_path / picture).read_bytes() == (folder / picture).read_bytes()
    assert (tmp_path / "summary.md").read_text() == (folder / "summary.md").read_text()
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_partial_summary_counts_the_seeds_of_each_arm(killed_and_resumed, tmp_path):
    folder, before, _ = killed_and_resumed
    (tmp_path / "runs").mkdir()
    for name in before:
        (tmp_path / "runs" / name).write_text((folder / "runs" / name).read_text())
    run("digits", tmp_path, "--partial")
    result = json.loads((tmp_path / "summary.json").read_text())
    assert set(result["seeds"]) == {"sgd", "sgd_twice", "cram", "gradual"}
    assert not any(result["seeds"].values())  # three runs are of the grids


@pytest.mark.slow
def test_the_plan_of_the_gpu_runs_for_two_steps(tmp_path):
    """An arm of each method and each net."""
    write_images(tmp_path / "cifar10")
    plan = yaml.safe_load((BENCHMARKS / "plans" / "gpu.yaml").read_text())
    plan["arms"] = {name: plan["arms"][name] for name in ("sgd", "cram_95", "k_sparse", "l1_90", "lilnetx", "wide_sgd")}
    plan |= {"baselines": ["sgd"], "pairs": [["lilnetx", "wide_sgd"]]}
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(plan))
    output = run(file, tmp_path, "--steps", "2", "--place", f"cifar10={tmp_path / 'cifar10'}")
    assert set(json.loads((tmp_path / "summary.json").read_text())["mean"]) == set(plan["arms"])
    assert "h on one thread, budget 160 h" in output


def write_images(folder):
    """Some images in the form of CIFAR-10."""
    from datasets import Dataset, Features, Image, Value
    from PIL.Image import fromarray

    folder.mkdir()
    draws = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 20)):
        images = [fromarray(draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
        columns = {"image": images, "label": [i % 10 for i in range(count)]}
        data = Dataset.from_dict(columns, features=Features({"image": Image(), "label": Value("int64")}))
        data.to_parquet(str(folder / f"{split}-0.parquet"))


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_plans_are_whole(file):
    plan = yaml.safe_load(file.read_text())
    assert plan["budget_hours"] > 0
    for name, arm in plan["arms"].items():
        assert "like" in arm or "finished" in arm or "method" in arm, name
        assert arm.get("like", name) in plan["arms"], name
    budgets = {len(arm["grid"]) for arm in plan["arms"].values() if "grid" in arm}
    assert len(budgets) <= 1  # the same for every arm that is tuned
    assert file.stem != "cifar10_resnet20" or budgets == {4}
    for name in (*plan["baselines"], *(arm for pair in plan["pairs"] for arm in pair)):
        assert name in plan["arms"]
