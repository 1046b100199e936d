"""Small models of many architectures, each with two layers and more than one head."""

from __future__ import annotations

import timm
import torch
import transformers as t

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def bert():
    return t.BertModel(t.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True))


def albert():
    return t.AlbertModel(t.AlbertConfig(**SIZES, embedding_size=8))


def distilbert():
    return t.DistilBertModel(t.DistilBertConfig(vocab_size=64, dim=16, n_layers=2, n_heads=4, hidden_dim=24))


def vit():
    sizes = {name: SIZES[name] for name in list(SIZES)[1:5]}
    return t.ViTModel(t.ViTConfig(image_size=8, patch_size=4, **sizes))


def gpt2():
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24}
    return t.GPT2Model(t.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, add_cross_attention=True))


def llama():
    return t.LlamaModel(t.LlamaConfig(**SIZES, num_key_value_heads=2))


def qwen3():
    return t.Qwen3Model(t.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8))


def t5():
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    return t.T5Model(t.T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0))


def bart():
    ffn = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 16}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 1, "decoder_layers": 1}
    return t.BartModel(t.BartConfig(vocab_size=64, d_model=16, **ffn, **heads, pad_token_id=0, bos_token_id=1))


def modernbert():
    return t.ModernBertModel(t.ModernBertConfig(**SIZES, cls_token_id=1, sep_token_id=2))


def phi3():
    return t.Phi3Model(t.Phi3Config(**SIZES))


def gpt_neox():
    return t.GPTNeoXModel(t.GPTNeoXConfig(**SIZES))


def timm_vit(**changes):
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4, "num_classes": 3}
    return timm.models.vision_transformer.VisionTransformer(**{**sizes, **changes})


def timm_swiglu():
    return timm_vit(depth=1, mlp_layer=timm.layers.mlp.SwiGLU)


def timm_glu():
    return timm_vit(depth=1, mlp_layer=timm.layers.mlp.GluMlp)


def encoder_layer():
    return torch.nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)


def mlp():
    nn = torch.nn
    return nn.Sequential(nn.Linear(16, 12), nn.SiLU(), nn.Dropout(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))


# Number of feed-forward pairs and of attentions that must be found.
EXPECTED = {
    bert: (2, 4),
    albert: (1, 1),
    distilbert: (2, 2),
    vit: (2, 2),
    gpt2: (2, 4),
    llama: (2, 2),
    qwen3: (2, 2),
    t5: (2, 3),
    bart: (2, 3),
    modernbert: (2, 2),
    phi3: (2, 0),
    gpt_neox: (2, 0),
    timm_vit: (2, 2),
    timm_swiglu: (1, 1),
    timm_glu: (1, 1),
    encoder_layer: (1, 0),
    mlp: (2, 0),
}


def make(build):
    """In eval mode, with biases and norms that are not what they start with."""
    t.set_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs_of(model):
    """What a forward pass takes, as keyword arguments or one tensor."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (2, 5), generator=generator)
    name = getattr(model, "main_input_name", None)
    if isinstance(model, (torch.nn.Sequential, torch.nn.TransformerEncoderLayer)):
        return [torch.randn(2, 5, 16, generator=generator)], {}
    if name is None or name == "pixel_values":
        return [torch.randn(2, 3, 8, 8, generator=generator)], {}
    extra = {}
    if getattr(model.config, "add_cross_attention", False):
        extra["encoder_hidden_states"] = torch.randn(2, 4, 16, generator=generator)
    if model.config.is_encoder_decoder:
        extra["decoder_input_ids"] = ids.flip(1)
    return [], {"input_ids": ids, **extra}


@torch.no_grad()
def run(model):
    args, kwargs = inputs_of(model)
    out = model(*args, **kwargs)
    return out if isinstance(out, torch.Tensor) else out[0]
