"""What is released: the wheel has all that the package needs, and the files about it name its version."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile

import pytest
import yaml

import hf_compress as hfc
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=240)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_every_file_of_the_package_and_the_recipes(wheel):
    assert wheel.name.startswith(f"hf_compress-{hfc.__version__}-py3")
    names = set(zipfile.ZipFile(wheel).namelist())
    package = [p for p in (ROOT / "hf_compress").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {p.relative_to(ROOT).as_posix() for p in package} <= names
    recipes = [p for p in (ROOT / "recipes").glob("*/*.yaml") if p.parent.name != "benchmarks"]
    assert len(recipes) > 30
    assert {f"hf_compress/{p.relative_to(ROOT).as_posix()}" for p in recipes} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "recipes/"))]


def test_the_wheel_works_away_from_the_checkout(wheel, tmp_path):
    """Unpacked into an empty folder, in a process that sees no other copy."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import hf_compress, hf_compress.cli.main as m; "
        "assert hf_compress.__file__.startswith(r'{}'), hf_compress.__file__; "
        "assert m.run(['recipes']) == 0; print(hf_compress.__version__)"
    ).format(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == hfc.__version__
    assert any("digits_cram" in line for line in lines)


def test_version_and_title_are_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == hfc.__version__
    assert citation["title"] == "hf_compress"
    assert {"cff-version", "message", "authors"} <= citation.keys()
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest
    assert newest[1] == hfc.__version__
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{hfc.__version__}"' in pyproject
    assert re.fullmatch(r"\d+\.\d+\.\d+", hfc.__version__)
