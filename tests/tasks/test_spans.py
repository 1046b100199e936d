"""Windows, spans and answers against brute force, and `answer` with a model whose answers are known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hf_compress as hfc
from hf_compress.tasks.spans import Windows, answers, best_spans, positions, tokenize
from tests.text import tiny_tokenizer

CONTEXT = "It was great and very dull in the film of the year. " * 6 + "Ada wrote it in 1843, not Bob."


def windows_of(lengths):
    """Windows with the context behind two tokens of question; token i of a context covers character i."""
    size = max(lengths) + 2
    offsets = np.full((len(lengths), size, 2), -1, np.int32)
    for row, length in zip(offsets, lengths, strict=True):
        row[2 : 2 + length] = np.arange(length)[:, None] + (0, 1)
    return Windows(np.arange(len(lengths)), offsets, np.zeros(len(lengths), np.int64))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_the_best_span_is_that_of_brute_force(lengths, longest, seed):
    windows = windows_of(lengths)
    rng = np.random.default_rng(seed)
    start, end = rng.permutation(2 * windows.offsets.shape[1] * len(lengths)).reshape(2, len(lengths), -1) / 4.0
    spans = best_spans(start, end, windows, n_best=20, max_answer_length=longest)
    for i, length in enumerate(lengths):
        every = [
            (start[i, 2 + a] + end[i, 2 + b], a, b + 1)
            for a in range(length)
            for b in range(a, min(length, a + longest))
        ]
        every.sort(key=lambda row: -row[0])
        scores = spans.scores[i][np.isfinite(spans.scores[i])]
        assert scores.tolist() == [row[0] for row in every[:20]]
        assert (spans.scores[i, 0], spans.starts[i, 0], spans.ends[i, 0]) in every[:1] or every[0][0] == every[1][0]
        assert spans.null_scores[i] == start[i, 0] + end[i, 0]


def test_padding_beyond_the_logits_changes_nothing():
    windows = windows_of([3, 8])
    start, end = np.random.default_rng(0).normal(size=(2, 2, 10))
    start[0, 5:] = end[0, 5:] = -100  # what the Trainer fills up with
    wide = [np.pad(x, ((0, 0), (0, 4)), constant_values=-100) for x in (start, end)]
    for a, b in zip(
        vars(best_spans(start, end, windows)).values(), vars(best_spans(*wide, windows)).values(), strict=True
    ):
        assert np.array_equal(a, b)


def test_logits_of_another_data_set_are_refused():
    with pytest.raises(ValueError, match="do not belong to 2 windows"):
        best_spans(np.zeros((3, 4)), np.zeros((3, 4)), windows_of([2, 2]))


def test_no_answer_wins_by_its_smallest_score():
    windows = Windows(np.array([0, 0]), windows_of([3, 3]).offsets, np.zeros(2, np.int64))
    start, end = np.zeros((2, 2, 5))
    start[:, 0] = 5, 2  # the second window thinks less of it: 2 counts
    start[1, 3] = 1.5
    spans = best_spans(start, end, windows)
    for threshold, text in ((0.0, ""), (0.4, ""), (0.6, "b")):
        ((first, *_),) = answers(spans, windows, ["abc"], 1, unanswerable=True, null_threshold=threshold)
        assert first.text == text
    ((only,),) = answers(spans, windows, ["abc"], 1)
    assert (only.text, only.start, only.end) == ("b", 1, 2)


@given(st.integers(0, len(CONTEXT.split()) - 1), st.integers(1, 4), st.integers(24, 80))
def test_positions_point_at_the_answer_in_every_window_that_holds_it(first, count, size):
    tokenizer = tiny_tokenizer()
    words = CONTEXT.split()
    begin = len(" ".join(words[:first])) + (first > 0)
    text = " ".join(words[first : first + count])
    encoded, windows = tokenize(tokenizer, ["who was it"], [CONTEXT], size, 12)
    found = positions(windows, [(begin, begin + len(text))])
    held = 0
    for i, (a, b) in enumerate(zip(found["start_positions"], found["end_positions"], strict=True)):
        lies_inside = (windows.offsets[i] == begin).any() and (windows.offsets[i, :, 1] == begin + len(text)).any()
        assert lies_inside == (a != windows.null[i])
        if lies_inside:
            held += 1
            assert CONTEXT[windows.offsets[i, a, 0] : windows.offsets[i, b, 1]] == text
            shown = tokenizer.decode(encoded["input_ids"][i][a : b + 1]).replace(" ", "")
            assert shown == text.lower().replace(" ", "")
    assert held or len(tokenizer.tokenize(text)) > 12


class Points(nn.Module):
    """A model whose answer begins at one token and ends at another."""

    def __init__(self, tokenizer, begin, end):
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=64)
        self.weight = nn.Parameter(torch.zeros(1))
        self.ids = tokenizer.convert_tokens_to_ids([begin, end])

    def forward(self, input_ids, attention_mask, token_type_ids):
        assert not self.training
        start, end = (9.0 * (input_ids == i) for i in self.ids)
        return SimpleNamespace(start_logits=start, end_logits=end)


def test_answer_looks_through_all_windows():
    tokenizer = tiny_tokenizer()
    model = Points(tokenizer, "1", "##3")
    found = hfc.answer(model, tokenizer, "When was it?", CONTEXT, max_length=64, doc_stride=16)
    assert (found.text, CONTEXT[found.start : found.end]) == ("1843", "1843")
    assert 0.9 < found.score <= 1
    assert model.training
    texts = ["It was in 1843.", CONTEXT]
    both = hfc.answer(model, tokenizer, ["When?", "Which year?"], texts, max_length=64, doc_stride=16, batch_size=1)
    assert [a.text for a in both] == ["1843", "1843"]
    several = hfc.answer(model, tokenizer, "When?", "It was in 1843.", n_best=3, doc_stride=16)
    assert several[0].text == "1843"
    assert len({a.text for a in several}) == 3
    assert [a.score for a in several] == sorted((a.score for a in several), reverse=True)


def test_no_answer_is_one_only_where_it_is_allowed():
    tokenizer = tiny_tokenizer()
    model = Points(tokenizer, "[CLS]", "[CLS]")
    options = {"question": "When?", "context": "It was in 1843.", "doc_stride": 16}
    assert hfc.answer(model, tokenizer, **options, unanswerable=True).text == ""
    assert hfc.answer(model, tokenizer, **options).text != ""


def test_a_tokenizer_that_fills_up_on_the_left_finds_the_same_answers():
    """Windows of several lengths in one batch: what is filled up would shift the tokens of the shorter one."""
    tokenizer = tiny_tokenizer()
    model, texts = (
        Points(tokenizer, "1", "##3"),
        ["It was in 1843.", "It was not in the year of the film, but in 1843."],
    )
    right = hfc.answer(model, tokenizer, ["When?", "When?"], texts, doc_stride=8)
    tokenizer.padding_side = "left"
    assert hfc.answer(model, tokenizer, ["When?", "When?"], texts, doc_stride=8) == right
    assert [a.text for a in right] == ["1843", "1843"]


@pytest.mark.parametrize(
    ("question", "context", "message"),
    [
        ("", "Ada.", "question 0 or its context is empty"),
        (["Who?", "When?"], ["Ada.", " "], "question 1 or its context is empty"),
        (["Who?", "When?"], ["Ada."], "2 questions and 1 contexts"),
        ("who " * 50, "Ada.", "question 0 has 50 tokens, which leaves no room"),
    ],
)
def test_mistakes_are_named(question, context, message):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=message):
        hfc.answer(Points(tokenizer, "1", "3"), tokenizer, question, context, doc_stride=16)


def test_a_tokenizer_without_offsets_is_refused():
    slow = SimpleNamespace(is_fast=False, model_max_length=512)
    with pytest.raises(ValueError, match="gives no offsets of tokens"):
        hfc.answer(Points(tiny_tokenizer(), "1", "3"), slow, "Who?", "Ada.")
