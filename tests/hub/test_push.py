"""Families pushed to a Hub over real HTTP, and what a stranger gets from there."""

from __future__ import annotations

import json

import pytest
import torch

import hf_compress as hfc
from tests.hub.conftest import PATTERNS, run_python

BRANCHES = ["main", "unstructured-0.50", "unstructured-0.90", "nm-2of4", "int8", "nm-2of4_int8"]


@pytest.fixture
def pushed(here, family):
    publication = family.push_to_hub("six")
    assert publication.repo_id == "tester/six"
    assert list(publication.commits) == [*BRANCHES[1:], "main"]
    assert all(publication.commits.values())
    return here


def test_main_holds_the_dense_checkpoint_and_all_that_describes_the_family(pushed, family):
    files = pushed.repos["tester/six"].files()
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "family.json",
        "model.safetensors",
        "plots/sparsity.png",
        "plots/sparsity.svg",
        "recipe.yaml",
    }
    assert files["family.json"] == (family.folder / "family.json").read_bytes()
    assert files["model.safetensors"] == (family.folder / "dense" / "model.safetensors").read_bytes()


def test_a_revision_holds_its_variant_and_no_dense_file(pushed, family):
    repo = pushed.repos["tester/six"]
    assert set(repo.branches) == set(BRANCHES)
    dense = (family.folder / "dense" / "model.safetensors").read_bytes()
    for variant in family.variants:
        files = repo.files(variant.revision)
        assert set(files) == {".gitattributes", "README.md", *family.files_of(variant)}
        for name in family.files_of(variant):
            assert files[name] == (family.folder / variant.path / name).read_bytes()
        assert dense not in files.values()


def test_a_second_push_makes_no_commit(pushed, family):
    before = len(pushed.requests)
    publication = family.push_to_hub("tester/six")
    assert set(publication.commits.values()) == {None}
    later = pushed.requests[before:]
    assert not [path for _, path in later if "/commit/" in path or "/preupload/" in path or "_lfs" in path]


def test_only_what_changed_is_sent(pushed, family, tmp_path):
    folder = tmp_path / "changed"
    hfc.build_family(
        _bert(), PATTERNS[:2], lambda m: {"accuracy": 0.25}, None, folder, method="cram", task="text-classification"
    )
    before = len(pushed.requests)
    publication = hfc.load_family(folder).push_to_hub("tester/six")
    # The weights are those of before; metrics changed, and with them the cards, the manifest and the plot.
    (sent,) = [path.split("/")[-1] for method, path in pushed.requests[before:] if method == "PUT"]
    assert pushed.blobs[sent].startswith(b"\x89PNG")
    assert all(publication.commits.values())
    assert json.loads(pushed.repos["tester/six"].files()["family.json"])["dense"]["metrics"] == {"accuracy": 0.25}
    assert set(pushed.repos["tester/six"].branches) == set(BRANCHES)  # nothing is deleted


def test_files_of_an_older_family_go_and_those_of_others_stay(pushed, family):
    repo = pushed.repos["tester/six"]
    tree = dict(repo.commits[repo.branches["main"]])
    tree["model-00001-of-00002.safetensors"] = tree["model.safetensors"]
    tree["LICENSE"] = tree["family.json"]
    repo.commit("main", tree, "by hand")
    family.push_to_hub("six")
    assert "LICENSE" in repo.files()
    assert "model-00001-of-00002.safetensors" not in repo.files()


def test_somebody_elses_model_is_not_overwritten(here, family):
    from huggingface_hub import HfApi

    HfApi().create_repo("other")
    repo = here.repos["tester/other"]
    repo.commit("main", {"model.safetensors": next(iter(repo.commits.values()))[".gitattributes"]}, "a model")
    before = dict(repo.branches)
    with pytest.raises(ValueError, match=r"tester/other holds weights but no family\.json"):
        family.push_to_hub("other")
    assert repo.branches == before


def test_an_edited_folder_is_not_pushed(here, tmp_path):
    family = hfc.build_family(_bert(), ["2:4"], None, None, tmp_path / "family")
    path = family.folder / "nm-2of4" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ValueError, match="nm-2of4/model.safetensors differs from its hash"):
        family.push_to_hub("edited")
    assert not here.repos


