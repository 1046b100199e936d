"""A push that is killed at any request: readers see the old family or the new one, and the next push completes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

import hf_compress as hfc
from tests.hub.test_faults import build
from tests.hub.test_interrupted import assert_complete

KILLS = 25


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return [build(tmp_path_factory.mktemp("families") / str(seed), seed) for seed in (0, 1)]


def test_25_kills(here, families, tmp_path, monkeypatch):
    """Each kill is at another request of a push that changes every revision, from the first one to the last."""
    for family in (*families, families[0]):
        before = len(here.requests)
        family.push_to_hub("six")
    count = len(here.requests) - before  # with all large files on the Hub, as below
    families[1].push_to_hub("six")
    assert count >= 20
    loop = subprocess.Popen(
        [sys.executable, "-m", "tests.hub.push_loop", *(str(f.folder) for f in families)],
        env={**os.environ, **here.environment(tmp_path / "home")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert loop.stdout.readline() == "ready\n"
    seen = []
    for kill in range(KILLS):
        old, new = families[(kill + 1) % 2], families[kill % 2]
        status = push_and_kill(loop, here, kill % 2, 1 + kill * (count - 1) // (KILLS - 1), monkeypatch)
        assert os.WTERMSIG(status) == signal.SIGKILL
        found = hfc.load_family("tester/six")
        assert found.files in (old.files, new.files)
        for variant in found.checkpoints:
            found.path_to(variant)
        seen.append(found.files == new.files)
        new.push_to_hub("six")
        assert_complete(here, new)
    loop.stdin.close()
    assert loop.wait(60) == 0
    assert seen.count(False) > 20  # main comes last


def push_and_kill(loop, hub, which, at, monkeypatch):
    """The exit status of a process that pushes a family and is killed when its n-th request arrives."""
    asked = []

    def before(method, path):
        asked.append(path)
        if len(asked) == at:
            os.kill(child, signal.SIGKILL)

    loop.stdin.write(f"{which}\n")
    loop.stdin.flush()
    child = int(loop.stdout.readline())
    monkeypatch.setattr(hub, "before", before)
    loop.stdin.write("go\n")
    loop.stdin.flush()
    status = int(loop.stdout.readline())
    monkeypatch.setattr(hub, "before", None)
    return status
