"""The CIFAR nets: shapes, published parameter counts, timm's interface, and real weights."""

from __future__ import annotations

import pytest
import timm
import torch

import hf_compress  # noqa: F401  registers the models
from tests.conftest import ROOT

WEIGHTS = ROOT.parent / "shared" / "data" / "resnet_cifar10"


@pytest.mark.parametrize(
    ("name", "parameters", "with_convolutions"),
    [("resnet20_cifar", 269_722, 272_474), ("resnet32_cifar", 464_154, 466_906), ("resnet56_cifar", 853_018, 855_770)],
)
def test_parameter_counts(name, parameters, with_convolutions):
    assert sum(p.numel() for p in timm.create_model(name).parameters()) == parameters
    assert sum(p.numel() for p in timm.create_model(name, shortcut="B").parameters()) == with_convolutions


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_forward_and_timm_interface(shortcut):
    model = timm.create_model("resnet20_cifar", num_classes=7, in_chans=1, width=4, shortcut=shortcut).eval()
    x = torch.randn(2, 1, 32, 32)
    assert model(x).shape == (2, 7)
    assert model.forward_features(x).shape == (2, 16, 8, 8)
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
    assert model.get_classifier().out_features == 7
    model.reset_classifier(0)
    assert model(x).shape == (2, 16)
    assert timm.get_pretrained_cfg("resnet20_cifar").input_size == (3, 32, 32)


def test_option_a_pads_with_zero_channels_evenly():
    model = timm.create_model("resnet20_cifar")
    x = torch.randn(1, 16, 8, 8)
    y = model.layer2[0].shortcut(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.parametrize(("option", "value"), [("depth", 21), ("shortcut", "C")])
def test_wrong_arguments(option, value):
    with pytest.raises(ValueError, match=f"{option} must be"):
        timm.create_model("resnet20_cifar", **{option: value})


def test_saved_wrapper_loads_in_timm_and_in_transformers(tmp_path):
    from transformers import AutoModelForImageClassification

    from hf_compress.tasks.image_classification import ImageClassificationArguments, prepare

    arguments = ImageClassificationArguments(
        architecture="resnet20_cifar", model_args='{"width": 4}', max_train_samples=8
    )
    model = prepare(arguments)["model"].eval()
    assert model.timm_model.conv1.weight.std() > 0.1  # timm's initialisation, not the wrapper's 0.02
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(x).logits, model(x).logits)
    native = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(native(x), model(x).logits)


@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="the shared pretrained weights are not here")
def test_pretrained_weights_reach_their_accuracy():
    """88.49 % on the JPEG test images; 1,000 of them here."""
    from datasets import load_dataset
    from safetensors.torch import load_file
    from torchvision.transforms.functional import normalize, pil_to_tensor

    model = timm.create_model("resnet20_cifar").eval()
    model.load_state_dict(load_file(WEIGHTS / "resnet20_jpeg.safetensors"), strict=False)
    files = str(WEIGHTS.parent / "cifar10" / "test-*.parquet")
    test = load_dataset("parquet", data_files={"test": files}, split="test").select(range(1000))
    cfg = timm.get_pretrained_cfg("resnet20_cifar")
    x = torch.stack([normalize(pil_to_tensor(image) / 255, cfg.mean, cfg.std) for image in test["image"]])
    with torch.no_grad():
        correct = (model(x).argmax(1) == torch.tensor(test["label"])).float().mean()
    assert correct > 0.865
