"""Singular values of Jacobians: known for linear networks, taken without a trace for all others."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from hf_compress.methods.tpp import jacobian_singular_values, mean_jacobian_singular_value


def test_those_of_a_linear_network_are_those_of_its_matrix():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    wanted = torch.linalg.svdvals((model[1].weight @ model[0].weight).detach())
    found = jacobian_singular_values(model, torch.randn(3, 6, dtype=torch.float64))
    assert found.shape == (3, 4)
    assert torch.allclose(found, wanted.expand(3, 4), rtol=1e-12)
    batches = [torch.randn(n, 6, dtype=torch.float64) for n in (3, 1)]  # a last batch that is not full
    assert mean_jacobian_singular_value(model, batches) == pytest.approx(wanted.mean().item(), rel=1e-12)


def test_nothing_is_changed_and_samples_do_not_mix():
    model = timm.create_model("resnet10t", num_classes=3)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images, generator = torch.randn(3, 3, 32, 32), torch.get_rng_state()
    together = jacobian_singular_values(model, images)
    alone = torch.cat([jacobian_singular_values(model, i[None]) for i in images])
    assert torch.allclose(together, alone, rtol=1e-3)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert images.grad is None
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_transformers_model_takes_pixel_values():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))
    images = torch.randn(2, 3, 8, 8)
    found = jacobian_singular_values(model, {"pixel_values": images})
    jacobian = torch.func.jacrev(lambda x: model.eval()(pixel_values=x[None]).logits[0])(images[0])
    assert torch.allclose(found[0].float(), torch.linalg.svdvals(jacobian.detach().flatten(1)), rtol=1e-3, atol=1e-6)


def test_token_ids_and_no_batch_are_refused():
    with pytest.raises(ValueError, match="got \\['input_ids'\\]"):
        jacobian_singular_values(nn.Linear(2, 2), {"input_ids": torch.ones(1, 2)})
    with pytest.raises(ValueError, match="floating-point tensor"):
        jacobian_singular_values(nn.Linear(2, 2), torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="inputs are empty"):
        mean_jacobian_singular_value(nn.Linear(2, 2), [])
