"""The page's content: every number of the manifest, snippets that load, and text of strangers that stays text."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import hf_compress.page
from hf_compress.cli import run
from hf_compress.family.table import table_rows
from hf_compress.page import render_checkpoint, render_family, save_page
from hf_compress.page.kinds import kind_of
from hf_compress.page.snippet import cut_while_loading
from hf_compress.report import inspect_checkpoint
from tests.cli.conftest import failure
from tests.conftest import tiny_vit
from tests.page.conftest import content_of

pytestmark = pytest.mark.xdist_group("page")
HOSTILE = '</script><img src=x onerror="window.hit = 1">'


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    tiny_vit().save_pretrained(folder)
    return inspect_checkpoint(str(folder))


def with_variant(family, **changes):
    return replace(family, variants=(replace(family.variants[0], **changes), *family.variants[1:]))


def test_numbers_are_those_of_the_table(family):
    content = content_of(render_family(family))
    header, *rows = table_rows(family)
    assert content["metrics"][0]["key"] == "accuracy"
    keys = [column["key"] for column in content["columns"]]
    assert keys == ["name", "removed", "zeros", "metric", "change", "disk", "zipped", "latency"]
    assert len(header) == len(keys)
    for row, wanted, variant in zip(content["rows"], rows, family.checkpoints, strict=True):
        scored = row["metrics"]["accuracy"]
        texts = {"name": row["name"], **row["cells"], "metric": scored["text"], "change": scored["change"]}
        assert [texts[key] for key in keys] == wanted
        assert scored["value"] == variant.metrics["accuracy"]
        assert row["values"]["disk"] == variant.bytes
        assert row["values"]["zipped"] == variant.compressed_bytes
        assert row["values"]["zeros"] == pytest.approx(100 * variant.sparsity)
        assert row["badge"] == (None if variant.loads_with == "transformers" else "import hf_compress")
    assert content["rows"][0]["values"]["latency"] == 1


def test_metrics_and_their_direction(family):
    content = content_of(render_family(family))
    assert [(m["key"], m["less"]) for m in content["metrics"]] == [("accuracy", False), ("loss", True)]
    named = replace(family, dense=replace(family.dense, metrics={"eval_perplexity": 3.0, "error_free_share": 0.5}))
    assert {m["key"]: m["less"] for m in content_of(render_family(named))["metrics"]} == {
        "eval_perplexity": True,
        "error_free_share": False,
        "accuracy": False,
        "loss": True,
    }


def test_smallest_that_is_close(family):
    (tile,) = [t for t in content_of(render_family(family))["tiles"] if t["label"].startswith("Smallest")]
    assert tile["value"] == "int8"
    worse = replace(family, variants=tuple(v for v in family.variants if v.pattern != "int8"))
    assert not [t for t in content_of(render_family(worse))["tiles"] if t["label"].startswith("Smallest")]


def test_what_was_not_measured_is_said(family):
    def bare(variant):
        return replace(variant, metrics={}, latency=None)

    content = content_of(render_family(replace(family, dense=bare(family.dense), variants=(bare(family["2:4"]),))))
    assert content["metrics"] == []
    assert "metric" not in [column["key"] for column in content["columns"]]
    assert [row["values"]["latency"] for row in content["rows"]] == [None, None]
    assert [row["cells"]["latency"] for row in content["rows"]] == ["-", "-"]
    assert "Latency: not measured." in content["notes"]
    assert any("No metric was measured" in note for note in content["notes"])
    assert {axis["key"]: axis["missing"] for axis in content["axes"]}["latency"].startswith("Latency: not measured.")


@pytest.mark.parametrize("latency", [{}, {"milliseconds": "1", "dense_milliseconds": 2}, {"milliseconds": 0}])
def test_a_latency_that_is_no_number_was_not_measured(family, latency):
    row = content_of(render_family(with_variant(family, latency=latency)))["rows"][1]
    assert (row["cells"]["latency"], row["values"]["latency"]) == ("-", None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_a_metric_that_is_not_finite_is_no_point(family, value):
    row = content_of(render_family(with_variant(family, metrics={"accuracy": value}, sparsity=float("nan"))))["rows"][1]
    assert row["metrics"]["accuracy"]["value"] is None
    assert row["metrics"]["loss"]["value"] is None
    assert row["values"]["zeros"] is None


@pytest.mark.parametrize("changes", [{"bytes": 10**400}, {"metrics": {"accuracy": 10**400}}])
def test_a_count_that_no_file_has_is_refused(family, changes):
    with pytest.raises(ValueError, match="has 401 digits"):
        render_family(with_variant(family, **changes))


def test_text_of_strangers_stays_text(family):
    changes = {"pattern": HOSTILE, "revision": HOSTILE, "skipped": {HOSTILE: HOSTILE}, "storage": HOSTILE}
    strange = with_variant(family, **changes, metrics={HOSTILE: 1.0, "accuracy": 0.5})
    strange = replace(strange, repo_id=HOSTILE, method=HOSTILE, base_model=f"\u2028\u2029\ud800{HOSTILE}&lt;")
    strange = replace(strange, versions={HOSTILE: HOSTILE}, recipe={"dataset_name": HOSTILE})
    page = render_family(strange)
    page.encode()
    tags = Tags(page)
    assert [tag for tag, _ in tags.found].count("script") == 3
    assert "img" not in [tag for tag, _ in tags.found]
    assert not [name for _, attributes in tags.found for name in attributes if name.startswith("on")]
    assert HOSTILE not in page
    content = content_of(page)
    assert content["rows"][1]["name"] == HOSTILE
    assert content["rows"][1]["kind"] == "other"
    assert ["base model", strange.base_model] in content["facts"]
    assert not re.search("[\u2028\u2029]", page)


def test_the_policy_lets_only_our_own_scripts_run(family):
    page = render_family(family)
    (policy,) = [a["content"] for tag, a in Tags(page).found if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 3
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page.replace(" ", ""))


def test_snippets_load_what_they_name(family):
    rows = content_of(render_family(family))["rows"]
    for row, variant in zip(rows, family.checkpoints, strict=True):
        lines = row["snippet"].splitlines()
        if variant.loads_with != "transformers":
            assert lines[0] == "import hf_compress"
        if variant.storage == "int8":
            assert lines[0] == "# needs: pip install compressed-tensors"
        assert (family.folder / variant.path).as_posix() in row["snippet"]
    for pattern in ("2:4", "low_rank:0.75"):
        names = {}
        exec(rows[1 + [v.pattern for v in family.variants].index(pattern)]["snippet"], names)
        assert type(names["model"]).__name__ == "ViTForImageClassification"


def test_snippets_of_a_family_on_the_hub(family):
    rows = content_of(render_family(replace(family, repo_id="me/twelve")))["rows"]
    snippets = {row["name"]: row["snippet"] for row in rows}
    assert snippets["dense"].endswith('.from_pretrained("me/twelve")')
    assert snippets["2:4"].endswith('AutoModelForImageClassification.from_pretrained("me/twelve", revision="nm-2of4")')


def test_a_variant_with_a_repository_of_its_own(family, tmp_path):
    (tmp_path / "README.md").write_text("| 2:4 | `me/twelve-nm-2of4` |")
    rows = content_of(render_family(replace(family, repo_id="me/twelve", folder=tmp_path)))["rows"]
    snippets = {row["name"]: row["snippet"] for row in rows}
    assert snippets["2:4"].endswith('.from_pretrained("me/twelve-nm-2of4")')
    assert snippets["dense"].endswith('.from_pretrained("me/twelve")')


@pytest.mark.parametrize("text", ['a"); import os; os.abort()  # ', "a'\"\\", "a\n\u2028\u202e", 'a"', "plain"])
def test_what_a_snippet_names_stays_in_its_string(family, text):
    strange = replace(with_variant(family, revision=text), repo_id=text)
    body = ast.parse(content_of(render_family(strange))["rows"][1]["snippet"]).body
    assert len(body) == 2
    call = body[1].value
    assert [ast.literal_eval(call.args[0]), ast.literal_eval(call.keywords[0].value)] == [text, text]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ('{"architectures": ["BertForMaskedLM"]}', "BertForMaskedLM"),
        ('{"architectures": ["a; import os"]}', "AutoModel"),
        ('{"model_type": "timm_wrapper"}', "AutoModelForImageClassification"),
        ("[]", "AutoModel"),
        ("", "AutoModel"),
    ],
)
def test_the_class_of_a_family_without_a_task(family, tmp_path, config, name):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(config)
    rows = content_of(render_family(replace(family, task=None, folder=tmp_path)))["rows"]
    assert rows[0]["snippet"].startswith(f"from transformers import {name}\n")


def test_a_checkpoint(report):
    content = content_of(render_checkpoint(report))
    dense, *rows = content["rows"]
    assert dense["snippet"].endswith(f'from_pretrained("{report.model}")')
    assert [row["name"] for row in rows] == list(report.patterns)
    for row, numbers in zip(rows, report.patterns.values(), strict=True):
        assert row["metrics"]["energy"]["value"] == pytest.approx(100 * numbers.energy)
        assert row["values"]["zipped"] == numbers.compressed_bytes
        assert f'HfCompressConfig("{row["name"]}")' in row["snippet"]
    assert [axis["key"] for axis in content["axes"]] == ["zeros", "zipped"]
    layers = [row["name"] for row in content["layers"]["rows"]]
    assert layers == [name.removesuffix(".weight") for name in report.bottlenecks[:24]]
    names = {}
    exec(next(row["snippet"] for row in rows if row["name"] == "2:4"), names)
    assert type(names["model"]).__name__ == report.architecture
    assert 'revision="v1"' in content_of(render_checkpoint(report, "v1"))["rows"][1]["snippet"]


def test_snippets_cut_the_weights_that_were_reported(report):
    globs = {"include": ["*mlp*"], "exclude": ["*layers.0*"]}
    found = inspect_checkpoint(report.model, "unstructured:0.5", **globs)
    snippet = content_of(render_checkpoint(found))["rows"][1]["snippet"]
    names = {}
    exec(snippet, names)
    layers = names["model"].vit.layers
    assert [(layer.mlp.fc1.weight == 0).float().mean().item() for layer in layers] == [0, pytest.approx(0.5, abs=0.1)]
    assert (layers[1].attention.q_proj.weight != 0).all()
    written = json.loads(found.to_json())
    assert {key: written[key] for key in globs} == globs
    strange = replace(found, include=(HOSTILE, "*'\"\n"))
    ast.parse(cut_while_loading(strange, "2:4", None))


def test_a_checkpoint_that_from_pretrained_cannot_load_has_no_snippets(tmp_path):
    weights = {"layers.0.weight": torch.randn(8, 8), "broken.weight": torch.full((4, 4), float("nan"))}
    save_file(weights, tmp_path / f"{HOSTILE[2:8]}.safetensors")
    content = content_of(render_checkpoint(inspect_checkpoint(str(tmp_path / f"{HOSTILE[2:8]}.safetensors"), "2:4")))
    assert {row["snippet"] for row in content["rows"]} == {None}
    assert any("broken.weight is left out" in note for note in content["notes"])
    assert [column["key"] for column in content["layers"]["columns"]] == ["name", "sensitivity", "zeros", "energy"]


def test_a_folder_becomes_a_space_and_keeps_its_card(family, tmp_path):
    path = save_page(replace(family, repo_id="me/a: b"), tmp_path / "page")
    assert path == tmp_path / "page" / "index.html"
    card = tmp_path / "page" / "README.md"
    assert yaml.safe_load(card.read_text().split("---")[1]) == {"title": "me/a: b", "sdk": "static", "pinned": False}
    card.write_text("mine")
    save_page(family, tmp_path / "page")
    assert card.read_text() == "mine"
    assert "<title>twelve</title>" in path.read_text()


def test_the_command_writes_a_page(family, report, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["report", str(family.folder), "--html"]) == 0
    path = Path("out/report/twelve/index.html")
    assert capsys.readouterr().out.endswith(f"\npage     {path}\n")
    assert path.read_text() == render_family(family)
    assert run(["report", report.model, "--pattern", "2:4", "--html", "--json", "--output_dir", "there"]) == 0
    assert json.loads(capsys.readouterr().out)["reference"] == "2:4"
    assert [row["name"] for row in content_of(Path("there/index.html").read_text())["rows"]] == ["as it is", "2:4"]
    assert "give one for the page" in failure(capsys, "report", report.model, "--html", "--json")
    assert not (Path("out/report") / Path(report.model).name).exists()
    assert run(["report", report.model, "--pattern", "2:4", "--output_dir", "none"]) == 0
    assert not Path("none/index.html").exists()


def test_every_kind_has_a_colour_and_a_shape():
    folder = Path(hf_compress.page.__file__).parent
    script, style = ((folder / name).read_text() for name in ("plot.js", "page.css"))
    kinds = re.findall(r"^  '?([a-z-]+)'?: \{ label", script, re.M)
    patterns = [None, "unstructured:0.5", "unstructured:0.5:layer", "2:4", "filters:0.5", "neurons:0.5", "heads:0.5"]
    patterns += ["low_rank:0.5", "int8", "2:4+int8", "lilnetx", "no pattern"]
    assert list(dict.fromkeys(map(kind_of, patterns))) == kinds
    for kind in kinds:
        assert f'[data-kind="{kind}"] {{' in style
        assert style.count(f" --{kind}: ") == 2  # light and dark


def test_the_chart_library_is_the_published_one():
    """chart.js 4.6.1, dist/chart.umd.min.js, as its package has it."""
    content = (Path(hf_compress.page.__file__).parent / "chart.umd.min.js").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "87364cc2b2a76a6684929e7d6b80b18a897794db38400caff1fcf1791c6925d2"
    assert b"</script" not in content


def test_the_page_starts_with_an_axis_that_tells_something(family):
    assert content_of(render_family(family))["start"] == 0
    coded = replace(family["int8"], sparsity=0.0, parameters_removed=0, bytes=family.dense.bytes // 3)
    content = content_of(render_family(replace(family, variants=(coded,))))
    assert content["axes"][content["start"]]["key"] == "disk"
    smaller = replace(coded, parameters_removed=family.dense.parameters // 2)
    content = content_of(render_family(replace(family, variants=(smaller,))))
    assert content["axes"][content["start"]]["key"] == "removed"
