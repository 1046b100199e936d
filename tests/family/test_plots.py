"""Pictures: the same numbers make the same files, byte for byte, so that publishing again changes nothing."""

from __future__ import annotations

from hf_compress.family.manifest import read_manifest
from hf_compress.family.plots import plot_family
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
