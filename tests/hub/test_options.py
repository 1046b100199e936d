"""Options of a push: pull requests, own repositories, organisations, overwriting, and tokens that stay at home."""

from __future__ import annotations

import logging

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

import hf_compress as hfc
from hf_compress.cli.main import run
from hf_compress.hub import retry
from tests.conftest import tiny_bert
from tests.hub.test_faults import build
from tests.hub.test_interrupted import assert_complete


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return [build(tmp_path_factory.mktemp("families") / str(seed), seed) for seed in (0, 1)]


def test_a_pull_request_leaves_main_as_it_is(here, families, capsys):
    families[0].push_to_hub("six")
    repo = here.repos["tester/six"]
    main = repo.branches["main"]
    publication = families[1].push_to_hub("six", create_pr=True)
    assert publication.pull_request == f"{here.url}/tester/six/discussions/1"
    assert repo.branches["main"] == main
    assert repo.branches["refs/pr/1"] == publication.commits["main"]
    assert repo.files("refs/pr/1")["family.json"] == (families[1].folder / "family.json").read_bytes()
    assert repo.files("nm-2of4")["model.safetensors"] == (families[1].path_to("2:4") / "model.safetensors").read_bytes()
    old = hfc.load_family("tester/six")  # of main, whose revisions have moved on
    assert old.files == families[0].files
    assert all(old.path_to(variant).is_dir() for variant in old.checkpoints)
    repo.branches["main"] = repo.branches["refs/pr/1"]
    assert_complete(here, families[1])
    assert run(["push", str(families[0].folder), "six", "--create_pr"]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == f"{here.url}/tester/six/discussions/2"


def test_another_push_makes_no_second_pull_request(here, families, monkeypatch):
    families[0].push_to_hub("six")
    repo, came = here.repos["tester/six"], []

    def before(method, path):
        if path.endswith("/commit/nm-2of4") and not came:
            came.append(repo.commit("nm-2of4", dict(repo.commits[repo.branches["nm-2of4"]]), "another push"))

    monkeypatch.setattr(retry, "WAITS", (0.001,) * 4)
    monkeypatch.setattr(here, "before", before)
    publication = families[1].push_to_hub("six", create_pr=True)
    assert came
    assert publication.commits["main"] == repo.branches["refs/pr/1"]
    assert "refs/pr/2" not in repo.branches


def test_own_repositories_in_a_collection(here, families, monkeypatch):
    publication = families[0].push_to_hub("six", own_repositories=True, private=True)
    names = ["tester/six", "tester/six-unstructured-0.50", "tester/six-nm-2of4"]
    assert list(here.repos) == names
    assert all(repo.private and list(repo.branches) == ["main"] for repo in here.repos.values())
    (slug,) = here.collections
    assert publication.collection == f"{here.url}/collections/{slug}"
    assert here.collections[slug]["items"] == names
    assert here.collections[slug]["private"]
    found = hfc.load_family("tester/six")
    for variant in found.checkpoints:
        path = found.path_to(variant) / "model.safetensors"
        assert path.read_bytes() == (families[0].path_to(variant) / "model.safetensors").read_bytes()
    assert set(families[0].push_to_hub("six", own_repositories=True).commits.values()) == {None}
    assert here.collections[slug]["items"] == names
    second = families[1].push_to_hub("six", own_repositories=True)
    assert all(second.commits.values())
    assert found.path_to("2:4").is_dir()  # of the first one, from the history


def test_own_repositories_of_a_private_family_are_private(here, families):
    HfApi().create_repo("six", private=True)
    families[0].push_to_hub("six", own_repositories=True)
    assert len(here.repos) == 3
    assert all(repo.private for repo in here.repos.values())
    (collection,) = here.collections.values()
    assert collection["private"]


@pytest.mark.parametrize("name", ["six", "six-nm-2of4"])
def test_a_public_repository_takes_no_private_family(here, families, capsys, name):
    HfApi().create_repo(name)
    assert run(["push", str(families[0].folder), "six", "--private", "--own_repositories"]) == 2
    assert f"tester/{name} is public on the Hub, while the family is to be private; nothing was sent" in (
        capsys.readouterr().err
    )
    assert not here.commit_requests()
    assert run(["push", str(families[0].folder), "other", "--private"]) == 0
    assert run(["push", str(families[0].folder), "other"]) == 0  # once more, as it is


def test_cards_of_own_repositories_name_them(here, families):
    families[0].push_to_hub("six", own_repositories=True)
    card, page = (here.repos[name].files()["README.md"].decode() for name in ("tester/six", "tester/six-nm-2of4"))
    assert "`tester/six-nm-2of4` |" in card
    assert "Each stands in a repository of its own" in card
    assert 'from_pretrained("tester/six-nm-2of4")' in page
    assert 'revision="' not in card + page
    for code in (card, page):
        ModelCard(code)


def test_an_own_repository_of_somebody_else_is_not_overwritten(here, families):
    HfApi().create_repo("six-nm-2of4")
    repo = here.repos["tester/six-nm-2of4"]
    repo.commit("main", {"model.safetensors": next(iter(repo.commits.values()))[".gitattributes"]}, "a model")
    with pytest.raises(ValueError, match="tester/six-nm-2of4 holds weights but was not made with hf_compress"):
        families[0].push_to_hub("six", own_repositories=True)
    assert "family.json" not in here.repos["tester/six"].files()
    families[0].push_to_hub("six", own_repositories=True, overwrite=True)
    assert "config.json" in repo.files()


def test_somebody_elses_model_is_overwritten_when_told(here, families, capsys):
    HfApi().create_repo("other")
    repo = here.repos["tester/other"]
    theirs = repo.commit("main", {"model.bin": next(iter(repo.commits.values()))[".gitattributes"]}, "a model")
    with pytest.raises(ValueError, match="--overwrite"):
        families[0].push_to_hub("other")
    assert run(["push", str(families[0].folder), "other"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(["push", str(families[0].folder), "other", "--overwrite"]) == 0
    assert "model.bin" not in repo.files()
    assert "model.bin" in repo.commits[theirs]  # in the history


def test_an_organisation(here, families):
    publication = families[0].push_to_hub("team/six", private=True)
    assert publication.repo_id == "team/six"
    assert here.repos["team/six"].private
    assert hfc.load_family("team/six").files == families[0].files


def test_a_recipe_with_a_token_is_not_sent(here, tmp_path):
    for i, recipe in enumerate(({"note": f"token={here.token}"}, {"hub_token": "hf_" + "a1" * 17})):
        family = hfc.build_family(tiny_bert(), ["2:4"], None, None, tmp_path / str(i), recipe=recipe)
        with pytest.raises(ValueError, match="holds a token of the Hub; nothing was sent") as caught:
            family.push_to_hub("six")
        assert here.token not in str(caught.value)
    assert not here.repos


def test_no_token_in_logs_cards_or_manifests(here, families, monkeypatch, caplog, capfd):
    monkeypatch.setattr(retry, "WAITS", (0.001,) * 4)
    monkeypatch.delenv("HF_TOKEN")
    seen = []

    def before(method, path):
        seen.append(path)
        return 503 if "/revision/" in path and len(seen) < 6 else None

    monkeypatch.setattr(here, "before", before)
    with caplog.at_level(logging.DEBUG):
        families[0].push_to_hub("tester/six", token=here.token)
    assert "the Hub answered 503; trying again" in caplog.text
    said = capfd.readouterr()
    repo = here.repos["tester/six"]
    files = b"".join(data for revision in repo.branches for data in repo.files(revision).values())
    assert here.token not in caplog.text + said.out + said.err
    assert here.token.encode() not in files


def test_a_wrong_token_is_no_reason_to_wait(here, families, monkeypatch):
    monkeypatch.setattr(retry, "WAITS", (60.0,) * 4)
    with pytest.raises(OSError, match="401"):
        families[0].push_to_hub("tester/six", token="hf_wrong")
    assert not here.repos


def test_stored_statistics_reach_a_reader(here, tmp_path):
    """The pack stands on main; from_pretrained with a pattern gets it from there."""
    import transformers as t

    from tests.conftest import image_samples, tiny_resnet

    samples = torch.stack([s["pixel_values"] for s in image_samples()])
    data = [{"pixel_values": samples}]
    family = hfc.build_family(tiny_resnet(), ["unstructured:0.9"], None, data, tmp_path / "cnn")
    family.push_to_hub("cnn")
    assert "batch_norm.safetensors" in here.repos["tester/cnn"].files()
    config = hfc.HfCompressConfig("unstructured:0.9")
    slid = t.ResNetForImageClassification.from_pretrained("tester/cnn", quantization_config=config)
    variant = t.ResNetForImageClassification.from_pretrained("tester/cnn", revision="unstructured-0.90")
    for (name, a), b in zip(slid.state_dict().items(), variant.state_dict().values(), strict=True):
        assert torch.equal(a, b) or name.endswith("num_batches_tracked")
    found = hfc.load_family("tester/cnn")
    assert (found.path_to(found.dense) / "batch_norm.safetensors").is_file()
    card = here.repos["tester/cnn"].files()["README.md"].decode()
    assert "`batch_norm.safetensors`, which has them for `unstructured:0.5`, " in card
