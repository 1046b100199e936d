"""The command that makes every result again knows all of them, and calls every script with flags that it has."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest
import yaml

from tests.conftest import ROOT

BENCHMARKS = ROOT / "recipes" / "benchmarks"


@pytest.fixture
def everything(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("everything")


def test_every_result_is_made_by_a_job(everything):
    made = {name for job in everything.JOBS for name in job.makes}
    kept = {file.stem for file in (BENCHMARKS / "results").glob("*.json")}
    assert kept - made == set()
    plans = {file.stem for file in (BENCHMARKS / "plans").glob("*.yaml")}
    assert plans - made == {"digits", "gpu"}  # an example, and what needs an accelerator


def test_scripts_have_the_flags_that_they_are_called_with(everything):
    shared = set(re.findall(r'"(--\w+)"', (BENCHMARKS / "kept.py").read_text()))
    for job in everything.JOBS:
        source = (BENCHMARKS / f"{job.script}.py").read_text()
        known = set(re.findall(r'"(--\w+)"', source)) | (shared if "from kept import" in source else set())
        assert set(re.findall(r"--\w+", job.flags)) <= known, job.script


def test_what_lacks_its_data_is_left_out_by_name():
    command = [sys.executable, BENCHMARKS / "everything.py", "--list", "--place", "minilm_l6=net", "--only"]
    done = subprocess.run([*command, "coded_sizes", "goals", "codec_rate"], capture_output=True, text=True, check=True)
    first, second, last = done.stdout.splitlines()
    assert "goals left out: give --place published=PATH" in first
    assert re.search(r"coded_sizes\.py --model net --output \S+coded_sizes\.json", second)
    assert last.startswith("0.0 h on one thread")


def test_the_readme_says_how_long_it_takes(everything):
    readme = (ROOT / "README.md").read_text()
    hours = sum(job.minutes for job in everything.JOBS) / 60
    (plan,) = [job.minutes / 60 for job in everything.JOBS if "cifar10_resnet20" in job.makes]
    assert (
        f"It prints its hours first, {hours:.0f} of one core without an accelerator, of which {plan:.0f} are\n"
        in readme
    )
    gpu = yaml.safe_load((BENCHMARKS / "plans" / "gpu.yaml").read_text())["budget_hours"]
    assert f"which needs one, is estimated at {gpu} hours of it" in readme
