"""A tiny BERT with a tiny tokenizer, as a pretrained model that is there without the Hub."""

from __future__ import annotations

import string
from pathlib import Path

WORDS = "the a of and in is was it not very good bad great dull film question answer who what where when".split()


def tiny_text_model(folder: Path, task: str) -> Path:
    """Save a random BERT for "text-classification" or "question-answering", and its tokenizer; the folder."""
    from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification, set_seed

    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes, **dropout)
    kind = {"text-classification": BertForSequenceClassification, "question-answering": BertForQuestionAnswering}
    set_seed(0)
    kind[task](config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer():
    """WordPiece over a few words, letters, digits and punctuation: any English text, lower-cased, with offsets."""
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inside = [*string.ascii_lowercase, *string.digits]
    pieces = [*special, *inside, *string.punctuation, *WORDS, *(f"##{piece}" for piece in [*inside, "ing", "ed"])]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return BertTokenizer(vocab=vocabulary, model_max_length=512)
