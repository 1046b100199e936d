"""Which tensors are targets: those of find_targets in the loaded model, with the values that from_pretrained gives."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_compress as hfc
from hf_compress.report.checkpoint import open_checkpoint
from hf_compress.report.layers import find_layers
from tests.conftest import tiny_bert, tiny_resnet, tiny_vit
from tests.report.nets import NETS, convnext, dinov2, laguna


def loaded(model, folder):
    """As stored: what hf_compress selects on before any cast."""
    return type(model).from_pretrained(folder, dtype="auto")


def assert_same(found, model, exclude=None):
    targets = hfc.find_targets(model, exclude=exclude)
    assert [layer.name for layer in found.found] == list(targets)
    for layer in found.found:
        wanted = targets[layer.name]
        assert torch.equal(layer.read(), wanted.parameter)
        assert layer.target.reduction_dim == wanted.reduction_dim
        assert layer.target.kind == wanted.kind
        assert layer.target.conv_groups == wanted.conv_groups


@pytest.mark.parametrize("net", [*NETS, laguna], ids=lambda net: net.__name__)
def test_layers_are_those_of_the_loaded_model(tmp_path, net):
    model = net()
    model.save_pretrained(tmp_path)
    found = find_layers(open_checkpoint(str(tmp_path)))
    assert found.architecture == type(model).__name__
    assert found.notes == []
    assert all(parameter.is_meta for parameter in found.model.parameters())
    assert_same(found, loaded(model, tmp_path))


@pytest.mark.parametrize("net", [*NETS, laguna], ids=lambda net: net.__name__)
def test_a_file_with_the_names_of_the_model(tmp_path, net):
    """As a state dict has them, which is not as save_pretrained writes them; transformers takes both."""
    model = net()
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [type(model).__name__]}))
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same(find_layers(open_checkpoint(str(tmp_path))), loaded(model, tmp_path))


def test_one_tensor_on_disk_may_be_two_layers(tmp_path):
    dinov2().save_pretrained(tmp_path)
    layers = {layer.name: layer for layer in find_layers(open_checkpoint(str(tmp_path))).found}
    gate, up = (next(n for n in layers if n.endswith(f"mlp.{p}_proj.weight")) for p in ("gate", "up"))
    assert layers[gate].stored == layers[up].stored
    assert layers[gate].stored[0].endswith("mlp.weights_in.weight")
    assert not torch.equal(layers[gate].read(), layers[up].read())


def test_globs_choose_among_them(tmp_path):
    model = tiny_vit()
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert_same(find_layers(checkpoint, exclude=["*mlp*"]), loaded(model, tmp_path), exclude=["*mlp*"])
    assert [layer.name for layer in find_layers(checkpoint, include=["classifier"]).found] == ["classifier.weight"]
    with pytest.raises(ValueError, match="include='nothing' matches no weight"):
        find_layers(checkpoint, include=["nothing"])


def test_a_checkpoint_that_timm_saved(tmp_path):
    import timm
    from timm.models import save_for_hf

    native = timm.create_model("resnet20_cifar", num_classes=3, width=4)
    save_for_hf(native, tmp_path, safe_serialization=True)
    found = find_layers(open_checkpoint(str(tmp_path)))
    weights = dict(native.named_parameters())
    assert [layer.stored[0] for layer in found.found] == list(hfc.find_targets(native))
    assert all(torch.equal(layer.read(), weights[layer.stored[0]]) for layer in found.found)


def test_a_bare_backbone_under_the_name_of_a_whole_model(tmp_path):
    """Names without the prefix of the backbone, as older checkpoints have them."""
    model = tiny_bert()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({n.removeprefix("bert."): w for n, w in load_file(file).items()}, file, {"format": "pt"})
    assert_same(find_layers(open_checkpoint(str(tmp_path))), loaded(model, tmp_path))


@pytest.mark.parametrize("net", [tiny_resnet, convnext], ids=lambda net: net.__name__)
def test_without_a_config_shapes_decide(tmp_path, net):
    """Of a convolutional net that is the same choice, the classifier included."""
    model = net()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    found = find_layers(open_checkpoint(str(tmp_path / "weights.safetensors")))
    assert found.architecture is None
    assert "names and shapes decided" in found.notes[0]
    targets = hfc.find_targets(model)
    assert {layer.name for layer in found.found} == set(targets)
    for layer in found.found:
        assert torch.equal(layer.read(), targets[layer.name].parameter)
        assert layer.target.conv_groups == targets[layer.name].conv_groups


def test_shapes_leave_embeddings_norms_and_heads_out(tmp_path):
    weights = {
        "model.embed_tokens.weight": torch.randn(9, 8),
        "model.layers.10.proj.weight": torch.randn(8, 8),
        "model.layers.2.proj.weight": torch.randn(8, 8),
        "model.layers.2.proj.bias": torch.randn(8),
        "model.layers.2.norm.weight": torch.randn(8),
        "model.layers.2.counts.weight": torch.arange(4).view(2, 2),
        "lm_head.weight": torch.randn(9, 8),
    }
    save_file(weights, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody-knows"}))
    found = find_layers(open_checkpoint(str(tmp_path)))
    assert [layer.name for layer in found.found] == ["model.layers.2.proj.weight", "model.layers.10.proj.weight"]
    assert "its model cannot be built" in found.notes[0]
    assert "1 targets are left out, first model.layers.2.counts.weight: it is stored as I64" in found.notes[1]


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"architectures": ["NoSuchNet"]}, "this transformers has no model NoSuchNet"),
        ({"architectures": ["pipeline"]}, "this transformers has no model pipeline"),
        ({"hidden_size": "wide"}, "its model cannot be built"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "no weight of BertModel is in it"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "its model cannot be built"),
    ],
)
def test_a_config_that_makes_no_model_leaves_it_to_the_shapes(tmp_path, change, note):
    tiny_vit().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "own.py").write_text("raise SystemExit('code of a checkpoint was run')")
    found = find_layers(open_checkpoint(str(tmp_path)))
    assert note in found.notes[0]
    assert len(found.found) == len(hfc.find_targets(tiny_vit()))


def test_weights_that_are_absent_or_of_another_shape_are_named(tmp_path):
    model = tiny_vit()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    names = [name for name in weights if name.endswith("attention.query.weight")]
    del weights[names[0]]
    weights[names[1]] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    found = find_layers(open_checkpoint(str(tmp_path)))
    assert len(found.found) == len(hfc.find_targets(model)) - 2
    assert found.notes == [
        "2 targets are left out, first vit.layers.0.attention.q_proj.weight: it is not in the checkpoint"
    ]
    with pytest.raises(ValueError, match=r"stored in the shape \[3, 3\], the model has \[16, 16\]"):
        find_layers(open_checkpoint(str(tmp_path)), include=["vit.layers.1.attention.q_proj"])