def test_a_family_is_read_from_the_hub(pushed, family):
    found = hfc.load_family("tester/six")
    assert found.repo_id == "tester/six"
    assert found.variants == family.variants
    assert found["2:4"].metrics == family["2:4"].metrics
    downloads = [path for _, path in pushed.requests if path.endswith("model.safetensors") and "resolve" in path]
    assert not downloads  # checkpoints come when they are asked for
    for variant in (found.dense, *found.variants):
        folder = found.path_to(variant)
        for name in family.files_of(variant):
            assert (folder / name).read_bytes() == (family.folder / variant.path / name).read_bytes()
    with pytest.raises(ValueError, match="lies on the Hub already"):
        found.push_to_hub("again")


def test_an_older_family_is_read_by_its_commit(pushed, family, tmp_path):
    first = pushed.repos["tester/six"].branches["main"]
    other = hfc.build_family(_bert(1), ["2:4"], lambda m: {"accuracy": 0.1}, None, tmp_path / "other")
    other.push_to_hub("six")
    assert hfc.load_family("tester/six").dense.metrics == {"accuracy": 0.1}
    old = hfc.load_family("tester/six", revision=first)
    assert old.dense.metrics == family.dense.metrics
    for variant in (old.dense, old["2:4"]):  # the revision of 2:4 has moved on
        assert (old.path_to(variant) / "model.safetensors").read_bytes() == (
            family.path_to(variant) / "model.safetensors"
        ).read_bytes()


def test_a_revision_that_was_edited_on_the_hub_is_read_from_its_history(pushed, family):
    repo = pushed.repos["tester/six"]
    tree = dict(repo.commits[repo.branches["nm-2of4"]])
    tree["model.safetensors"] = repo.commits[repo.branches["main"]]["model.safetensors"]
    edited = repo.commit("nm-2of4", tree, "dense weights under a false name")
    found = hfc.load_family("tester/six")
    own = (family.path_to("2:4") / "model.safetensors").read_bytes()
    assert (found.path_to("2:4") / "model.safetensors").read_bytes() == own
    repo.log[edited] = ("squashed", None)
    with pytest.raises(ValueError, match=r"model\.safetensors differs from its hash"):
        found.path_to("2:4")
    del repo.branches["int8"]
    with pytest.raises(ValueError, match="tester/six has no revision int8, which its manifest names"):
        found.path_to("int8")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", "neither a folder nor a repository"),
        ("out/no such folder", "holds no family.json"),
        ("tester/plain", "tester/plain holds no family.json"),
    ],
)
def test_what_is_no_family_says_so(here, name, message):
    from huggingface_hub import HfApi

    HfApi().create_repo("plain")
    with pytest.raises(ValueError, match=message):
        hfc.load_family(name)


def test_a_private_family_needs_the_token(here, family, monkeypatch):
    family.push_to_hub("secret", private=True)
    assert here.repos["tester/secret"].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="neither a folder nor a repository on the Hub that you may read"):
        hfc.load_family("tester/secret")
    with pytest.raises(OSError, match="401"):
        family.push_to_hub("tester/secret")
    found = hfc.load_family("tester/secret", token=here.token)
    assert found.path_to("2:4", token=here.token).is_dir()


# A stranger: transformers, and no hf_compress that could be imported.
STRANGER = """
import importlib.abc, json, sys

class Wall(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_compress":
            raise ImportError(name)

sys.meta_path.insert(0, Wall())
import torch
from transformers import AutoModelForSequenceClassification
found = {}
for revision in sys.argv[1:]:
    model = AutoModelForSequenceClassification.from_pretrained("tester/six", revision=revision).eval()
    with torch.no_grad():
        found[revision] = model(input_ids=torch.arange(5, 17)[None]).logits.tolist()
assert "hf_compress" not in sys.modules
print("LOGITS" + json.dumps(found))
"""


def test_a_stranger_gets_the_same_logits_from_every_revision(pushed, family, tmp_path):
    from transformers import AutoModelForSequenceClassification

    output = run_python(STRANGER, pushed.environment(tmp_path / "home"), *BRANCHES)
    logits = json.loads(output.split("LOGITS")[1])
    for variant in (family.dense, *family.variants):
        model = AutoModelForSequenceClassification.from_pretrained(family.path_to(variant)).eval()
        with torch.no_grad():
            assert model(input_ids=torch.arange(5, 17)[None]).logits.tolist() == logits[variant.revision]
    assert len({json.dumps(values) for values in logits.values()}) == len(BRANCHES)


def _bert(seed=0):
    import torch

    from tests.conftest import tiny_bert

    model = tiny_bert()
    with torch.no_grad():
        model.classifier.bias.add_(seed)
        model.bert.encoder.layer[0].output.dense.weight.add_(seed)
    return model
