"""Every number of a report against the compressed model itself, in float64."""

from __future__ import annotations

import copy
import json
import math
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_compress as hfc
from hf_compress.report import inspect_checkpoint
from hf_compress.report.measure import GRID
from tests.conftest import tiny_bert, tiny_resnet, tiny_vit
from tests.report.nets import NETS, convnext, gpt2, with_ties
from tests.report.test_stored_layers import loaded

PATTERNS = [str(p) for p in GRID]
CHAINS = ["2:4+int8", "unstructured:0.8+int8", "unstructured:0.5:layer+2:4", "unstructured:0.5+2:4+int4", "int3"]


def brute_force(model, pattern):
    """Energy, sensitivity and share of zeros of every layer and of all, and what was skipped."""
    compressed = copy.deepcopy(model)
    skipped = hfc.compress(compressed, pattern).skipped
    before, after = hfc.find_targets(model), hfc.find_targets(compressed)
    rows, lost, total = {}, 0.0, 0.0
    for name, target in before.items():
        w, c = target.parameter.detach().double(), after[name].parameter.detach().double()
        change, energy = float((w - c).square().sum()), float(w.square().sum())
        inputs = w.shape[target.reduction_dim] * target.conv_groups
        zeros = float((c == 0).double().mean())
        rows[name] = (1 - change / energy, (change / inputs) ** 0.5, zeros, name in skipped)
        lost, total = lost + change, total + energy
    return rows, 1 - lost / total


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
def test_numbers_are_those_of_the_compressed_model(tmp_path, net, ties):
    model = with_ties(net()) if ties else net()
    model.save_pretrained(tmp_path)
    patterns = [*PATTERNS, *CHAINS]
    report = inspect_checkpoint(str(tmp_path), patterns)
    assert list(report.patterns) == patterns
    model = loaded(model, tmp_path)
    for pattern in patterns:
        rows, energy = brute_force(model, pattern)
        assert report.patterns[pattern].energy == pytest.approx(energy, abs=1e-9)
        for layer in report.layers:
            found = layer.patterns[pattern]
            energy, sensitivity, zeros, is_skipped = rows[layer.name]
            assert found.energy == pytest.approx(energy, abs=1e-9), (pattern, layer.name)
            assert found.sensitivity == pytest.approx(sensitivity, rel=1e-6, abs=1e-9)
            assert found.sparsity == zeros
            assert (found.skipped is not None) == is_skipped


def test_a_checkpoint_that_is_sparse_already(tmp_path):
    """It has more zeros than some of the patterns ask for, and a threshold of 0 then."""
    model = tiny_vit()
    hfc.compress(model, "unstructured:0.7")
    model.save_pretrained(tmp_path)
    report = inspect_checkpoint(str(tmp_path), ["unstructured:0.5", "unstructured:0.5:layer", "unstructured:0.9"])
    zeros = {n: float((t.parameter == 0).double().mean()) for n, t in hfc.find_targets(model).items()}
    assert report.sparsity == pytest.approx(0.7, abs=1e-3)
    for layer in report.layers:
        assert layer.sparsity == zeros[layer.name]
        assert layer.patterns["unstructured:0.5"].sparsity == zeros[layer.name]
        assert layer.patterns["unstructured:0.5"].energy == 1
        assert layer.patterns["unstructured:0.5:layer"].sparsity >= max(0.5, zeros[layer.name])
    assert report.patterns["unstructured:0.9"].sparsity == pytest.approx(0.9, abs=1e-3)


def test_energies_see_one_entry_that_is_pruned_wrongly(tmp_path):
    """What the comparison above is worth: the smallest kept entry and the largest pruned one, exchanged."""
    model = tiny_vit()
    model.save_pretrained(tmp_path)
    report = inspect_checkpoint(str(tmp_path), ["unstructured:0.5:layer"])
    weight = hfc.find_targets(model)["vit.layers.0.mlp.fc1.weight"].parameter.detach().double().flatten()
    order = weight.abs().argsort()
    half = weight.numel() // 2
    right = 1 - weight[order[:half]].square().sum() / weight.square().sum()
    order[half - 1], order[half] = order[half].clone(), order[half - 1].clone()
    wrong = 1 - weight[order[:half]].square().sum() / weight.square().sum()
    energy = next(n for n in report.layers if n.name == "vit.layers.0.mlp.fc1.weight")
    found = energy.patterns["unstructured:0.5:layer"].energy
    assert found == pytest.approx(float(right), abs=1e-9)
    assert found != pytest.approx(float(wrong), abs=1e-9)


