"""`hf-compress push`, `--push_to_hub`, and the trainers' own push."""

from __future__ import annotations

import pytest

import hf_compress as hfc
from hf_compress.cli.main import run
from tests.conftest import image_samples, tiny_vit


def test_push_prints_what_was_sent(here, family, capsys):
    assert run(["push", str(family.folder), "tester/six"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [*(v.revision for v in family.variants), "main"]
    assert lines[-1] == f"{here.url}/tester/six"
    assert not any("unchanged" in line for line in lines)
    assert run(["push", str(family.folder), "six"]) == 0
    assert all(line.endswith("unchanged") for line in capsys.readouterr().out.splitlines()[:-1])


def test_push_of_no_family_is_one_line(here, tmp_path, capsys):
    assert run(["push", str(tmp_path), "six"]) == 2
    assert "holds no family.json" in capsys.readouterr().err
    assert not here.requests


def test_push_where_the_hub_refuses_is_one_line(here, family, capsys, monkeypatch):
    monkeypatch.setattr(here, "before", lambda method, path: 403)
    assert run(["push", str(family.folder), "six"]) == 2
    assert "403" in capsys.readouterr().err


@pytest.fixture
def make_trainer(here, tmp_path):
    def make(**flags):
        data = image_samples()
        args = hfc.CrAMConfig(
            str(tmp_path / "vit-cram"),
            max_steps=2,
            save_steps=1,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            hub_token=here.token,
            **flags,
        )
        return hfc.CrAMTrainer(model=tiny_vit(), args=args, train_dataset=data, eval_dataset=data)

    return make


def test_a_trainer_publishes_the_family_once_at_the_end(here, make_trainer):
    trainer = make_trainer(push_to_hub=True, hub_private_repo=True)
    trainer.train()
    trainer.save_model()
    assert not here.commit_requests()  # neither checkpoints nor a bare model
    family = trainer.build_family(["2:4"])
    repo = here.repos["tester/vit-cram"]
    assert repo.private
    assert [path.rsplit("/", 1)[1] for path in here.commit_requests()] == ["nm-2of4", "main"]
    assert repo.files("nm-2of4")["model.safetensors"] == (family.path_to("2:4") / "model.safetensors").read_bytes()
    assert here.token not in str(repo.files())
    assert "hub_token" not in repo.files()["recipe.yaml"].decode()
    # Stock scripts push at the end with fields for the stock card: nothing is left to send.
    assert set(trainer.push_to_hub(tasks="image-classification").commits.values()) == {None}


def test_push_to_hub_alone_builds_the_family_first(here, make_trainer):
    trainer = make_trainer(hub_model_id="tester/named")
    trainer.train()
    with pytest.raises(ValueError, match="no patterns"):
        trainer.push_to_hub()
    trainer.args.variants = ["unstructured:0.9"]
    trainer.push_to_hub(commit_message="as trained")
    repo = here.repos["tester/named"]
    assert {title for title, _ in repo.log.values()} == {"initial commit", "as trained"}
    assert "unstructured-0.90" in repo.branches


def test_what_does_not_apply_is_refused_before_the_training(make_trainer):
    with pytest.raises(ValueError, match="hub_revision does not apply"):
        make_trainer(push_to_hub=True, hub_revision="main")
    with pytest.raises(ValueError, match="every variant has its own revision"):
        make_trainer().push_to_hub(revision="v1")


def test_the_wrong_kind_of_arguments_is_named():
    with pytest.raises(ValueError, match="CrAMTrainer takes a CrAMConfig as `args`, got HfCompressConfig"):
        hfc.CrAMTrainer(model=tiny_vit(), args=hfc.HfCompressConfig("2:4"))


def test_train_pushes_what_a_recipe_made(here, tmp_path, capsys):
    command = ["train", "digits_cram", "--num_train_epochs", "1", "--variants", "2:4", "--push_to_hub"]
    assert run([*command, "--output_dir", str(tmp_path / "digits-cram"), "--hub_token", here.token]) == 0
    assert f"published {here.url}/tester/digits-cram" in capsys.readouterr().out
    files = here.repos["tester/digits-cram"].files()
    assert "hf-compress train recipe.yaml" in files["README.md"].decode()
    assert "push" not in files["recipe.yaml"].decode()
    assert hfc.load_family("tester/digits-cram", token=here.token)["2:4"].metrics["accuracy"] is not None


def test_train_without_variants_has_nothing_to_push(tmp_path, capsys):
    command = ["train", "--method", "cram", "--task", "image-classification", "--architecture", "resnet20_cifar"]
    assert run([*command, "--push_to_hub", "--output_dir", str(tmp_path)]) == 2
    assert "--variants" in capsys.readouterr().err
