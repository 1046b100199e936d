"""A client that dies while it publishes a family leaves nothing half-published, and the next push completes it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.hub.server import HubServer

pytestmark = pytest.mark.slow  # real processes: 30 seconds and more in all

PUSH = "import sys; import hf_compress as hfc; hfc.load_family(sys.argv[1]).push_to_hub('six')"


def is_put(method, path):
    return method == "PUT"


def is_commit(method, path):
    return method == "POST" and "/commit/" in path


def is_main(method, path):
    return is_commit(method, path) and path.endswith("/main")


@pytest.mark.parametrize(
    ("kind", "count", "is_received"),
    [(is_put, 1, False), (is_commit, 3, True), (is_main, 1, False)],
    ids=["first upload", "third commit, received", "commit of main"],
)
def test_killed_and_run_again(here, family, tmp_path, kind, count, is_received, monkeypatch):
    reached, killed, seen = threading.Event(), threading.Event(), []

    def before(method, path):
        if kind(method, path) and not killed.is_set():
            seen.append(path)
            if len(seen) == count:
                reached.set()
                killed.wait(60)
                return None if is_received else 503
        return None

    monkeypatch.setattr(here, "before", before)
    process = subprocess.Popen(
        [sys.executable, "-c", PUSH, str(family.folder)],
        env={**os.environ, **here.environment(tmp_path / "home")},
        stderr=subprocess.DEVNULL,
    )
    assert reached.wait(90)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed.set()
    repo = here.repos["tester/six"]
    assert "family.json" not in repo.files()  # nobody can take it for whole
    publication = family.push_to_hub("six")
    assert publication.commits["main"] is not None
    assert_complete(here, family)
    assert set(family.push_to_hub("six").commits.values()) == {None}


def assert_complete(hub: HubServer, family):
    repo = hub.repos["tester/six"]
    assert json.loads(repo.files()["family.json"])["files"] == family.files
    for variant in family.variants:
        files = repo.files(variant.revision)
        for name in family.files_of(variant):
            assert files[name] == (family.folder / variant.path / name).read_bytes()
        assert set(files) == {".gitattributes", "README.md", *family.files_of(variant)}


def test_an_upload_that_the_hub_refuses_ends_with_an_error_and_can_be_repeated(here, family, monkeypatch):
    monkeypatch.setattr(here, "before", lambda method, path: 403 if is_main(method, path) else None)
    with pytest.raises(OSError, match="403"):
        family.push_to_hub("six")
    assert "family.json" not in here.repos["tester/six"].files()
    monkeypatch.setattr(here, "before", None)
    commits = family.push_to_hub("six").commits
    assert commits["main"] is not None
    assert not any(commits[v.revision] for v in family.variants)
    assert_complete(here, family)
