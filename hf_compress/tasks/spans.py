"""From the logits of a question answering model to answers: the best spans of all windows of a context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .text_input import token_limit

_BATCH = 2048  # windows, so that pairs of starts and ends fit the cache


@dataclass(frozen=True)
class Answer:
    """An answer to a question.

    Attributes:
        text: as it stands in the context; "" for no answer.
        score: its share of the probability of the spans that were looked at, in [0, 1].
        start: of the first character in the context.
        end: behind the last character.
    """

    text: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class Windows:
    """What is remembered of tokenized questions: the windows of a long context follow each other.

    Attributes:
        example: index of the question of each window, (w,), in ascending order.
        offsets: first and behind-last character of each token in the context, (w, t, 2); -1 elsewhere than in it.
        null: index of the token that stands for no answer, (w,).
    """

    example: np.ndarray
    offsets: np.ndarray
    null: np.ndarray


@dataclass(frozen=True)
class Spans:
    """The best spans of every window: scores, and first and behind-last character, each (w, n); -inf where none is."""

    scores: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    null_scores: np.ndarray


def best_spans(
    start_logits: np.ndarray, end_logits: np.ndarray, windows: Windows, n_best: int = 20, max_answer_length: int = 30
) -> Spans:
    """The `n_best` spans of every window by the sum of their logits, in descending order.

    Args:
        start_logits: (w, t'), t' at most t; what lies beyond was padding.
        end_logits: the same for the last token.
        windows: which tokens belong to the context.
        n_best: so many starts and so many ends are paired.
        max_answer_length: in tokens.

    Raises:
        ValueError: if logits and windows are of different numbers.
    """
    if start_logits.shape != end_logits.shape or len(start_logits) != len(windows.example):
        raise ValueError(
            f"logits of starts {start_logits.shape} and ends {end_logits.shape} do not belong to "
            f"{len(windows.example)} windows: evaluate on the data set that was prepared"
        )
    parts = [
        _spans(
            start_logits[i : i + _BATCH],
            end_logits[i : i + _BATCH],
            windows.offsets[i : i + _BATCH],
            windows.null[i : i + _BATCH],
            n_best,
            max_answer_length,
        )
        for i in range(0, len(start_logits), _BATCH)
    ]
    return Spans(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _spans(
    starts: np.ndarray, ends: np.ndarray, offsets: np.ndarray, null: np.ndarray, n_best: int, max_length: int
) -> tuple[np.ndarray, ...]:
    size = min(starts.shape[1], offsets.shape[1])
    outside = offsets[:, :size, 0] < 0
    row = np.arange(len(starts))[:, None]
    null_scores = starts[row[:, 0], null] + ends[row[:, 0], null]
    starts, ends = (np.where(outside, -np.inf, x[:, :size]).astype(np.float32) for x in (starts, ends))
    count = min(n_best, size)
    first, last = (np.argpartition(-x, count - 1, axis=1)[:, :count] for x in (starts, ends))
    length = last[:, None, :] - first[:, :, None]
    pairs = starts[row, first][:, :, None] + ends[row, last][:, None, :]
    pairs = np.where((length >= 0) & (length < max_length), pairs, -np.inf).reshape(len(starts), -1)
    best = np.argpartition(-pairs, min(n_best, pairs.shape[1]) - 1, axis=1)[:, :n_best]
    best = best[row, np.argsort(-pairs[row, best], axis=1, kind="stable")]
    chosen = first[row, best // count], last[row, best % count]
    return pairs[row, best], offsets[row, chosen[0], 0], offsets[row, chosen[1], 1], null_scores


def answers(
    spans: Spans,
    windows: Windows,
    contexts: Sequence[str],
    n_best: int = 1,
    unanswerable: bool = False,
    null_threshold: float = 0.0,
) -> list[list[Answer]]:
    """The `n_best` answers to every question, the best first.

    With `unanswerable`, no answer comes first where its score exceeds that of the best span by more than
    `null_threshold`; its score is the smallest of all windows (Devlin et al., arXiv:1810.04805).
    """
    borders = np.searchsorted(windows.example, np.arange(len(contexts) + 1))
    found = []
    for i, context in enumerate(contexts):
        here = slice(borders[i], borders[i + 1])
        scores = spans.scores[here].ravel()
        order = np.argsort(-scores, kind="stable")
        order = order[np.isfinite(scores[order])]
        starts, ends, null = spans.starts[here].ravel(), spans.ends[here].ravel(), spans.null_scores[here].min()
        chosen = _distinct(order, starts, ends, max(n_best, 1))
        listed = [(float(scores[j]), int(starts[j]), int(ends[j])) for j in chosen]
        if unanswerable or not listed:
            is_null = not listed or null - listed[0][0] > null_threshold
            listed.insert(0 if is_null else len(listed), (float(null), 0, 0))
        total = np.logaddexp.reduce([*scores[order], *([null] if unanswerable or not order.size else [])])
        found.append([Answer(context[a:b], float(np.exp(s - total)), a, b) for s, a, b in listed[:n_best]])
    return found


def _distinct(order: np.ndarray, starts: np.ndarray, ends: np.ndarray, count: int) -> list[int]:
    """The first so many in an order that are not the same span; windows overlap."""
    seen: dict[tuple[int, int], int] = {}
    for j in order:
        seen.setdefault((int(starts[j]), int(ends[j])), int(j))
        if len(seen) == count:
            break
    return list(seen.values())


def tokenize(
    tokenizer: Any, questions: Sequence[str], contexts: Sequence[str], max_length: int, stride: int
) -> tuple[dict[str, list[Any]], Windows]:
    """Token ids of all windows as a model takes them, and what is needed to find answers in them.

    Args:
        tokenizer: one with offsets.
        questions: one for each context.
        contexts: a context that does not fit `max_length` beside its question becomes several windows.
        max_length: tokens of a window.
        stride: tokens that neighbouring windows share.

    Raises:
        ValueError: for a tokenizer without offsets, or a question that leaves no room for its context.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no offsets of tokens in the text, which answers are cut out by; take a "
            "model whose tokenizer is a fast one (a tokenizer.json)"
        )
    lengths = [len(ids) for ids in tokenizer(list(questions), add_special_tokens=False)["input_ids"]]
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True) - stride
    if lengths and (longest := max(lengths)) >= room:
        raise ValueError(
            f"question {lengths.index(longest)} has {longest} tokens, which leaves no room for its context in windows "
            f"of {max_length} with a stride of {stride}; raise max_length, lower doc_stride or shorten the question"
        )
    encoded = tokenizer(
        list(questions),
        list(contexts),
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    example = np.array(encoded.pop("overflow_to_sample_mapping"))
    given = encoded.pop("offset_mapping")
    size = max(map(len, given), default=0)
    offsets = np.full((len(given), size, 2), -1, np.int32)
    null = np.zeros(len(given), np.int64)
    for i, (pairs, ids) in enumerate(zip(given, encoded["input_ids"], strict=True)):
        is_context = np.array([s == 1 for s in encoded.sequence_ids(i)])
        offsets[i, : len(pairs)][is_context] = np.array(pairs, np.int32)[is_context]
        if tokenizer.cls_token_id in ids:
            null[i] = ids.index(tokenizer.cls_token_id)
    return dict(encoded), Windows(example, offsets, null)


def answer(
    model: nn.Module,
    tokenizer: Any,
    question: str | Sequence[str],
    context: str | Sequence[str],
    n_best: int = 1,
    max_length: int = 384,
    doc_stride: int = 128,
    max_answer_length: int = 30,
    unanswerable: bool = False,
    batch_size: int = 16,
) -> Any:
    """Answer a question from a context, in place of the question answering pipeline that transformers 5 removed.

    ```python
    hfc.answer(model, tokenizer, "Who wrote it?", "It was written by Ada Lovelace.").text
    ```

    Args:
        model: of an AutoModelForQuestionAnswering; it is left in the mode that it is in after running in eval mode.
        tokenizer: its tokenizer, a fast one.
        question: one, or several.
        context: one for each question, of any length, or one for all of them.
        n_best: how many answers.
        max_length: tokens of a window; at most what the model takes.
        doc_stride: tokens that neighbouring windows of a long context share.
        max_answer_length: in tokens.
        unanswerable: allow "" as an answer, for models that were trained with such questions.
        batch_size: windows at a time.

    Returns:
        An `Answer`, a list of them with n_best above 1, and a list of those for several questions.

    Raises:
        ValueError: for an empty question or context, different numbers of them, or what `tokenize` refuses.
    """
    questions = [question] if isinstance(question, str) else list(question)
    contexts = [context] * len(questions) if isinstance(context, str) else list(context)
    if len(questions) != len(contexts):
        raise ValueError(f"{len(questions)} questions and {len(contexts)} contexts; give one context, or one for each")
    for i, pair in enumerate(zip(questions, contexts, strict=True)):
        if not all(text.strip() for text in pair):
            raise ValueError(f"question {i} or its context is empty")
    length = min(max_length, token_limit(model, tokenizer))
    encoded, windows = tokenize(tokenizer, questions, contexts, length, doc_stride)
    start, end = _logits(model, tokenizer, encoded, batch_size)
    spans = best_spans(start, end, windows, max(20, n_best), max_answer_length)
    found = answers(spans, windows, contexts, n_best, unanswerable)
    shaped = [listed[0] if n_best == 1 else listed for listed in found]
    return shaped[0] if isinstance(question, str) else shaped


@torch.no_grad()
def _logits(model: nn.Module, tokenizer: Any, encoded: dict[str, list[Any]], size: int) -> tuple[np.ndarray, ...]:
    """Logits of starts and of ends for all windows, `size` at a time, (windows, tokens) each."""
    was_training, device = model.training, next(model.parameters()).device
    longest = max(map(len, encoded["input_ids"]))
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    model.eval()
    try:
        for i in range(0, len(encoded["input_ids"]), size):
            rows = {k: v[i : i + size] for k, v in encoded.items()}
            options = {"padding": "max_length", "max_length": longest, "padding_side": "right"}
            output = model(**tokenizer.pad(rows, **options, return_tensors="pt").to(device))
            for listed, logits in zip(found, (output.start_logits, output.end_logits), strict=True):
                listed.append(logits.float().cpu().numpy())
    finally:
        model.train(was_training)
    return tuple(map(np.concatenate, found))


def positions(windows: Windows, answer_of: Sequence[tuple[int, int] | None]) -> Mapping[str, list[int]]:
    """First and last token of the answer in every window; the token of no answer where it does not lie inside.

    Args:
        windows: of all questions.
        answer_of: first and behind-last character of the answer of each question, None without one.
    """
    starts, ends = windows.null.copy(), windows.null.copy()
    for i, example in enumerate(windows.example):
        span = answer_of[example]
        if span is None:
            continue
        begin, end = windows.offsets[i, :, 0], windows.offsets[i, :, 1]
        inside = np.flatnonzero(begin >= 0)
        if not inside.size or begin[inside[0]] > span[0] or end[inside[-1]] < span[1]:
            continue
        starts[i] = inside[np.searchsorted(begin[inside], span[0], side="right") - 1]
        ends[i] = inside[np.searchsorted(end[inside], span[1], side="left")]
    return {"start_positions": starts.tolist(), "end_positions": ends.tolist()}
