"""Families with entropy-coded variants: measured as they are loaded back, and equal to what integers give."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as t

import hf_compress as hfc
from hf_compress.family.storage import save_model
from hf_compress.methods.lilnetx import reparametrize
from tests.conftest import image_samples, tiny_resnet, tiny_vit

PATTERNS = ["int8", "2:4+int8", "unstructured:0.8+int4"]


def batches():
    samples = image_samples(24)
    return [{k: torch.stack([s[k] for s in samples[i : i + 8]]) for k in ("pixel_values", "labels")} for i in (0, 8)]


def evaluate(model):
    logits = [model(pixel_values=batch["pixel_values"]).logits for batch in batches()]
    return {"sum": torch.cat(logits).double().abs().sum(), "first": logits[0][0, 0]}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Of a ViT: coded, in the storage that fits (int8 for one), and in plain tensors."""
    folder = tmp_path_factory.mktemp("families")
    return {
        storage: hfc.build_family(
            tiny_vit(),
            PATTERNS,
            evaluate,
            batches(),
            folder / str(storage),
            storage=storage,
            task="image-classification",
        )
        for storage in ("coded", None, "dense")
    }


def test_names_and_storage(families):
    assert [(v.revision, v.storage, v.loads_with, v.made_by) for v in families["coded"].checkpoints] == [
        ("main", "dense", "transformers", "trained"),
        ("int8", "coded", "hf_compress", "one_shot"),
        ("nm-2of4_int8", "coded", "hf_compress", "one_shot"),
        ("unstructured-0.80_int4", "coded", "hf_compress", "one_shot"),
    ]
    assert [v.storage for v in families[None].variants] == ["int8", "int8", "dense"]
    assert {v.storage for v in families["dense"].checkpoints} == {"dense"}
    assert {v.loads_with for v in families["dense"].checkpoints} == {"transformers"}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_measures_what_other_storages_measure(families, pattern):
    coded, plain = families["coded"][pattern], families["dense"][pattern]
    for other in (plain, families[None][pattern]):
        assert coded.metrics == pytest.approx(other.metrics, rel=1e-5)
        assert (coded.sparsity, coded.nonzero, coded.parameters) == (other.sparsity, other.nonzero, other.parameters)
        assert (coded.macs, coded.parameters_removed, coded.skipped) == (other.macs, 0, other.skipped)
    assert coded.latency is not None
    assert coded.compressed_bytes <= coded.bytes < plain.bytes
    folder = families["coded"].path_to(pattern)
    assert coded.bytes == sum(path.stat().st_size for path in folder.iterdir())
    model = t.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        assert coded.metrics["sum"] == pytest.approx(evaluate(model)["sum"].item(), rel=1e-5)


def test_the_manifest_is_read_back_and_every_byte_is_hashed(families, tmp_path):
    made = families["coded"]
    again = hfc.load_family(made.folder)
    assert again.checkpoints == made.checkpoints
    assert {v["storage"] for v in json.loads((made.folder / "family.json").read_text())["variants"]} == {"coded"}
    shutil.copytree(made.folder, tmp_path / "copy")
    weights = tmp_path / "copy" / "int8" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="int8/model.safetensors"):
        hfc.load_family(tmp_path / "copy")


def test_coded_variants_join_a_family(families, tmp_path):
    shutil.copytree(families["dense"].folder, tmp_path / "ours")
    other = hfc.build_family(
        tiny_vit(), ["int4"], evaluate, None, tmp_path / "b", storage="coded", task="image-classification"
    )
    family = hfc.load_family(tmp_path / "ours").add(tmp_path / "b")
    assert [v.storage for v in family.variants] == ["dense", "dense", "dense", "coded"]
    assert hfc.load_family(tmp_path / "ours")["int4"].bytes == other["int4"].bytes
    t.AutoModelForImageClassification.from_pretrained(family.path_to("int4"))
    with pytest.raises(ValueError, match="there is a variant int8 already"):
        family.add(families["coded"])


def test_batch_norms_are_recalibrated_before_they_are_coded(tmp_path):
    family = hfc.build_family(
        tiny_resnet(), ["unstructured:0.5+int8"], evaluate, batches(), tmp_path / "a", storage="coded"
    )
    plain = hfc.build_family(tiny_resnet(), ["unstructured:0.5+int8"], evaluate, batches(), tmp_path / "b")
    assert family.variants[0].metrics == pytest.approx(plain.variants[0].metrics, rel=1e-5)
    assert family.variants[0].metrics != pytest.approx(family.dense.metrics, rel=1e-3)


def test_a_trained_variant_beside_cut_ones(tmp_path):
    """As LilNetXTrainer hands them over: with latents, which are always coded."""
    trained = tiny_resnet()
    reparametrize(trained, steps_per_std=2)
    family = hfc.build_family(
        tiny_resnet(), ["2:4", "int8"], evaluate, batches(), tmp_path / "f", trained={"lilnetx:a": trained}
    )
    assert [(v.pattern, v.storage, v.made_by) for v in family.variants] == [
        ("lilnetx:a", "coded", "trained"),
        ("2:4", "dense", "one_shot"),
        ("int8", "dense", "one_shot"),  # convolutions, which compressed-tensors does not read
    ]
    assert family["lilnetx:a"].revision == "lilnetx-a-coded"


@pytest.mark.parametrize(
    ("patterns", "storage", "message"),
    [
        (["int8"], "int8", "storage is one of dense, coded, got 'int8'"),
        (["int8", "2:4"], "coded", "storage coded is for whole numbers, which 2:4 does not give; add int8, as in 2:4"),
        (["low_rank:0.75"], "coded", "which low_rank:0.75 does not give"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, patterns, storage, message):
    with pytest.raises(ValueError, match=message):
        hfc.build_family(tiny_vit(), patterns, output_dir=tmp_path / "f", storage=storage)
    assert not list(tmp_path.iterdir())


def test_a_model_that_was_coded_is_the_dense_one_of_another_family(tmp_path):
    model = tiny_vit()
    hfc.compress(model, "int8")
    assert save_model(model, tmp_path / "coded", hfc.parse_pattern("int8"), storage="coded") == "coded"
    loaded = t.AutoModelForImageClassification.from_pretrained(tmp_path / "coded")
    family = hfc.build_family(loaded, ["2:4"], evaluate, batches(), tmp_path / "family")
    assert [(v.storage, v.loads_with) for v in family.checkpoints] == [("dense", "transformers")] * 2
