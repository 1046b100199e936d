"""Extractive question answering: SQuAD, SQuAD 2.0 and data of their form, any encoder with a span head.

Data come from the Hub, a folder, or files: tables (parquet, JSON, CSV) with the columns of SQuAD, or JSON in its nested
format. A context that does not fit is cut into windows that overlap; the answer is the best span of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from .data import check_counts, load_splits, some, used_splits
from .spans import Windows, answers, best_spans, positions, tokenize
from .squad import read_squad_file, squad_scores
from .text_input import check_vocabulary, load_tokenizer, token_limit

DEFAULT_FLAGS: dict[str, Any] = {}
_COLUMNS = ("id", "question", "context", "answers")


@dataclass
class QuestionAnsweringArguments:
    """Data and model of a question answering run.

    Args:
        model_name_or_path: a pretrained encoder, local or on the Hub; it gets a new head unless it has one.
        dataset_name: a data set of the Hub, a local folder, or a file.
        dataset_config_name: of a Hub data set with several.
        train_file: instead: a table with the columns of SQuAD, or JSON in its nested format.
        eval_file: questions to evaluate on, of the same kinds.
        eval_split: evaluated on; "validation" or "test" by default, whichever comes first.
        validation_share: share of the contexts held out, where there is no split to evaluate on.
        data_seed_split: seed of that share, and of the choice of max_train_samples and max_eval_samples.
        max_train_samples: so many questions, chosen at random, for a trial run.
        max_eval_samples: so many questions, chosen at random, for a trial run.
        max_length: tokens of a window, question and context together.
        doc_stride: tokens that neighbouring windows of a long context share.
        n_best: so many starts and ends of each window are paired.
        max_answer_length: in tokens.
        unanswerable: whether "" is an answer, as in SQuAD 2.0; by default where the training data have such questions.
        null_threshold: by how much no answer must exceed the best span to be chosen.
    """

    model_name_or_path: str = field(metadata={"help": "A pretrained encoder."})
    dataset_name: str | None = field(default=None, metadata={"help": "A Hub data set, a local folder, or a file."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_file: str | None = field(
        default=None, metadata={"help": "A file of questions instead, nested JSON or table."}
    )
    eval_file: str | None = field(default=None, metadata={"help": "A file of questions to evaluate on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    validation_share: float = field(default=0.1, metadata={"help": "Share held out where there is no eval split."})
    data_seed_split: int = field(default=0, metadata={"help": "Seed of the held-out share and of max_*_samples."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use so many only, chosen at random."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use so many only, chosen at random."})
    max_length: int = field(default=384, metadata={"help": "Tokens of a window, question and context together."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that neighbouring windows share."})
    n_best: int = field(default=20, metadata={"help": "So many starts and ends of each window are paired."})
    max_answer_length: int = field(default=30, metadata={"help": "In tokens."})
    unanswerable: bool | None = field(default=None, metadata={"help": "Whether no answer is one, as in SQuAD 2.0."})
    null_threshold: float = field(default=0.0, metadata={"help": "By how much no answer must exceed the best span."})

    def __post_init__(self) -> None:
        if self.train_file is not None:  # in place of a recipe's: what is not looked at is told nowhere
            self.dataset_name = self.dataset_config_name = None
        check_counts(max_train_samples=self.max_train_samples, max_eval_samples=self.max_eval_samples)
        check_counts(n_best=self.n_best, max_answer_length=self.max_answer_length)
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must be between 0 and 1, got {self.validation_share}")
        if not 0 <= self.doc_stride < self.max_length:
            raise ValueError(
                f"doc_stride must be at least 0 and below max_length, got {self.doc_stride} and {self.max_length}"
            )


def prepare(args: QuestionAnsweringArguments) -> dict[str, Any]:
    """What a `Trainer` takes: model, data sets, data_collator, compute_metrics, processing_class.

    `compute_metrics` knows the windows of `eval_dataset`, so that it works in every trainer, on that data set whole.
    """
    from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding

    train, evaluation = _load_data(args)
    tokenizer = load_tokenizer(args.model_name_or_path, padding_side="right")  # positions count from the left
    model = AutoModelForQuestionAnswering.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    check_vocabulary(args.model_name_or_path, tokenizer, model)
    limit = token_limit(model, tokenizer)
    if args.max_length > limit:
        raise ValueError(f"max_length is {args.max_length}, but {args.model_name_or_path} takes at most {limit} tokens")
    unanswerable = args.unanswerable
    if unanswerable is None:
        unanswerable = any(not a["text"] for a in train["answers"])
    train_features, _ = features(train, tokenizer, args, "training")
    eval_features, windows = features(evaluation, tokenizer, args, "evaluation")
    return {
        "model": model,
        "train_dataset": train_features,
        "eval_dataset": eval_features,
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": scorer(evaluation, windows, eval_features, args, unanswerable),
        "preprocess_logits_for_metrics": lambda logits, _: logits[:2],  # some models give hidden states too
        "processing_class": tokenizer,
    }


def features(
    questions: Dataset, tokenizer: Any, args: QuestionAnsweringArguments, what: str
) -> tuple[Dataset, Windows]:
    """Windows as a model takes them, with the positions of answers, and what is needed to find answers in them.

    Raises:
        ValueError: naming the row of an empty text, or of an answer that does not stand where it should.
    """
    spans = [_answer_span(row, i, what) for i, row in enumerate(questions)]
    asked = [question.lstrip() for question in questions["question"]]
    encoded, windows = tokenize(tokenizer, asked, list(questions["context"]), args.max_length, args.doc_stride)
    return Dataset.from_dict({**encoded, **positions(windows, spans)}), windows


def scorer(
    questions: Dataset, windows: Windows, features: Dataset, args: QuestionAnsweringArguments, unanswerable: bool
) -> Callable[[Any], dict[str, float]]:
    """`compute_metrics` of a `Trainer`: exact match and F1 of the answers to these questions, in points.

    It raises ValueError where predictions come in another order than that of the windows (`features`).
    """
    names, contexts = list(questions["id"]), list(questions["context"])
    labels = np.array([features["start_positions"], features["end_positions"]])
    references = dict(zip(names, (a["text"] for a in questions["answers"]), strict=True))

    def compute_metrics(prediction: Any) -> dict[str, float]:
        if prediction.label_ids is not None and not np.array_equal(np.asarray(prediction.label_ids), labels):
            raise ValueError(
                "the predictions do not belong to the evaluation data, window by window: transformers' Trainer mixes "
                "them with train_sampling_strategy='group_by_length', and other data sets have other windows; take a "
                "trainer of hf_compress, or another strategy, and the eval_dataset that was prepared"
            )
        start, end = (np.asarray(logits) for logits in prediction.predictions[:2])
        spans = best_spans(start, end, windows, args.n_best, args.max_answer_length)
        found = answers(spans, windows, contexts, 1, unanswerable, args.null_threshold)
        predictions = {name: listed[0].text for name, listed in zip(names, found, strict=True)}
        return squad_scores(predictions, references, unanswerable)

    return compute_metrics


def _load_data(args: QuestionAnsweringArguments) -> tuple[Dataset, Dataset]:
    """The questions to train and to evaluate on, with the columns of SQuAD."""
    source = str(args.train_file or args.dataset_name)
    splits = load_splits(
        args.dataset_name, args.dataset_config_name, args.train_file, args.eval_file, read=read_squad_file
    )
    used = used_splits(splits, source, args.eval_split)
    for split in used:
        _check_columns(splits[split], split, source)
    seed = args.data_seed_split
    train = splits["train"]
    if len(used) > 1:
        evaluation = splits[used[1]]
    else:
        train, evaluation = _hold_out(train, args.validation_share, seed)
    train, evaluation = some(train, args.max_train_samples, seed), some(evaluation, args.max_eval_samples, seed)
    ids = evaluation["id"]
    if len(set(ids)) < len(ids):
        twice = next(name for i, name in enumerate(ids) if name in ids[:i])
        raise ValueError(f"{source}: two questions to evaluate on have the id {twice!r}; ids must differ")
    return train, evaluation


def _check_columns(dataset: Dataset, split: str, source: str) -> None:
    for column in _COLUMNS:
        if column not in dataset.features:
            raise ValueError(
                f"no column {column!r} in split {split!r} of {source}; question answering takes {', '.join(_COLUMNS)} "
                f"as in SQuAD, there are: {', '.join(dataset.features)}"
            )
    fields = dataset.features["answers"]
    if not isinstance(fields, Mapping) or not {"text", "answer_start"} <= set(fields):
        raise ValueError(
            f"column 'answers' in split {split!r} of {source} holds {fields}; it must hold lists 'text' and "
            "'answer_start', as in SQuAD"
        )
    if not len(dataset):
        raise ValueError(f"split {split!r} of {source} has no questions")


def _hold_out(train: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Questions of other contexts than the training's, so that no answer is known from there."""
    contexts = sorted(set(train["context"]))
    order = np.random.default_rng(seed).permutation(len(contexts))
    held_out = {contexts[i] for i in order[: max(1, round(share * len(contexts)))]}
    if len(contexts) == 1:
        raise ValueError("all questions have one context, of which no share can be held out; give an eval_file")
    is_out = np.array([context in held_out for context in train["context"]])
    return train.select(np.flatnonzero(~is_out)), train.select(np.flatnonzero(is_out))


def _answer_span(row: Mapping[str, Any], index: int, what: str) -> tuple[int, int] | None:
    """First and behind-last character of the first answer, None where there is none."""
    place = f"question {index} of the {what} data (id {row['id']!r})"
    for name in ("question", "context"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"{place} has an empty {name}; remove it")
    texts: Sequence[str] = row["answers"]["text"]
    starts: Sequence[int] = row["answers"]["answer_start"]
    if len(texts) != len(starts):
        raise ValueError(f"{place} has {len(texts)} answers and {len(starts)} of their starts; give one for each")
    if not texts:
        return None
    start, text = starts[0], texts[0]
    if not text or row["context"][start : start + len(text)] != text or start < 0:
        raise ValueError(
            f"{place}: its answer {text!r} does not stand at character {start} of its context, where "
            f"{row['context'][max(start, 0) : max(start, 0) + max(len(text), 1)]!r} stands; correct or remove it"
        )
    return start, start + len(text)
