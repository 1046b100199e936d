"""Text classification: single sentences or pairs, any data set of texts and classes, any model with a tokenizer.

Data come from the Hub, a local folder, or files (CSV, TSV, JSON, JSON lines, parquet). The model gets a new head
unless its own fits the classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, DatasetDict

from .data import check_columns, check_counts, hold_out, load_splits, some, used_splits, with_classes
from .metrics import accuracy, f1, matthews_correlation
from .text_input import check_vocabulary, load_tokenizer, token_limit

DEFAULT_FLAGS: dict[str, Any] = {}
# Names of GLUE and of most other data sets; the first whose columns are all there.
_TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)
# Where neither max_length nor the model sets a lower limit.
_MOST_TOKENS = 512


@dataclass
class TextClassificationArguments:
    """Data and model of a text classification run.

    Args:
        model_name_or_path: a pretrained model, local or on the Hub.
        dataset_name: a data set of the Hub, a local folder, or a file.
        dataset_config_name: of a Hub data set with several.
        train_file: a file to train on, in place of dataset_name.
        eval_file: a file to evaluate on.
        text_column: of the data set; by default the columns of GLUE (sentence1 and sentence2, premise and hypothesis,
            sentence, ...) or text.
        text_pair_column: the second text of a pair; None with text_column: single texts.
        label_column: of the data set; "label" or "labels" by default. Integers and strings become classes.
        validation_share: share of the training data held out, by class, where there is no split to evaluate on.
        data_seed_split: seed of that split, and of the choice of max_train_samples and max_eval_samples.
        eval_split: evaluated on; "validation" or "test" by default, whichever comes first.
        max_train_samples: so many, chosen at random, for a trial run.
        max_eval_samples: so many, chosen at random, for a trial run.
        max_length: tokens of a sample, longer ones are cut; what the model takes, but at most 512, by default.
    """

    model_name_or_path: str = field(metadata={"help": "A pretrained model."})
    dataset_name: str | None = field(default=None, metadata={"help": "A Hub data set, a local folder, or a file."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_file: str | None = field(default=None, metadata={"help": "A file to train on, in place of dataset_name."})
    eval_file: str | None = field(default=None, metadata={"help": "A file to evaluate on."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the texts."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of the second texts of pairs."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels."})
    validation_share: float = field(default=0.1, metadata={"help": "Share held out where there is no eval split."})
    data_seed_split: int = field(default=0, metadata={"help": "Seed of the held-out share and of max_*_samples."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use so many only, chosen at random."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use so many only, chosen at random."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a sample; longer ones are cut."})

    def __post_init__(self) -> None:
        if self.train_file is not None:  # in place of a recipe's: what is not looked at is told nowhere
            self.dataset_name = self.dataset_config_name = None
        if self.text_pair_column is not None and self.text_column is None:
            raise ValueError(
                f"text_pair_column is {self.text_pair_column!r}, but there is no text_column; name the column of the "
                "first texts too"
            )
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must be between 0 and 1, got {self.validation_share}")
        check_counts(max_train_samples=self.max_train_samples, max_eval_samples=self.max_eval_samples)

    @property
    def source(self) -> str:
        """The data set as it was given."""
        return str(self.train_file or self.dataset_name)


def prepare(args: TextClassificationArguments) -> dict[str, Any]:
    """What a `Trainer` takes: model, data sets, data_collator, compute_metrics, processing_class."""
    from transformers import DataCollatorWithPadding

    train, evaluation, text_columns, label_column = _load_data(args)
    classes = train.features[label_column].names
    if len(classes) < 2:
        raise ValueError(f"column {label_column!r} of {args.source} has one class only, {classes}; there must be two")
    model, tokenizer = _pretrained(args.model_name_or_path, classes)
    max_length = _max_length(args, model, tokenizer, len(text_columns))

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = (batch[column] for column in text_columns)
        return {**tokenizer(*texts, truncation=True, max_length=max_length), "labels": batch[label_column]}

    return {
        "model": model,
        "train_dataset": train.map(encode, batched=True, remove_columns=train.column_names),
        "eval_dataset": evaluation.map(encode, batched=True, remove_columns=evaluation.column_names),
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": _metrics(len(classes)),
        "preprocess_logits_for_metrics": _logits,
        "processing_class": tokenizer,
    }


def _load_data(args: TextClassificationArguments) -> tuple[Dataset, Dataset, list[str], str]:
    """The samples to train and to evaluate on, and their columns of texts and labels; labels are classes."""
    seed = args.data_seed_split
    splits = load_splits(args.dataset_name, args.dataset_config_name, args.train_file, args.eval_file)
    used = used_splits(splits, args.source, args.eval_split)
    text_columns, label_column = _columns(args, splits, used)
    train, *others = with_classes(splits, used, label_column, args.source)
    if not others:
        train, *others = hold_out(train, args.validation_share, seed, label_column)
    train, evaluation = some(train, args.max_train_samples, seed), some(others[0], args.max_eval_samples, seed)
    return train, evaluation, text_columns, label_column


def _columns(args: TextClassificationArguments, splits: DatasetDict, used: list[str]) -> tuple[list[str], str]:
    """The columns of texts, one or two, and of labels, which all splits in use have without gaps."""
    there = splits["train"].features
    named = [column for column in (args.text_column, args.text_pair_column) if column is not None]
    texts = named or next((list(names) for names in _TEXT_COLUMNS if there.keys() >= set(names)), [])
    if not texts:
        raise ValueError(
            f"text_column: {args.source} has none of the usual columns of texts "
            f"({', '.join(' and '.join(names) for names in _TEXT_COLUMNS)}); name one of: {', '.join(there)}"
        )
    label_column = args.label_column or next((n for n in ("label", "labels") if n in there), "label")
    options = dict(zip(("text_column", "text_pair_column"), texts, strict=False))
    check_columns(splits, used, args.source, **options, label_column=label_column)
    for option, column in options.items():
        for split in used:
            _check_texts(splits[split], f"{option}: column {column!r} in split {split!r} of {args.source}", column)
    return texts, label_column


def _check_texts(dataset: Dataset, where: str, column: str) -> None:
    """ValueError for a column that holds no texts, or for a row without one."""
    kind = dataset.features[column]
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"{where} holds {kind}, no texts; name another column")
    texts = dataset.select_columns(column).with_format("arrow")[:][column]
    if texts.null_count:
        row = texts.is_null().to_pylist().index(True)
        raise ValueError(f"{where} has {texts.null_count} rows without a text, first row {row}; fill or remove them")


def _pretrained(name: str, classes: list[str]) -> tuple[Any, Any]:
    """A model for these classes, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(name)
    model = AutoModelForSequenceClassification.from_pretrained(
        name,
        id2label=dict(enumerate(classes)),
        label2id={label: i for i, label in enumerate(classes)},
        problem_type="single_label_classification",
        ignore_mismatched_sizes=True,
        dtype=torch.float32,  # master weights
    )
    check_vocabulary(name, tokenizer, model)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _max_length(args: TextClassificationArguments, model: Any, tokenizer: Any, num_texts: int) -> int:
    """How many tokens a sample has at most."""
    most = token_limit(model, tokenizer)
    length = min(most, _MOST_TOKENS) if args.max_length is None else args.max_length
    least = tokenizer.num_special_tokens_to_add(pair=num_texts == 2) + num_texts
    if not least <= length <= most:
        raise ValueError(f"max_length must be from {least} to {most} for {args.model_name_or_path}, got {length}")
    return length


def _metrics(num_classes: int) -> Callable[[Any], dict[str, float]]:
    """F1 is that of class 1 where there are two, and the mean over classes where there are more."""
    average = "binary" if num_classes == 2 else "macro"

    def compute(prediction: Any) -> dict[str, float]:
        predicted, wanted = prediction.predictions.argmax(-1), prediction.label_ids
        return {
            "accuracy": accuracy(predicted, wanted),
            "f1": f1(predicted, wanted, average),
            "matthews_correlation": matthews_correlation(predicted, wanted),
        }

    return compute


def _logits(outputs: Any, labels: Any) -> Any:
    """Of all that a model returns: some give hidden states too, of another length in every batch."""
    return outputs[0] if isinstance(outputs, tuple) else outputs
