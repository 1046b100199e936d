"""Files of samples are read by their names, whatever a name looks like."""

from __future__ import annotations

import pytest

from hf_compress.tasks.data import read_file


@pytest.mark.parametrize(
    "name", ["data[1].csv", "a*b.csv", "q?.csv", "[!x].csv", "c{1,2}.csv", "**.csv", "d[1]/t.csv", ".hidden.csv"]
)
def test_a_name_with_characters_of_globs_reads_no_other_file(tmp_path, monkeypatch, name):
    (tmp_path / "d[1]").mkdir()
    (tmp_path / "d1").mkdir()
    for other in ("data1.csv", "axb.csv", "qq.csv", "y.csv", "c1.csv", "d1/t.csv"):
        (tmp_path / other).write_text("text,label\nwrong,1\n")
    (tmp_path / name).write_text("text,label\nright,0\n")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / name, name):
        assert read_file(str(path))["text"][:] == ["right"]
