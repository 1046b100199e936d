"""Tokenizers of models that read texts, and how they fit the model."""

from __future__ import annotations

from typing import Any

from torch import nn


def load_tokenizer(name: str, **options: Any) -> Any:
    """The tokenizer of a model, which can fill up batches.

    Args:
        name: of the model, local or on the Hub.
        **options: of `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: if there is none, or none with a token to fill up with.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the tokenizer of {name} cannot be loaded: {error}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without one
        raise ValueError(f"{name} has no tokenizer; save one there: tokenizer.save_pretrained({name!r})")
    if tokenizer.pad_token is None:  # models that were made to write texts
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {name} has no pad_token to fill batches with; set one and save it")
    return tokenizer


def check_vocabulary(name: str, tokenizer: Any, model: Any) -> None:
    """ValueError where a tokenizer has tokens that its model does not know."""
    known = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > known:
        raise ValueError(f"{name}: the tokenizer has {len(tokenizer)} tokens, the model {known}; give a folder of both")


def token_limit(model: nn.Module, tokenizer: Any) -> int:
    """How many tokens a model takes; a tokenizer that knows no limit has a very large one."""
    of_model = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(limit for limit in (of_model, tokenizer.model_max_length) if limit is not None)
