"""Small checkpoints of stock architectures, and what a loaded model is compared with."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from safetensors.torch import save_file

import hf_compress as hfc
from tests.conftest import tiny_bert, tiny_vit

TIMM = "TimmWrapperForImageClassification"
TEXT = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def timm():
    config = t.TimmWrapperConfig(architecture="resnet10t", num_labels=3, model_args={}, architectures=[TIMM])
    return t.TimmWrapperForImageClassification(config)


def gpt2():
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return t.GPT2LMHeadModel(t.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def nomic():
    """Query, key and value lie in one tensor on disk."""
    return t.NomicBertForMaskedLM(t.NomicBertConfig(**TEXT))


def t5():
    """In half precision `wo` stays in float32."""
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return t.T5ForConditionalGeneration(t.T5Config(**sizes, decoder_start_token_id=0))


MODELS = {"bert": tiny_bert, "vit": tiny_vit, "timm": timm, "gpt2": gpt2, "nomic": nomic, "t5": t5}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder with one checkpoint for each of MODELS, and its name a folder name."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, make in MODELS.items():
        t.set_seed(0)
        model = make()
        model.save_pretrained(folder / name)
        if name == "timm":  # the names of timm's own checkpoints
            save_file(model.timm_model.state_dict(), folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


def class_of(folder):
    return getattr(t, t.AutoConfig.from_pretrained(folder).architectures[0])


def load(folder, **options):
    return class_of(folder).from_pretrained(folder, **options)


def slide(folder, pattern, include=None, exclude=None, **options):
    """Loaded with the slider."""
    return load(folder, quantization_config=hfc.HfCompressConfig(pattern, include, exclude), **options)


def compressed(folder, pattern, dtype=torch.float32, **globs):
    """Loaded in `dtype`, which is that of the file, and compressed then."""
    model = load(folder, dtype=dtype)
    hfc.compress(model, pattern, **globs)
    return model


def bits(model):
    """Every tensor of a model by name: its type and its bytes."""
    return {
        n: (v.dtype, v.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for n, v in model.state_dict().items()
    }


def zeros(model):
    return {name: target.parameter == 0 for name, target in hfc.find_targets(model).items()}


def equal_zeros(a, b):
    return all(torch.equal(x, y) for x, y in zip(zeros(a).values(), zeros(b).values(), strict=True))


def inputs_of(model):
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        size = 64 if hasattr(model, "timm_model") else 8
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator).to(model.dtype)}
    ids = torch.randint(3, 64, (2, 6), generator=generator)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


@torch.no_grad()
def logits_of(model):
    return model.eval()(**inputs_of(model)).logits


def same_logits(a, b):
    """Of models of equal weights, bit by bit; kernels sum in an order that depends on where they lie in memory."""
    a, b = logits_of(a), logits_of(b)
    return (a - b).abs().max() <= 1e-5 * a.abs().max()
