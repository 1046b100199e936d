"""Small checkpoints of many kinds, as transformers and timm save them."""

from __future__ import annotations

import torch

from tests.conftest import tiny_bert, tiny_resnet, tiny_vit


def gpt2():
    import transformers as t

    t.set_seed(0)
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, **tokens))


def llama():
    import transformers as t

    t.set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return t.LlamaForCausalLM(t.LlamaConfig(**sizes, vocab_size=64, bos_token_id=1, eos_token_id=2)).bfloat16()


def dinov2():
    """transformers makes two layers of one tensor of its files."""
    import transformers as t

    t.set_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    return t.Dinov2ForImageClassification(t.Dinov2Config(**sizes, use_swiglu_ffn=True, num_labels=3))


def mixtral():
    """Its experts lie in tensors of three dimensions, which are no targets."""
    import transformers as t

    t.set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    return t.MixtralForCausalLM(t.MixtralConfig(**sizes, **experts, vocab_size=64, bos_token_id=1, eos_token_id=2))


def t5():
    import transformers as t

    t.set_seed(0)
    config = t.T5Config(d_model=16, d_ff=24, d_kv=8, num_heads=2, num_layers=1, vocab_size=64)
    return t.T5ForConditionalGeneration(config)


def timm_resnet():
    import transformers as t

    t.set_seed(0)
    config = t.TimmWrapperConfig(architecture="resnet20_cifar", num_labels=3, model_args={"width": 4})
    return t.TimmWrapperForImageClassification(config)


def convnext():
    """With depthwise convolutions."""
    import transformers as t

    t.set_seed(0)
    config = t.ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], num_labels=3, image_size=32)
    return t.ConvNextForImageClassification(config)


def laguna():
    """Names of its model match rules of transformers that are meant for other names on disk."""
    import transformers as t

    t.set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    return t.LagunaForCausalLM(t.LagunaConfig(**sizes, **experts, head_dim=8, vocab_size=64))


def double_vit():
    return tiny_vit().double()


def with_ties(model):
    """Few different magnitudes, so that ties lie on every threshold, and some zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_((parameter / parameter.std() * 2).round() / 8)
    return model


NETS = [
    tiny_vit,
    tiny_bert,
    tiny_resnet,
    gpt2,
    llama,
    dinov2,
    mixtral,
    t5,
    timm_resnet,
    convnext,
    double_vit,
]
