"""Families with variants of low rank, and of groups: stored in factors or as zeros, measured as loaded back."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as t

import hf_compress as hfc
from hf_compress.cli import run
from hf_compress.family.storage import save_model
from hf_compress.structure import factored_layers
from tests.conftest import image_samples, tiny_resnet, tiny_vit


def batches():
    samples = image_samples(24)
    return [
        {k: torch.stack([s[k] for s in samples[i : i + 8]]) for k in ("pixel_values", "labels")} for i in (0, 8, 16)
    ]


def evaluate(model):
    hits = [(model(pixel_values=b["pixel_values"]).logits.argmax(1) == b["labels"]).float().mean() for b in batches()]
    return {"accuracy": torch.stack(hits).mean()}


VIT = ["low_rank:0.75", "low_rank:0.3:energy", "neurons:0.5", "heads:0.5", "filters:0.5"]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return hfc.build_family(tiny_vit(), VIT, evaluate, batches(), tmp_path_factory.mktemp("f") / "vit")


@pytest.fixture(scope="module")
def convolutional(tmp_path_factory):
    return hfc.build_family(
        tiny_resnet(), ["low_rank:0.75", "filters:0.5"], evaluate, batches(), tmp_path_factory.mktemp("f") / "resnet"
    )


def test_names_and_storage(family, convolutional):
    assert [(v.revision, v.storage, v.loads_with) for v in (family.dense, *family.variants)] == [
        ("main", "dense", "transformers"),
        ("low-rank-0.75", "factored", "hf_compress"),
        ("low-rank-0.30-energy", "factored", "hf_compress"),
        ("neurons-0.50", "dense", "transformers"),
        ("heads-0.50", "dense", "transformers"),
        ("filters-0.50", "dense", "transformers"),
    ]
    assert [v.storage for v in convolutional.variants] == ["factored", "dense"]
    assert hfc.load_family(family.folder)["low_rank:0.75"] == family["low_rank:0.75"]


def test_numbers_are_those_of_what_is_loaded_back(family, convolutional):
    for made in (family, convolutional):
        dense = t.AutoModelForImageClassification.from_pretrained(made.path_to(made.dense))
        for variant in made.variants:
            model = t.AutoModelForImageClassification.from_pretrained(made.path_to(variant)).eval()
            with torch.no_grad():
                assert variant.metrics["accuracy"] == pytest.approx(evaluate(model)["accuracy"].item())
            assert variant.parameters == sum(p.numel() for p in model.parameters())
            assert variant.parameters_removed == sum(p.numel() for p in dense.parameters()) - variant.parameters
            assert variant.nonzero == sum(int((p != 0).sum()) for p in model.parameters())
            files = [p for p in made.path_to(variant).rglob("*") if p.is_file()]
            assert variant.bytes == sum(p.stat().st_size for p in files)
            assert (variant.parameters_removed > 0) == (variant.storage == "factored")


def macs_by_hand(model, places):
    """Of the layers of a ResNet or ViT, from shapes; attention products are the same in all variants."""
    total = 0
    for name, layer in model.named_modules():
        for weight in (p for n, p in layer.named_parameters(recurse=False) if n == "weight" and p.ndim > 1):
            total += weight.numel() * places[name]
    return total


def places_of(model):
    """How many times each layer is applied for one image, seen by hooks."""
    places = {}

    def hook(name):
        def count(module, args, output):
            flat = output.flatten(2) if module.weight.ndim > 2 else output.unsqueeze(0).flatten(0, -2).T
            places[name] = flat.shape[-1]

        return count

    handles = [
        m.register_forward_hook(hook(n)) for n, m in model.named_modules() if getattr(m, "weight", None) is not None
    ]
    model(pixel_values=batches()[0]["pixel_values"][:1])
    for handle in handles:
        handle.remove()
    return places


def test_multiplications_are_counted_in_factors(family, convolutional):
    for made in (family, convolutional):
        models = [
            t.AutoModelForImageClassification.from_pretrained(made.path_to(v)).eval()
            for v in (made.dense, made["low_rank:0.75"])
        ]
        with torch.no_grad():
            dense, factored = (macs_by_hand(m, places_of(m)) for m in models)
        assert made.dense.macs - made["low_rank:0.75"].macs == dense - factored > 0
        assert made["filters:0.5"].macs == made.dense.macs


def test_layers_that_would_grow_are_reported(tmp_path):
    family = hfc.build_family(tiny_vit(), ["low_rank:0.5"], output_dir=tmp_path / "f")
    variant = family["low_rank:0.5"]
    name = "vit.layers.0.attention.q_proj.weight"
    assert variant.skipped[name] == "two factors of rank 8 have 256 entries, and it has 256"
    model = t.AutoModelForImageClassification.from_pretrained(family.path_to(variant))
    assert {f"{n}.weight" for n, _ in factored_layers(model)} == hfc.find_targets(
        tiny_vit()
    ).keys() - variant.skipped.keys()


def test_a_factored_model_is_a_dense_checkpoint_of_its_own(tmp_path):
    model = tiny_vit()
    hfc.compress(model, "low_rank:0.75", remove=True)
    assert save_model(model, tmp_path / "alone") == "factored"
    family = hfc.build_family(model, ["unstructured:0.5"], output_dir=tmp_path / "f")
    assert [(v.storage, v.loads_with) for v in family.checkpoints] == [("factored", "hf_compress")] * 2
    assert family["unstructured:0.5"].sparsity == pytest.approx(0.5, abs=1e-3)


def test_batch_norm_statistics_are_those_of_the_factored_net(convolutional):
    expected = tiny_resnet()
    hfc.compress(expected, "low_rank:0.75", remove=True)
    hfc.recalibrate_batch_norm(expected, batches())
    stored = t.AutoModelForImageClassification.from_pretrained(convolutional.path_to("low_rank:0.75"))
    assert all(torch.equal(v, expected.state_dict()[n]) for n, v in stored.state_dict().items())


def test_one_shot_on_the_command_line(tmp_path, capsys):
    def compress(source, target, *patterns):
        flags = [word for pattern in patterns for word in ("--pattern", pattern)]
        return run(["compress", str(tmp_path / source), *flags, "--output_dir", str(tmp_path / target)])

    tiny_vit().save_pretrained(tmp_path / "model")
    assert compress("model", "out", "low_rank:0.75") == 0
    expected = tiny_vit()
    removed = hfc.compress(expected, "low_rank:0.75", remove=True).parameters_removed
    line = f"low_rank:0.75, {removed} parameters removed, 17.4 kB; it loads after `import hf_compress`"
    assert line in capsys.readouterr().out
    loaded = t.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert all(torch.equal(v, expected.state_dict()[n]) for n, v in loaded.state_dict().items())
    assert compress("out", "again", "unstructured:0.5") == 0
    assert "quantization_config" in json.loads((tmp_path / "again" / "config.json").read_text())
    assert compress("model", "family", "low_rank:0.75", "heads:0.5") == 0
    printed = capsys.readouterr().out
    assert "After `import hf_compress` transformers loads low-rank-0.75, and the others without it" in printed
    assert printed.count("removed") == 1  # a column: one variant has fewer parameters


def test_a_model_without_such_groups_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="finds no heads"):
        hfc.build_family(tiny_resnet(), ["heads:0.25"], output_dir=tmp_path / "f")
    assert not list(tmp_path.iterdir())
