"""A coded file is as small as the entropy of its whole numbers, and what is not coded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from hf_compress.codec import byte_report, entropy_bits
from hf_compress.family.coded import round_rest_, save_coded
from hf_compress.methods.lilnetx import integers, latent_layers, reparametrize
from tests.conftest import tiny_resnet


def tensors_of(folder):
    found = {}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            found[name] = file.get_tensor(name)
    return found


@pytest.mark.parametrize(("name", "steps"), [("resnet18", 1.0), ("resnet18", 3.0), ("vit_tiny_patch16_224", 2.0)])
def test_all_files_are_as_small_as_their_content(tmp_path, name, steps):
    """Nets of more than 5 million parameters: within 2 % of the entropy and the stored rest."""
    torch.manual_seed(0)
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture=name, num_labels=10))
    reparametrize(model, steps_per_std=steps)
    with torch.no_grad():  # weights of a trained net have heavier tails than uniform ones
        for layer in latent_layers(model):
            layer.latent.copy_(torch.distributions.Laplace(0.0, layer.latent.std() / 2**0.5).sample(layer.latent.shape))
    latents, _ = integers(model)
    entropy = sum(entropy_bits(each) for each in latents.values()) / 8
    save_coded(model, tmp_path)
    rest = sum(t.nbytes for t in tensors_of(tmp_path).values() if t.dtype != torch.uint8)
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert sum(p.numel() for p in model.parameters()) > 5e6
    assert total <= 1.02 * (entropy + rest)


def test_of_small_nets_every_byte_is_listed(tmp_path):
    model = tiny_resnet(hidden_sizes=[32, 64], embedding_size=32)
    reparametrize(model)
    latents, _ = integers(model)
    save_coded(model, tmp_path)
    blobs = {n: t.numpy().tobytes() for n, t in tensors_of(tmp_path).items() if t.dtype == torch.uint8}
    report = byte_report({n: b for n, b in blobs.items() if n in latents}, blobs["hf_compress.groups"])
    assert report["payload"] <= 1.02 * sum(entropy_bits(each) for each in latents.values()) / 8
    assert sum(report.values()) == sum(map(len, blobs.values()))
    assert set(report) == {"payload", "headers", "tables", "checks", "decoders", "scales"}


def test_the_rest_takes_16_bits_where_these_hold_it(tmp_path):
    model = tiny_resnet()
    reparametrize(model)
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.randn(4, 3, 16, 16))  # statistics that no 16 bits hold
    save_coded(model, tmp_path / "a")
    wide = {n: t for n, t in tensors_of(tmp_path / "a").items() if n.endswith("running_mean")}
    assert {t.dtype for t in wide.values()} == {torch.float32}
    latents = [layer.latent.detach().clone() for layer in latent_layers(model)]
    assert round_rest_(model) > 10
    assert all(torch.equal(layer.latent, old) for layer, old in zip(latent_layers(model), latents, strict=True))
    save_coded(model, tmp_path / "b")
    narrow = {n: t for n, t in tensors_of(tmp_path / "b").items() if t.is_floating_point()}
    assert {t.dtype for t in narrow.values()} == {torch.float16}
    for name, tensor in wide.items():
        assert torch.equal(narrow[name], tensor.half())
    read = type(model).from_pretrained(tmp_path / "b")
    assert {p.dtype for p in read.parameters()} == {torch.float32}
    assert json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]["coded"]["version"] == 1


def test_what_16_bits_cannot_hold_stays():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    with torch.no_grad():
        model[1].weight[0] = 1e6
        model[1].bias.fill_(0.1)
    assert round_rest_(model, include=["0"]) == 2
    assert model[1].weight[0] == 1e6
    assert (model[1].bias == torch.tensor(0.1).half()).all()
