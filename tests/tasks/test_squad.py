"""Exact match and F1 on the cases that the official evaluation is known for, and the nested file format."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_compress.tasks.squad import normalize_answer, read_squad_file, squad_exact_match, squad_f1, squad_scores

text = st.text(st.sampled_from("ab the,. -A1é\t"), max_size=12)


@pytest.mark.parametrize(
    ("given_text", "normal"),
    [
        ("The  Cat, the hat!", "cat hat"),
        ("an apple a day", "apple day"),
        ("theatre", "theatre"),
        ("U.S.", "us"),
        ("10-year", "10year"),
        ("A", ""),
        ("“quotes”", "“quotes”"),  # only ASCII punctuation goes
        (" tab\tand\nline ", "tab and line"),
    ],
)
def test_normalization(given_text, normal):
    assert normalize_answer(given_text) == normal


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("the cat", ["cat"], 1, 1),
        ("cat!", ["The Cat."], 1, 1),
        ("black cat", ["cat"], 0, 2 / 3),
        ("cat cat", ["cat"], 0, 2 / 3),  # a word counts as often as it is shared
        ("dog", ["cat", "a dog"], 1, 1),  # the best of several references
        ("big dog", ["dog house", "big red dog"], 0, 0.8),
        ("", ["cat"], 0, 0),
        ("the", ["a"], 1, 0),  # both are empty: equal, and without a shared word
        ("cat", [], 0, 0),
    ],
)
def test_scores_of_one_question(prediction, references, exact, f1):
    assert squad_exact_match(prediction, references) == exact
    assert squad_f1(prediction, references) == pytest.approx(f1)


def test_no_answer_is_right_where_there_is_none():
    assert squad_f1("", [""], unanswerable=True) == 1
    assert squad_f1("cat", [""], unanswerable=True) == 0
    assert squad_f1("the", ["an"], unanswerable=True) == 1


def test_scores_of_squad_2():
    references = {"1": ["cat"], "2": [], "3": [], "4": ["the"]}
    predictions = {"1": "black cat", "2": "", "3": "dog", "4": ""}
    assert squad_scores(predictions, references, unanswerable=True) == pytest.approx(
        {
            "exact_match": 50,
            "f1": 100 * (2 / 3 + 1 + 0 + 1) / 4,
            "exact_match_answerable": 0,
            "f1_answerable": 200 / 3,
            "exact_match_unanswerable": 200 / 3,
            "f1_unanswerable": 200 / 3,
        }
    )


def test_a_question_without_prediction_counts_zero():
    assert squad_scores({"1": "cat"}, {"1": ["cat"], "2": ["dog"]}) == {"exact_match": 50, "f1": 50}


def test_wrong_ids_are_named():
    with pytest.raises(ValueError, match="first id '7'"):
        squad_scores({"7": "cat"}, {"1": ["cat"]})
    with pytest.raises(ValueError, match="no references"):
        squad_scores({}, {})


@given(text, st.lists(text, min_size=1, max_size=3), st.booleans())
def test_laws(prediction, references, unanswerable):
    f1 = squad_f1(prediction, references, unanswerable)
    assert 0 <= f1 <= 1
    assert f1 >= squad_f1(prediction, references[:1], unanswerable)
    assert squad_f1(prediction, [*references, prediction], True) == 1
    if squad_exact_match(prediction, references) and normalize_answer(prediction):
        assert f1 == 1
    if len(references) == 1:
        assert squad_f1(references[0], [prediction], unanswerable) == pytest.approx(f1)


def nested(**changes):
    question = {"id": "q1", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}], **changes}
    return {"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": "Ada wrote.", "qas": [question]}]}]}


def test_the_nested_format(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(nested()))
    (row,) = read_squad_file(str(path))
    answers = {"text": ["Ada"], "answer_start": [0]}
    assert row == {"id": "q1", "title": "T", "context": "Ada wrote.", "question": "Who?", "answers": answers}
    path.write_text(json.dumps(nested(answers=[], is_impossible=True)))
    assert read_squad_file(str(path))[0]["answers"] == {"text": [], "answer_start": []}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": [{"text": "Ada"}]}, r"data\[0\].paragraphs\[0\].qas\[0\] has no 'answer_start'"),
        ({"question": 3}, "has no 'question'"),
        ({"answers": "Ada"}, "has no 'answers'"),
    ],
)
def test_what_is_missing_in_a_nested_file_is_named(tmp_path, changes, message):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(nested(**changes)))
    with pytest.raises(ValueError, match=message):
        read_squad_file(str(path))


def test_tables_are_read_as_they_are(tmp_path):
    path = tmp_path / "train.jsonl"
    row = {"id": "1", "question": "Who?", "context": "Ada.", "answers": {"text": ["Ada"], "answer_start": [0]}}
    path.write_text(json.dumps(row) + "\n")
    assert read_squad_file(str(path))[0] == row
    path.write_text('{"id": ')
    with pytest.raises(ValueError, match=r"train\.jsonl cannot be read"):
        read_squad_file(str(path))
    with pytest.raises(ValueError, match="unknown kind"):
        read_squad_file(str(tmp_path / "train.xml"))
    with pytest.raises(ValueError, match="there is no file"):
        read_squad_file(str(tmp_path / "gone.json"))
