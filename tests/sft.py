"""A tiny Llama with a tiny tokenizer, as a pretrained model that is there without the Hub, and a few texts."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = "the a red blue cat dog sees likes finds and then small big old new house tree".split()


def tiny_causal_model(folder: Path, chat_template: str | None = None) -> Path:
    """Save a random Llama and its tokenizer of whole words; the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    tokenizer = tiny_causal_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    set_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes, **special)
    ).save_pretrained(folder)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def tiny_causal_tokenizer():
    """Whole words, split at spaces, and the special tokens of a causal model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def texts(count: int = 32) -> list[str]:
    """Texts of 3 to 12 words."""
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 12))) for _ in range(count)]


def pairs(count: int = 32) -> list[dict[str, str]]:
    """Prompts of two words and completions of 1 to 10 words."""
    words = [text.split() for text in texts(count)]
    return [{"prompt": " ".join(text[:2]), "completion": " " + " ".join(text[2:])} for text in words]


def write_json_lines(path: Path, rows: list[dict]) -> Path:
    """The path of a new file with one row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
