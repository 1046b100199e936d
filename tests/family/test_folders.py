"""A finished folder takes its place through links, never on mount points, and is kept where it cannot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import hf_compress as hfc
from hf_compress.cli import run
from hf_compress.family.manifest import MANIFEST, commit_folder, start_folder


def build(target, content):
    partial = start_folder(target)
    (partial / "dense").mkdir()
    (partial / MANIFEST).write_text(content)
    commit_folder(partial, target)


def test_a_link_keeps_pointing_where_it_did(tmp_path):
    link, place = tmp_path / "out", tmp_path / "disk" / "families"
    place.mkdir(parents=True)
    link.symlink_to(place)
    for content in ("first", "second", "third"):
        build(link, content)
        assert link.is_symlink()
        assert (place / MANIFEST).read_text() == content
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert [p.name for p in place.parent.iterdir()] == ["families"]
    place.joinpath(MANIFEST).unlink()
    place.joinpath("dense").rmdir()
    place.rmdir()  # a link to a folder that is yet to be made
    build(link, "fourth")
    assert (place / MANIFEST).read_text() == "fourth"


def test_leftovers_that_are_links_are_unlinked(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    build(tmp_path / "out", "first")
    for state in ("partial", "old"):
        (tmp_path / f".out.{state}").symlink_to(mine)
    build(tmp_path / "out", "second")
    assert (tmp_path / "out" / MANIFEST).read_text() == "second"
    assert (mine / "thesis.tex").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]
    (tmp_path / ".new.old").symlink_to(mine)
    build(tmp_path / "new", "third")
    assert not (tmp_path / "new").is_symlink()


def test_a_mount_point_is_refused_before_the_work(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("/proc")
    for target in (Path("/proc"), link):
        with pytest.raises(ValueError, match="/proc is a mount point.*such as /proc/family"):
            start_folder(target)


def test_a_mount_point_is_refused_before_a_model_is_loaded(capsys):
    assert run(["compress", "no/model", "--pattern=2:4", "--pattern=4:8", "--output_dir", "/proc"]) == 2
    assert "/proc is a mount point" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/mountinfo").is_file(), reason="mounts are listed on Linux")
def test_every_mounted_folder_is_refused():
    """Also one of the file system that it is mounted on, which has the same device."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    folders = [Path(line.split(" ")[4]) for line in lines if "\\" not in line]
    for folder in folders:
        if folder.is_dir() and folder.resolve() == folder:
            with pytest.raises(ValueError, match="is a mount point"):
                start_folder(folder)


def test_what_cannot_take_its_place_is_kept_and_named(tmp_path, vit, monkeypatch):
    old = hfc.build_family(vit, ["2:4"], output_dir=tmp_path / "family")
    rename = Path.rename

    def busy(self, to):
        if self.name == "family":
            raise OSError(16, "Device or resource busy")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(OSError, match=r"cannot put .*\.family\.partial in the place of .*busy; the folder is finished"):
        hfc.build_family(vit, ["4:8"], output_dir=tmp_path / "family")
    assert hfc.load_family(tmp_path / "family") == old
    assert [v.pattern for v in hfc.load_family(tmp_path / ".family.partial").variants] == ["4:8"]


@pytest.mark.parametrize(("system", "flushed"), [("posix", [MANIFEST, ".out.partial", "parent"]), ("nt", [MANIFEST])])
def test_folders_are_flushed_where_they_open_as_files(tmp_path, monkeypatch, system, flushed):
    target, opened, open_file = tmp_path / "parent" / "out", [], os.open
    partial = start_folder(target)
    (partial / MANIFEST).write_text("first")

    def note(path, *flags):
        opened.append(os.path.basename(path))
        return open_file(path, *flags)

    with monkeypatch.context() as other:
        other.setattr(os, "open", note)
        other.setattr(os, "name", system)
        commit_folder(partial, target)
    assert opened == flushed
    assert (target / MANIFEST).is_file()