@pytest.mark.parametrize("net", [tiny_vit, gpt2, convnext])
def test_shards_and_one_file_give_one_report(tmp_path, net):
    model = with_ties(net())
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 3
    whole, sharded = (json.loads(inspect_checkpoint(str(tmp_path / f)).to_json()) for f in ("whole", "sharded"))
    assert whole.pop("model") != sharded.pop("model")
    assert whole == sharded


def test_facts_about_the_file(tmp_path):
    model = tiny_bert()
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    with torch.no_grad():
        hfc.find_targets(model)[name].parameter[:6] = 0
    model.half().save_pretrained(tmp_path)
    report = inspect_checkpoint(str(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    assert report.bytes == sum(w.nbytes for w in weights.values())
    assert report.parameters == sum(w.numel() for w in weights.values())
    assert report.bytes_are == "measured"
    assert report.compressed_bytes == sum(len(zlib.compress(w.numpy().tobytes(), 6)) for w in weights.values())
    layer = next(layer for layer in report.layers if layer.name == name)
    assert (layer.dtype, layer.shape, layer.kind, layer.reduction_dim) == ("F16", (24, 16), "linear", 1)
    assert layer.stored == (name,)
    assert layer.sparsity == pytest.approx(0.25)
    assert layer.bytes == 2 * 24 * 16
    assert layer.compressed_bytes == len(zlib.compress(weights[name].numpy().tobytes(), 6))
    hfc.compress(model, "unstructured:0.9")
    pruned = {n: w.numpy(force=True) for n, w in model.state_dict().items() if n in weights}
    wanted = sum(len(zlib.compress(w.tobytes(), 6)) for w in pruned.values())
    assert report.patterns["unstructured:0.9"].compressed_bytes == wanted
    assert report.patterns["unstructured:0.9"].bytes == report.bytes


def test_int8_counts_a_byte_a_weight_where_it_is_stored_so(tmp_path):
    """A net of Linear layers is; a convolutional one keeps rounded values in its own type."""
    tiny_bert().save_pretrained(tmp_path / "bert")
    tiny_resnet().save_pretrained(tmp_path / "resnet")
    bert, resnet = (inspect_checkpoint(str(tmp_path / n), ["int8", "2:4+int8"]) for n in ("bert", "resnet"))
    for pattern in ("int8", "2:4+int8"):
        assert resnet.patterns[pattern].bytes == resnet.bytes
        for layer in bert.layers:
            assert layer.patterns[pattern].bytes == layer.numel + 4 * layer.shape[0]
    family = hfc.build_family(tiny_bert(), ["int8"], output_dir=tmp_path / "family")
    stored = load_file(family.path_to("int8") / "model.safetensors")
    assert bert.patterns["int8"].bytes == sum(w.nbytes for w in stored.values())


def test_an_int8_checkpoint_is_reported_as_what_it_decodes_to(tmp_path):
    family = hfc.build_family(tiny_bert(), ["int8"], output_dir=tmp_path / "family")
    report = inspect_checkpoint(str(family.path_to("int8")), ["unstructured:0.5", "2:4"])
    model = tiny_bert()
    hfc.compress(model, "int8")
    model.save_pretrained(tmp_path / "rounded")
    rounded = inspect_checkpoint(str(tmp_path / "rounded"), ["unstructured:0.5", "2:4"])
    for ours, theirs in zip(report.layers, rounded.layers, strict=True):
        assert ours.dtype == "I8"
        assert ours.bytes == ours.numel
        assert {p: n.energy for p, n in ours.patterns.items()} == {p: n.energy for p, n in theirs.patterns.items()}


def test_bottlenecks_and_collapse(tmp_path):
    torch.manual_seed(0)
    weights = {f"layers.{i}.weight": torch.randn(32, 16) * scale for i, scale in enumerate((1.0, 0.01, 3.0, 0.5))}
    save_file(weights, tmp_path / "weights.safetensors")
    report = inspect_checkpoint(str(tmp_path / "weights.safetensors"))
    assert report.reference == "unstructured:0.9"
    assert report.collapsed == ("layers.1.weight", "layers.3.weight")
    sensitivities = {layer.name: layer.patterns["unstructured:0.9"].sensitivity for layer in report.layers}
    assert list(report.bottlenecks) == sorted(sensitivities, key=lambda name: -sensitivities[name])
    assert inspect_checkpoint(str(tmp_path / "weights.safetensors"), "2:4").reference == "2:4"


def test_sensitivity_is_the_change_of_outputs_for_random_inputs(tmp_path):
    """Its definition, by drawing inputs of length 1."""
    torch.manual_seed(0)
    weight = torch.randn(24, 16)
    save_file({"layers.0.weight": weight}, tmp_path / "weights.safetensors")
    report = inspect_checkpoint(str(tmp_path / "weights.safetensors"), "2:4")
    inputs = torch.nn.functional.normalize(torch.randn(100_000, 16), dim=1)
    pruned = weight.clone()
    hfc.parse_pattern("2:4").project_({"w": pruned})
    changes = (inputs @ (weight - pruned).T).square().sum(1).mean().sqrt()
    assert report.layers[0].patterns["2:4"].sensitivity == pytest.approx(float(changes), rel=0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_layer_is_named_and_the_others_are_measured(tmp_path, bad):
    model = tiny_vit()
    name = "vit.layers.0.mlp.fc1.weight"
    with torch.no_grad():
        hfc.find_targets(model)[name].parameter[0, 0] = bad
    model.save_pretrained(tmp_path)
    report = inspect_checkpoint(str(tmp_path))
    (broken,) = [layer for layer in report.layers if layer.problem]
    assert broken.name == name
    assert broken.patterns == {}
    assert f"{name} is left out: it holds NaN or infinity" in report.notes
    assert name not in report.bottlenecks
    json.loads(report.to_json())
    assert report.bytes == sum(w.nbytes for w in load_file(tmp_path / "model.safetensors").values())
    without = hfc.compress(tiny_vit(), "unstructured:0.9", exclude=[name])
    zeros = {layer.name: layer.patterns["unstructured:0.9"].sparsity for layer in report.layers if not layer.problem}
    assert zeros == pytest.approx({n: layer.sparsity for n, layer in without.layers.items()})


def test_all_layers_broken(tmp_path):
    save_file({"layers.0.weight": torch.full((4, 4), float("nan"))}, tmp_path / "weights.safetensors")
    report = inspect_checkpoint(str(tmp_path / "weights.safetensors"))
    assert report.bottlenecks == ()
    assert all(numbers.energy is None for numbers in report.patterns.values())
    json.loads(report.to_json())


def test_empty_zero_and_huge_weights(tmp_path):
    weights = {
        "layers.0.weight": torch.zeros(0, 8),
        "layers.1.weight": torch.zeros(8, 0),
        "layers.2.weight": torch.zeros(8, 8),
        "layers.3.weight": torch.randn(8, 8),
        "layers.4.weight": torch.full((8, 8), 1e300, dtype=torch.float64),
    }
    save_file(weights, tmp_path / "weights.safetensors")
    report = inspect_checkpoint(str(tmp_path / "weights.safetensors"))
    json.loads(report.to_json())
    empty, flat, zero, plain, huge = report.layers
    for layer in (empty, flat, zero):
        assert layer.spectrum is None
        assert all(n.energy is None and n.sensitivity == 0 for n in layer.patterns.values())
    assert zero.sparsity == 1
    assert plain.patterns["2:4"].sparsity == 0.5
    assert huge.problem == "values whose squares are too large"
    assert all(math.isfinite(n.energy) for n in report.patterns.values())


@pytest.mark.parametrize("pattern", ["low_rank:0.5", "2:4+unstructured:0.5", "filters:0.5"])
def test_patterns_that_a_report_cannot_measure(tmp_path, pattern):
    with pytest.raises(ValueError, match="a report cannot measure"):
        inspect_checkpoint(str(tmp_path), pattern)


def test_progress_and_repeated_patterns(tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    seen = []
    report = inspect_checkpoint(str(tmp_path), ["2:4", "2:4"], progress=lambda *counts: seen.append(counts))
    assert list(report.patterns) == ["2:4"]
    assert seen == [(i + 1, 13) for i in range(13)]
