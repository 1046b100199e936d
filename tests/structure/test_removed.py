"""Zeros are what removal leaves: the masked model equals a smaller one, built by hand, without the groups."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as t
from torch import nn

import hf_compress as hfc
from hf_compress.structure import find_coupled_targets
from tests.structure.conftest import bert, gpt2, llama, make, modernbert, qwen3, run, timm_glu, timm_vit, vit


def kept_lines(model, pattern):
    """For every weight the indices along each dimension of groups that stay."""
    targets = find_coupled_targets(model)
    masks = pattern.masks(targets)
    found = {}
    for name, target in targets.items():
        if isinstance(target.groups[pattern.name], tuple):
            (part,) = target.groups[pattern.name]
            others = [d for d in range(target.parameter.ndim) if d != part.dim]
            found[name] = part.dim, masks[name].any(others).nonzero().flatten()
    return found


def cut(state, kept, model):
    """The state of the smaller model."""
    targets = find_coupled_targets(model)
    for name, (dim, lines) in kept.items():
        state[name] = state[name].index_select(dim, lines)
        bias = name.replace("weight", "bias")
        if bias in state and dim == targets[name].output_dim:
            state[bias] = state[bias][lines]
    return state


def smaller(build, **changes):
    config = copy.deepcopy(build().config)
    for name, value in changes.items():
        setattr(config, name, value)
    return type(build())(config)


def bert_with_two_heads():
    model = bert()
    attentions = [m for n, m in model.named_modules() if n.endswith(("attention.self", "crossattention.self"))]
    outputs = [m for n, m in model.named_modules() if n.endswith(("attention.output", "crossattention.output"))]
    for attention, output in zip(attentions, outputs, strict=True):
        for name in ("query", "key", "value"):
            setattr(attention, name, nn.Linear(16, 8))
        attention.num_attention_heads, attention.all_head_size = 2, 8
        output.dense = nn.Linear(8, 16)
    return model


def vit_with_two_heads():
    model = vit()
    for layer in model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(layer.attention, name, nn.Linear(16, 8))
        layer.attention.num_attention_heads, layer.attention.o_proj = 2, nn.Linear(8, 16)
    return model


def gpt2_with_two_heads():
    model = gpt2()
    conv1d = t.pytorch_utils.Conv1D
    for block in model.h:
        for attention in (block.attn, block.crossattention):
            attention.num_heads, attention.split_size = 2, 8
            attention.c_attn = conv1d(16 if hasattr(attention, "q_attn") else 24, 16)
            attention.c_proj = conv1d(16, 8)
            if hasattr(attention, "q_attn"):
                attention.q_attn = conv1d(8, 16)
    return model


def timm_with_two_heads():
    model = timm_vit()
    for block in model.blocks:
        block.attn.num_heads, block.attn.attn_dim = 2, 8
        block.attn.qkv, block.attn.proj = nn.Linear(16, 24), nn.Linear(8, 16)
    return model


def timm_with_half_the_neurons():
    model = timm_vit()
    for block in model.blocks:
        block.mlp.fc1, block.mlp.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
    return model


def timm_glu_with_half_the_neurons():
    model = timm_glu()
    for block in model.blocks:
        block.mlp.fc1, block.mlp.fc2 = nn.Linear(16, 32), nn.Linear(16, 16)
    return model


CASES = [
    (bert, "neurons", lambda: smaller(bert, intermediate_size=12)),
    (vit, "neurons", lambda: smaller(vit, intermediate_size=12)),
    (gpt2, "neurons", lambda: smaller(gpt2, n_inner=12)),
    (llama, "neurons", lambda: smaller(llama, intermediate_size=12)),
    (modernbert, "neurons", lambda: smaller(modernbert, intermediate_size=12)),
    (timm_vit, "neurons", timm_with_half_the_neurons),
    (timm_glu, "neurons", timm_glu_with_half_the_neurons),
    (bert, "heads", bert_with_two_heads),
    (vit, "heads", vit_with_two_heads),
    (gpt2, "heads", gpt2_with_two_heads),
    (llama, "heads", lambda: smaller(llama, num_attention_heads=2, num_key_value_heads=1, head_dim=4)),
    (qwen3, "heads", lambda: smaller(qwen3, num_attention_heads=2, num_key_value_heads=1)),
    (timm_vit, "heads", timm_with_two_heads),
]


@pytest.mark.parametrize(("build", "kind", "small"), CASES, ids=[f"{b.__name__}-{k}" for b, k, _ in CASES])
def test_the_masked_model_is_the_one_without_the_groups(build, kind, small):
    model = make(build)
    pattern = hfc.parse_pattern(f"{kind}:0.5")
    kept = kept_lines(model, pattern)
    dense = run(model)
    state = cut(model.state_dict(), kept, model)
    hfc.compress(model, pattern)
    rest = small().eval()
    rest.load_state_dict(state)
    torch.testing.assert_close(run(model), run(rest), rtol=1e-5, atol=1e-5)
    assert (run(model) - dense).abs().max() > 1e-3
    assert sum(p.numel() for p in rest.parameters()) < sum(p.numel() for p in model.parameters())


def test_without_zeros_it_is_another_model():
    model = make(vit)
    state = cut(model.state_dict(), kept_lines(model, hfc.Neurons(0.5)), model)
    rest = smaller(vit, intermediate_size=12).eval()
    rest.load_state_dict(state)
    assert (run(model) - run(rest)).abs().max() > 1e-3


def test_filters_with_their_bias():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3))
    x = torch.randn(2, 3, 7, 7)
    keep = hfc.Filters(0.5).masks(hfc.find_targets(net))["0.weight"].flatten(1).all(1)
    hfc.compress(net, "filters:0.5", include=["0"])
    rest = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3))
    rest.load_state_dict(
        {
            "0.weight": net[0].weight[keep],
            "0.bias": net[0].bias[keep],
            "2.weight": net[2].weight[:, keep],
            "2.bias": net[2].bias,
        }
    )
    torch.testing.assert_close(net(x), rest(x))
