"""`hf-compress report` of what lies on the Hub: a family by its manifest, all else as checkpoints."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from huggingface_hub import HfApi

from hf_compress.cli import run
from hf_compress.cli.table import render
from hf_compress.family import is_family, load_family
from hf_compress.page import render_family
from hf_compress.report.checkpoint import open_checkpoint
from tests.cli.conftest import failure
from tests.conftest import tiny_vit


@pytest.fixture
def published(here, family):
    family.push_to_hub("tester/six", token=here.token)
    here.requests.clear()
    return here


def test_a_family_on_the_hub(published, family, tmp_path, capsys):
    assert run(["report", "tester/six", "--html", "--output_dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(render(family))
    assert f"page     {tmp_path / 'out' / 'index.html'}" in out
    asked = " ".join(map(str, published.requests))
    assert "safetensors" not in asked
    page = (tmp_path / "out" / "index.html").read_text()
    (content,) = re.findall(r'type="application/json">(.*?)</script>', page, re.S)
    rows = json.loads(content)["rows"]
    snippet = 'model = AutoModelForSequenceClassification.from_pretrained("tester/six", revision="nm-2of4")'
    assert snippet in [row["snippet"].splitlines()[-1] for row in rows]
    assert (tmp_path / "out" / "sparsity.png").is_file()
    assert (tmp_path / "out" / "README.md").is_file()
    assert run(["report", "tester/six", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((family.folder / "family.json").read_text())


def test_weights_of_a_family_on_the_hub_are_reported_where_a_pattern_is_given(published, capsys):
    assert run(["report", "tester/six", "--pattern", "2:4", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["patterns"]) == ["2:4"]
    assert run(["report", "tester/six", "--revision", "unstructured-0.90", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparsity"] > 0.85
    assert "has no revision" not in failure(capsys, "report", "tester/six", "--revision", "nowhere", "--json")


def test_a_checkpoint_on_the_hub_is_asked_for_one_file_more(here, capsys):
    tiny_vit().push_to_hub("tester/vit", token=here.token)
    here.requests.clear()
    assert not is_family("tester/vit")
    assert len(here.requests) <= 2
    assert run(["report", "tester/vit", "--pattern", "2:4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "tester/vit"
    assert not is_family("tester/nowhere")
    assert "cannot find" in failure(capsys, "report", "tester/nowhere", "--json")


def test_a_class_without_a_task_is_that_of_the_config(published):
    page = render_family(replace(load_family("tester/six"), task=None))
    assert "from transformers import BertForSequenceClassification" in page


def test_one_file_on_the_hub_goes_before_an_older_index(here, tmp_path):
    tiny_vit().save_pretrained(tmp_path / "vit", max_shard_size="8KB")
    for shard in (tmp_path / "vit").glob("*.safetensors"):
        shard.unlink()
    tiny_vit().save_pretrained(tmp_path / "vit2")
    (tmp_path / "vit2" / "model.safetensors").rename(tmp_path / "vit" / "model.safetensors")
    HfApi(token=here.token).create_repo("tester/vit")
    HfApi(token=here.token).upload_folder(repo_id="tester/vit", folder_path=tmp_path / "vit")
    assert "model.safetensors.index.json" in here.repos["tester/vit"].files()
    files = {stored.file.name for stored in open_checkpoint("tester/vit").tensors.values()}
    assert files == {"model.safetensors"}
