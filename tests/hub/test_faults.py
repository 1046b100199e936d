"""Publishing while the Hub fails: faults that pass are waited out, and what is there at the end is whole."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import hf_compress as hfc
from hf_compress.hub import retry
from tests.conftest import tiny_bert
from tests.hub.server import RESET
from tests.hub.test_interrupted import assert_complete, is_commit, is_main

PATTERNS = ["unstructured:0.5", "2:4"]
PLACES = {
    "create": ("POST", "/api/repos/create"),
    "look": ("GET", "/tree/main"),
    "info": ("GET", "/revision/"),
    "first commit": ("GET", "/commits/"),
    "branch": ("POST", "/branch/"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/info/lfs/objects/batch"),
    "upload": ("PUT", "/_lfs/"),
    "verify": ("POST", "/verify"),
    "commit": ("POST", "/commit/nm-2of4"),
    "main": ("POST", "/commit/main"),
}


def build(folder, seed):
    model = tiny_bert()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.add_(seed)
    return hfc.build_family(model, PATTERNS, lambda m: {"accuracy": 0.5 + seed / 10}, None, folder)


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Two that differ in every checkpoint."""
    return [build(tmp_path_factory.mktemp("families") / str(seed), seed) for seed in (0, 1)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Nobody waits for seconds: neither we, nor the client."""
    monkeypatch.setattr(retry, "WAITS", (0.001,) * 4)
    sleep = time.sleep
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: sleep(min(seconds, 0.002)))


def fail(method, path, status, count=1):
    """A hook of the server that fails the first requests of a kind."""
    seen = []

    def hook(asked, address):
        if asked == method and path in address:
            seen.append(address)
            return status if len(seen) <= count else None
        return None

    hook.seen = seen
    return hook


@pytest.mark.parametrize("status", [500, 429, RESET])
@pytest.mark.parametrize("place", PLACES)
def test_a_fault_that_passes_is_waited_out(here, families, monkeypatch, place, status):
    hook = fail(*PLACES[place], status, count=2)
    monkeypatch.setattr(here, "before", hook)
    publication = families[0].push_to_hub("six")
    assert len(hook.seen) > 2
    assert list(publication.commits) == ["unstructured-0.50", "nm-2of4", "main"]
    assert all(publication.commits.values())
    assert_complete(here, families[0])


@pytest.mark.parametrize("place", ["create", "branch", "commit", "main"])
def test_an_answer_that_is_lost_is_no_second_commit(here, families, monkeypatch, place):
    hook = fail(*PLACES[place], RESET)
    monkeypatch.setattr(here, "after", hook)
    publication = families[0].push_to_hub("six")
    assert hook.seen
    assert all(publication.commits.values())
    assert_complete(here, families[0])
    repo = here.repos["tester/six"]
    for revision, commit in publication.commits.items():
        assert repo.branches[revision] == commit
        parent = repo.log[commit][1]
        assert repo.log[parent] == ("initial commit", None)  # one commit, not two


@pytest.mark.parametrize(("status", "error"), [(500, "500"), (RESET, "cannot be reached")])
def test_a_fault_that_stays_is_an_error_and_the_next_push_completes(here, families, monkeypatch, status, error):
    monkeypatch.setattr(here, "before", lambda m, p: status if is_main(m, p) else None)
    with pytest.raises(OSError, match=error):
        families[0].push_to_hub("six")
    assert "family.json" not in here.repos["tester/six"].files()
    monkeypatch.setattr(here, "before", None)
    families[0].push_to_hub("six")
    assert_complete(here, families[0])


@pytest.mark.parametrize(("status", "error"), [(400, "Bad request"), (401, "401"), (403, "403"), (404, "404")])
def test_a_refusal_is_not_repeated(here, families, monkeypatch, status, error):
    hook = fail("POST", "/commit/nm-2of4", status, count=9)
    monkeypatch.setattr(here, "before", hook)
    with pytest.raises(OSError, match=error):
        families[0].push_to_hub("six")
    assert len(hook.seen) == 1


def test_a_slow_hub_is_waited_for(here, families, monkeypatch):
    monkeypatch.setattr(here, "before", lambda m, p: time.sleep(0.15))
    families[0].push_to_hub("six")
    assert_complete(here, families[0])


def test_a_commit_that_came_between_is_built_upon(here, families, monkeypatch):
    """The parent is stale at the first try: the license that another push brought stays."""
    came = []

    def before(method, path):
        if is_main(method, path) and not came:
            repo = here.repos["tester/six"]
            tree = dict(repo.commits[repo.branches["main"]])
            tree["LICENSE"] = tree[".gitattributes"]
            came.append(repo.commit("main", tree, "a license"))

    monkeypatch.setattr(here, "before", before)
    publication = families[0].push_to_hub("six")
    repo = here.repos["tester/six"]
    assert repo.log[publication.commits["main"]][1] == came[0]
    assert "LICENSE" in repo.files()
    assert_complete(here, families[0])


def test_two_pushes_at_once_end_with_one_family(here, families, monkeypatch):
    """Both are in the middle when the other goes on; the one that comes last is there as a whole."""
    meet = threading.Barrier(2, timeout=60)
    seen = []

    def before(method, path):
        if is_commit(method, path) and "nm-2of4" in path and len(seen) < 2:
            seen.append(path)
            meet.wait()

    monkeypatch.setattr(here, "before", before)
    found = {}
    threads = [threading.Thread(target=lambda f=f: found.update({f.folder: f.push_to_hub("six")})) for f in families]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    last = hfc.load_family("tester/six")
    (winner,) = [f for f in families if f.files == last.files]
    assert_complete(here, winner)
    for variant in last.checkpoints:
        last.path_to(variant)


def test_a_reader_sees_one_family_or_the_other(here, families):
    """Another process reads as fast as it can while families replace each other."""
    families[0].push_to_hub("six")
    stop, read, problems = threading.Event(), [], []

    def reading():
        while not stop.is_set():
            try:
                family = hfc.load_family("tester/six")
                for variant in family.checkpoints:
                    family.path_to(variant)
                read.append(family.dense.metrics["accuracy"])
            except Exception as error:
                problems.append(error)

    reader = threading.Thread(target=reading)
    reader.start()
    for i in range(1, 5):
        families[i % 2].push_to_hub("six")
    stop.set()
    reader.join()
    assert not problems
    assert set(read) <= {0.5, 0.6}
    assert len(set(read)) == 2
