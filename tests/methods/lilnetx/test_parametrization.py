"""Latents in place of weights: closed forms in float64, published initialisations, and plain models again."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_compress.codec import decode, encode, read_groups
from hf_compress.methods.lilnetx import bake, decoders_of, integers, latent_layers, reparametrize
from tests.conftest import tiny_bert, tiny_resnet, tiny_vit

LAYERS = {
    "conv3x3": (nn.Conv2d(6, 5, 3), 9, "conv3x3"),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), 9, "conv3x3"),
    "conv1d": (nn.Conv1d(3, 4, 5), 5, "conv5"),
    "conv1x1": (nn.Conv2d(6, 5, 1), 1, "conv1x1"),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), 9, "depthwise3x3"),
    "patches": (nn.Conv2d(3, 4, 8), 1, "conv8x8"),
    "linear": (nn.Linear(16, 8), 8, "linear8"),
    "odd": (nn.Linear(15, 8), 1, "linear"),
    "Conv1D": (Conv1D(8, 16), 8, "linear8"),
}


def rows_of(layer, tensor, row):
    """Slices by definition: what is consecutive in (out, in, ...)."""
    ordered = tensor.T if isinstance(layer, Conv1D) else tensor
    return ordered.reshape(-1, row)


@pytest.mark.parametrize("name", LAYERS)
def test_weight_and_gradients_are_the_closed_form(name):
    layer, row, kind = LAYERS[name]
    model = nn.Sequential(copy.deepcopy(layer)).double()
    (found,) = reparametrize(model, include=["*"])
    decoder, gain = found.decoded.decoder, found.decoded.gain
    assert (decoder.name, decoder.row) == (kind, row)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        decoder.matrix.copy_(torch.randn(row, row, generator=generator, dtype=torch.float64))
    weight = model[0].weight
    whole = torch.round(rows_of(layer, found.latent, row) / gain)
    torch.testing.assert_close(rows_of(layer, weight, row), whole @ decoder.matrix * gain, rtol=0, atol=1e-12)
    upstream = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    (weight * upstream).sum().backward()
    slices = rows_of(layer, upstream, row)
    expected = slices @ decoder.matrix.T
    torch.testing.assert_close(rows_of(layer, found.latent.grad, row), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(decoder.matrix.grad, whole.T @ slices * gain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("outputs", "decoders", "row"), [(16, "kind", 1), (17, "kind", 49), (16, "layer", 1)])
def test_a_decoder_never_outnumbers_the_weights_that_it_makes(outputs, decoders, row):
    """49 x 49 numbers for 16 x 3 x 49 weights would be most of the file of a small net."""
    model = nn.Sequential(nn.Conv2d(3, outputs, 7), nn.Conv2d(outputs, 4, 3))
    dense = copy.deepcopy(model)
    stem, rest = reparametrize(model, include=["*"], steps_per_std=100, decoders=decoders)
    assert (stem.decoded.decoder.row, rest.decoded.decoder.row) == (row, 9)
    assert (model[0].weight - dense[0].weight).abs().max() <= dense[0].weight.std(correction=0) / 200 * 1.0001


def test_layers_of_a_kind_are_counted_together():
    model = nn.Sequential(nn.Conv2d(3, 10, 7), nn.Conv2d(10, 3, 7))
    assert {layer.decoded.decoder.row for layer in reparametrize(model, include=["*"])} == {49}


@given(st.floats(0.5, 8), st.integers(0, 2**31))
def test_pretrained_weights_move_by_half_a_step_at_most(steps, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)).double()
    before = [layer.weight.detach().clone() for layer in model]
    layers = reparametrize(model, steps_per_std=steps, include=["*"])
    for layer, old in zip(layers, before, strict=True):
        assert torch.isclose(layer.decoded.gain, old.std(correction=0) / steps)
        assert (layer.module.weight - old).abs().max() <= layer.decoded.gain * (0.5 + 1e-12)


def cifar_resnet20(width=4):
    """Its shapes: 3x3 convolutions in three widths, and a classifier."""
    w = 16 * width
    return nn.Sequential(nn.Conv2d(w, w, 3), nn.Conv2d(w, 2 * w, 3), nn.Conv2d(2 * w, 4 * w, 3), nn.Linear(4 * w, 10))


def test_uniform_is_the_published_initialisation_for_cifar():
    model = cifar_resnet20()
    layers = reparametrize(model, init="uniform", boundary=3, linear_slice=1, seed=5)
    for layer, bound in zip(layers, (1.863, 1.208, 0.758, 17.03), strict=True):
        assert layer.latent.abs().max().item() == pytest.approx(bound, rel=5e-3)
        assert layer.latent.std().item() == pytest.approx(bound / math.sqrt(3), rel=3e-2)
        assert layer.decoded.gain == 1
    _conv, linear = decoders_of(model)
    assert linear.matrix.item() == pytest.approx(math.sqrt(1.953e-3), rel=1e-3)
    matrices = []
    for seed in range(40):
        model = cifar_resnet20(1)
        reparametrize(model, init="uniform", boundary=3, seed=seed)
        matrices.append(decoders_of(model)[0].matrix)
    expected = math.sqrt(24 / 64 / (7**2 - 1))
    assert torch.stack(matrices).std().item() == pytest.approx(expected, rel=5e-2)
    assert not torch.equal(matrices[0], matrices[1])


def test_normal_is_the_published_initialisation_for_imagenet():
    spreads = {"conv7x7": 0.01364, "conv3x3": 0.02083, "conv1x1": 0.03608, "linear": 0.03608}
    found = {name: [] for name in spreads}
    for seed in range(30):
        model = nn.Sequential(nn.Conv2d(3, 8, 7), nn.Conv2d(4, 512, 3), nn.Conv2d(8, 8, 1), nn.Linear(6, 4))
        layers = reparametrize(model, init="normal", boundary=1, linear_slice=1, seed=seed)
        assert layers[1].latent.std().item() == pytest.approx(1, rel=5e-2)
        for decoder in decoders_of(model):
            found[decoder.name].append(decoder.matrix.flatten())
    for name, spread in spreads.items():
        values = torch.cat(found[name])
        assert values.square().mean().sqrt().item() == pytest.approx(spread, rel=6e-2), name


def test_decoders_are_shared_by_kind_or_belong_to_one_layer():
    model = tiny_resnet()
    layers = reparametrize(model)
    assert [d.name for d in decoders_of(model)] == ["conv7x7", "conv3x3", "conv1x1", "linear"]
    assert len(layers) == 7
    model = tiny_resnet()
    layers = reparametrize(model, decoders="layer")
    assert [d.name for d in decoders_of(model)] == [layer.path for layer in layers]
    loss = model(pixel_values=torch.randn(2, 3, 16, 16)).logits.sum()
    loss.backward()
    assert all(d.matrix.grad is not None for d in decoders_of(model))


@pytest.mark.parametrize("make", [tiny_bert, tiny_vit, tiny_resnet])
def test_bake_gives_the_plain_model_of_its_file(make):
    model = make().eval()
    names = set(model.state_dict())
    classes = {path: type(module) for path, module in model.named_modules()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    frozen = next(layer for path, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))).weight
    frozen.requires_grad_(False)
    reparametrize(model, steps_per_std=2)
    trained = {layer.path: layer.module.weight.detach().clone() for layer in latent_layers(model)}
    latents, decoders = bake(model)
    assert set(model.state_dict()) == names
    assert not latent_layers(model)
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert sum(not p.requires_grad for p in model.parameters()) == 1
    blobs, groups = encode(latents, decoders)
    groups = read_groups(groups)
    for path, weight in trained.items():
        plain = model.get_parameter(f"{path}.weight")
        torch.testing.assert_close(plain, weight, rtol=1e-6, atol=1e-7)
        read = decode(blobs[f"{path}.weight"], groups, tuple(plain.shape))
        assert torch.equal(torch.from_numpy(read), plain)
    reparametrize(model)  # a baked model can begin again


def test_weights_of_evaluation_are_decoded_once_and_never_stale():
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    (layer,) = reparametrize(model, include=["*"])
    with torch.no_grad():
        first = model[0].weight
        assert model[0].weight is first
        layer.latent.add_(1)
        second = model[0].weight
        assert second is not first
        assert not torch.equal(first, second)
        layer.decoded.decoder.matrix.mul_(2)
        torch.testing.assert_close(model[0].weight, 2 * second)
    assert model[0].weight.requires_grad
    model.train()
    with torch.no_grad():
        assert model[0].weight is not model[0].weight


def test_mixed_precision_rounds_no_latent():
    model = nn.Sequential(nn.Linear(64, 8)).eval()
    (layer,) = reparametrize(model, include=["*"], steps_per_std=100)
    exact = layer.decoded.decode(layer.latent)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.decoded.decode(layer.latent), exact)
        assert model(torch.randn(2, 64)).dtype == torch.bfloat16


def test_copies_are_independent_and_share_decoders_inside():
    model = tiny_resnet()
    reparametrize(model)
    other = copy.deepcopy(model)
    assert not set(map(id, decoders_of(model))) & set(map(id, decoders_of(other)))
    assert len(decoders_of(other)) == len(decoders_of(model))
    bake(other)
    assert latent_layers(model)


def test_shared_weights_stay_plain():
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)
    b.weight = a.weight
    model = nn.Sequential(a, b, nn.Linear(8, 8))
    assert [layer.path for layer in reparametrize(model, include=["*"])] == ["2"]
    assert model[0].weight is model[1].weight


def test_integers_are_what_rounding_gives():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2))
    layers = reparametrize(model, include=["*"])
    with torch.no_grad():
        layers[0].latent[0, 0] = 300 * layers[0].decoded.gain
    found, _ = integers(model)
    assert found["0.weight"].values.dtype == "int16"
    assert found["1.weight"].values.dtype == "int8"
    assert found["0.weight"].values[0, 0] == 300
    with torch.no_grad():
        layers[0].latent[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"0: the largest latent is .* files hold up to 32767"):
        bake(model)
    assert len(latent_layers(model)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init": "random"}, "init is one of pretrained, uniform, normal, got 'random'"),
        ({"decoders": "all"}, "decoders is one of kind, layer"),
        ({"steps_per_std": 0}, "steps_per_std must be a number above 0"),
        ({"boundary": math.nan}, "boundary must be a number above 0"),
        ({"linear_slice": 0}, "linear_slice must be a whole number from 1 to 64"),
        ({"include": ["*nothing*"]}, "matches no weight"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        reparametrize(nn.Sequential(nn.Linear(8, 8)), **{"include": ["*"], **change})


def test_models_that_have_no_latents_are_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    reparametrize(model, include=["*"])
    with pytest.raises(ValueError, match="has latents already; bake it first"):
        reparametrize(model, include=["*"])
    with pytest.raises(ValueError, match="no weights to code"):
        reparametrize(nn.Sequential(nn.LayerNorm(4)))
    with pytest.raises(ValueError, match=r"torch.bfloat16, in which latents would not move"):
        reparametrize(nn.Sequential(nn.Linear(8, 8)).bfloat16(), include=["*"])
    broken = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        broken[0].weight[0, 0] = math.inf
    with pytest.raises(ValueError, match="0.weight has a NaN or infinite entry"):
        reparametrize(broken, include=["*"])
