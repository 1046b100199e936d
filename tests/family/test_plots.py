"""Pictures: the same numbers make the same files, byte for byte, so that publishing again changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_compress.family.manifest import read_manifest
from hf_compress.family.plots import plot_family
from hf_compress.family.table import format_size
from hf_compress.report import inspect_checkpoint
from hf_compress.report.plots import plot_report
from tests.conftest import ROOT, tiny_vit


def test_pictures_of_a_family_are_the_same_again(tmp_path):
    family = read_manifest(ROOT / "model_cards" / "digits_cram")
    first, second = (plot_family(family, tmp_path / name / "sparsity") for name in "ab")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_pictures_of_a_report_are_the_same_again(tmp_path):
    tiny_vit().save_pretrained(tmp_path / "model")
    report = inspect_checkpoint(str(tmp_path / "model"))
    first, second = (plot_report(report, tmp_path / name / "report") for name in "ab")
    assert len(first) == 2
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


@pytest.mark.parametrize("name", ["acc $\\frac{1}$", "a$b", r"x$\q$"])
def test_a_dollar_in_a_name_is_no_formula(tmp_path, name):
    family = read_manifest(ROOT / "model_cards" / "digits_cram")
    named = [replace(v, metrics={name: v.metrics["accuracy"]}) for v in family.checkpoints]
    family = replace(family, dense=named[0], variants=tuple(named[1:]))
    assert len(plot_family(family, tmp_path / "plots" / "sparsity")) == 2
    folder = tmp_path / name
    tiny_vit().save_pretrained(folder)
    report = inspect_checkpoint(str(folder), "2:4")
    assert len(plot_report(report, tmp_path / "report")) == 2


def test_a_dense_checkpoint_without_bytes_divides_nothing(tmp_path):
    family = read_manifest(ROOT / "model_cards" / "digits_lilnetx")
    assert plot_family(replace(family, dense=replace(family.dense, bytes=0)), tmp_path / "sparsity")


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (999_949, "999.9 kB"), (999_960, "1.0 MB"), (999_999_999, "1.0 GB"), (0, "0 B")]
)
def test_sizes_have_the_unit_that_they_round_to(count, text):
    assert format_size(count) == text
