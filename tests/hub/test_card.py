"""Cards: numbers of the manifest, snippets that run, metadata that the Hub reads."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

import hf_compress as hfc
from hf_compress.hub.card import render_card, render_recipe, render_variant_card
from hf_compress.methods.registry import METHODS
from tests.conftest import tiny_bert, tiny_resnet
from tests.hub.conftest import run_python


def blocks(card, kind="python"):
    return re.findall(rf"^```{kind}\n(.*?)^```", card, re.M | re.S)


def test_every_python_block_of_the_cards_runs(here, family, tmp_path):
    family.push_to_hub("six")
    repo = here.repos["tester/six"]
    cards = [repo.files(revision)["README.md"].decode() for revision in ("main", "nm-2of4", "int8")]
    found = [block for card in cards for block in blocks(card)]
    assert len(blocks(cards[0])) == 3
    assert len(found) == 5
    # One process for all: each block imports what it needs itself, but for the names that Python keeps.
    code = "\n".join(f"exec({block!r}, {{}})" for block in found)
    output = run_python(code, here.environment(tmp_path / "home"))
    assert output.count("{'accuracy': ") == len(family.variants)
    assert "unstructured-0.90" in cards[0]


def trained(folder):
    """As TPP leaves it: the variant came from a training, in smaller shapes."""
    smaller = tiny_bert()
    hfc.compress(smaller, "heads:0.5", remove=True)
    return hfc.build_family(
        tiny_bert(), [], output_dir=folder, method="tpp", task="text-classification", trained={"heads:0.5": smaller}
    )


def coded(folder):
    return hfc.build_family(
        tiny_resnet(), ["unstructured:0.5+int8"], output_dir=folder, task="image-classification", storage="coded"
    )


def bare(folder):
    """No task, no metric, no data."""
    return hfc.build_family(tiny_bert(), ["2:4"], output_dir=folder)


def test_blocks_of_every_kind_of_family_run(here, tmp_path):
    """Those of the family's page and of its variant's, with revisions and with repositories."""
    code = []
    for make in (trained, coded, bare):
        family = make(tmp_path / make.__name__)
        (variant,) = family.variants
        for name, own in ((make.__name__, False), (f"{make.__name__}-own", True)):
            family.push_to_hub(name, own_repositories=own)
            repo = here.repos[f"tester/{name}"]
            page = here.repos[f"tester/{name}-{variant.revision}"].files() if own else repo.files(variant.revision)
            found = [block for files in (repo.files(), page) for block in blocks(files["README.md"].decode())]
            assert len(found) == 4
            assert ("import hf_compress\n" in found[3]) == (make is not bare)
            assert ("revision=" in found[3]) != own
            code += [f"exec({block!r}, {{}})" for block in found]
    output = run_python("\n".join(code), here.environment(tmp_path / "home"))
    assert all(output.count(pattern) == 2 for pattern in ("heads:0.5", "unstructured:0.5+int8", "2:4 "))


def test_the_table_has_every_number_of_the_manifest(family):
    card = render_card(family, "me/six")
    for variant in (family.dense, *family.variants):
        (row,) = re.findall(rf"^\| {re.escape(variant.pattern or 'dense')} \|.*$", card, re.M)
        assert f"{variant.metrics['accuracy']:.4f}" in row
        assert f"{100 * variant.sparsity:.1f} %" in row
        assert f"`{variant.revision}`" in row
    assert "![accuracy over sparsity](plots/sparsity.png)" in card


def test_metadata_can_be_read_back(family):
    data = ModelCard(render_card(family, "me/six")).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-classification"
    assert {"hf_compress", "cram", "sparsity", "quantization"} <= set(data.tags)
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert values["accuracy"] == pytest.approx(family.dense.metrics["accuracy"], abs=1e-6)
    assert len(values) == 6
    assert data.base_model is None
    assert ModelCard(render_variant_card(family, family["2:4"], "me/six")).data.pipeline_tag == "text-classification"


def test_a_card_claims_nothing_that_was_not_measured(tmp_path):
    family = hfc.build_family(tiny_bert(), ["unstructured:0.9", "3:5"], None, None, tmp_path / "family")
    card = render_card(family, "me/bare")
    assert "Nothing was evaluated" in card
    assert "Not trained for compression" in card
    assert "recipe.yaml" not in card
    assert "Citation" not in card
    assert "sparsity.png" not in card
    assert "model-index" not in card
    assert re.search(r"`nm-3of5` left \d+ weights dense: its reduction axis of 16 is no multiple of 5", card)


@pytest.mark.parametrize(
    ("metric", "dense", "numbers", "tried"),
    [
        ("accuracy", 0.9, {"unstructured:0.9": 0.5, "2:4": 0.895, "2:4+int8": 0.6}, "nm-2of4"),
        ("accuracy", 0.9, {"unstructured:0.9": 0.2, "2:4": 0.7, "2:4+int8": 0.8}, "nm-2of4_int8"),  # none is close
        ("perplexity", 20.0, {"unstructured:0.9": 4e6, "2:4": 20.1, "2:4+int8": 25.0}, "nm-2of4"),
        ("perplexity", 20.0, {"unstructured:0.9": 4e6, "2:4": 31.0, "2:4+int8": 30.0}, "nm-2of4_int8"),
        ("accuracy", 0.9, {"unstructured:0.9": None, "2:4": 0.3}, "nm-2of4"),
    ],
)
def test_the_example_loads_the_smallest_that_is_as_good_or_else_the_best(family, metric, dense, numbers, tried):
    variants = tuple(replace(family[pattern], metrics={metric: value}) for pattern, value in numbers.items())
    shown = replace(family, dense=replace(family.dense, metrics={metric: dense}), variants=variants)
    assert f'from_pretrained("me/six", revision="{tried}")' in render_card(shown, "me/six")


def test_flags_of_paths_that_the_recipe_lacks_are_named(family):
    recipe = {"task": "text-classification", "rho": 0.1, "local": ["model_name_or_path", "train_file", "`{{ x }}`"]}
    shown = replace(family, recipe=recipe)
    line = "`hf-compress train recipe.yaml --model_name_or_path … --train_file …` runs them again, with paths of"
    assert line in render_card(shown, "me/six")
    assert yaml.safe_load(render_recipe(shown)) == {"task": "text-classification", "rho": 0.1}
    assert "runs them again." in render_card(replace(family, recipe={"task": "text-classification"}), "me/six")


def test_a_trained_family_says_how_and_cites_the_paper(family):
    card = render_card(family, "me/six")
    assert "Trained with CrAM" in card
    (entry,) = blocks(card, "bibtex")
    assert "CrAM" in entry
    assert "2207.14200" in entry
    assert "`int8`, `nm-2of4_int8`) need `pip install compressed-tensors`" in card


def test_trained_variants_are_said_to_be_and_their_paper_is_cited(family, tmp_path):
    smaller = tiny_bert()
    hfc.compress(smaller, "heads:0.5", remove=True)
    trained = {"heads:0.5": smaller}
    recipe = {"method": "tpp", "task": "text-classification"}
    tpp = hfc.build_family(
        tiny_bert(), ["2:4"], output_dir=tmp_path / "tpp", method="tpp", recipe=recipe, trained=trained
    )
    card = render_card(tpp, "me/tpp")
    assert "One dense checkpoint and 1 compressed in one shot and 1 trained from it." in card
    assert "The trained variants come from the dense checkpoint by TPP" in card
    assert "Not trained for compression" not in card
    assert blocks(card, "bibtex")[0].count("@") == 1
    alone = hfc.build_family(
        tiny_bert(), [], output_dir=tmp_path / "alone", method="tpp", recipe=recipe, trained=trained, task=family.task
    )
    shutil.copytree(family.folder, tmp_path / "joined")
    joined = hfc.load_family(tmp_path / "joined").add(alone)
    card = render_card(joined, "me/joined")
    assert "5 compressed in one shot and 1 trained from it" in card
    assert "`heads-0.50` was trained by another run, with the method `tpp`" in card
    assert "2207.14200" in card
    assert "2207.12534" in card
    assert "trained" not in yaml.safe_load(render_recipe(joined))
    assert "Where `heads-0.50` is loaded, `import hf_compress` comes before" in card


def test_coded_variants_are_said_to_need_us(tmp_path):
    model = tiny_resnet()
    family = hfc.build_family(model, ["int8"], output_dir=tmp_path / "family", storage="coded")
    card, page = render_card(family, "me/x"), render_variant_card(family, family["int8"], "me/x")
    assert "Where `int8` is loaded, `import hf_compress` comes before: its layers, or the bytes of its weights" in card
    assert "compressed-tensors" not in card.split("Versions:")[0]
    assert "Its weights are entropy-coded whole numbers" in page
    assert "import hf_compress\nfrom transformers import" in page


@pytest.mark.parametrize("method", METHODS)
def test_a_card_says_what_every_method_did(tmp_path, method):
    family = hfc.build_family(tiny_resnet(), ["2:4"], output_dir=tmp_path / "family", method=method)
    card = render_card(family, "me/x")
    assert "Not trained for compression" not in card
    assert METHODS[method].paper.removeprefix("arXiv:") in blocks(card, "bibtex")[0]


def test_a_model_name_that_is_markup_stays_text(tmp_path):
    family = hfc.build_family(tiny_resnet(), ["2:4"], lambda m: {"top|1": 0.5}, None, tmp_path / "family")
    card = render_card(family, "me/x")
    (header,) = re.findall(r"^\| variant \|.*$", card, re.M)
    assert r"top\|1" in header


@pytest.mark.parametrize("place", ["out/model", "resnet"])
def test_a_local_base_model_is_no_link(tmp_path, monkeypatch, place):
    from dataclasses import replace

    monkeypatch.chdir(tmp_path)
    family = hfc.build_family(tiny_resnet(), ["2:4"], None, None, tmp_path / "family")
    named = replace(family, base_model=place)
    assert ModelCard(render_card(named, "me/x")).data.base_model == place
    (tmp_path / place).mkdir(parents=True)
    assert ModelCard(render_card(named, "me/x")).data.base_model is None


def test_finetuned_language_models_write_texts_on_the_hub(family):
    tuned = replace(family, task="supervised-finetuning")
    for text in (render_card(tuned, "me/six"), render_variant_card(tuned, tuned.variants[0], "me/six")):
        assert ModelCard(text).data.pipeline_tag == "text-generation"
    data = ModelCard(render_card(tuned, "me/six")).data
    assert {result.task_type for result in data.eval_results} == {"text-generation"}
    assert "AutoModelForCausalLM" in render_card(tuned, "me/six")
