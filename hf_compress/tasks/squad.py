"""Exact match and F1 of answers as the official evaluation of SQuAD computes them, and the nested format of its files.

Source: the evaluation scripts v1.1 and v2.0 of SQuAD (Rajpurkar et al., arXiv:1606.05250 and arXiv:1806.03822).
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value

from .data import read_file

FEATURES = Features(
    {
        "id": Value("string"),
        "title": Value("string"),
        "context": Value("string"),
        "question": Value("string"),
        "answers": {"text": List(Value("string")), "answer_start": List(Value("int32"))},
    }
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals one of the references after `normalize_answer`, 0 otherwise."""
    answer = normalize_answer(prediction)
    return float(any(answer == normalize_answer(reference) for reference in references))


def squad_f1(prediction: str, references: Sequence[str], unanswerable: bool = False) -> float:
    """The largest F1 of words that the prediction shares with one of the references, in [0, 1].

    Args:
        prediction: the answer.
        references: the right answers.
        unanswerable: as in SQuAD 2.0: 1 where both have no words, in place of 0.
    """
    words = normalize_answer(prediction).split()
    return max((_word_f1(words, normalize_answer(r).split(), unanswerable) for r in references), default=0.0)


def _word_f1(predicted: list[str], wanted: list[str], unanswerable: bool) -> float:
    if unanswerable and not (predicted and wanted):
        return float(predicted == wanted)
    shared = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * shared / (len(predicted) + len(wanted)) if shared else 0.0


def squad_scores(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], unanswerable: bool = False
) -> dict[str, float]:
    """Exact match and F1 over all questions, in points; a question without prediction counts 0.

    Args:
        predictions: id to answer.
        references: id to the right answers; none says that there is no answer.
        unanswerable: score as SQuAD 2.0, and beside for the questions with and without answer.

    Returns:
        "f1" and "exact_match", each also with "_answerable" and "_unanswerable" behind it where those are asked for.

    Raises:
        ValueError: without references, or for a prediction whose id has none.
    """
    if not references:
        raise ValueError("there are no references to score against")
    strange = [name for name in predictions if name not in references]
    if strange:
        raise ValueError(f"{len(strange)} predictions belong to no reference, first id {strange[0]!r}")
    rows: dict[str, list[tuple[float, float]]] = {"answerable": [], "unanswerable": []}
    for name, answers in references.items():
        # SQuAD 2.0 takes an answer of nothing but articles and punctuation for none; without any, "" is right.
        right = [a for a in answers if normalize_answer(a)] if unanswerable else list(answers)
        kind = "answerable" if right else "unanswerable"
        if name not in predictions:
            rows[kind].append((0.0, 0.0))
            continue
        wanted = right or [""]
        answer = predictions[name]
        rows[kind].append((squad_exact_match(answer, wanted), squad_f1(answer, wanted, unanswerable)))
    scores = _in_points([*rows["answerable"], *rows["unanswerable"]], "")
    if unanswerable:
        for kind, found in rows.items():
            scores |= _in_points(found, f"_{kind}") if found else {}
    return scores


def _in_points(rows: list[tuple[float, float]], suffix: str) -> dict[str, float]:
    exact, f1 = (100 * sum(column) / len(rows) for column in zip(*rows, strict=True))
    return {f"f1{suffix}": f1, f"exact_match{suffix}": exact}  # the first is the one that a table shows


def read_squad_file(path: str) -> Dataset:
    """The questions of a file: JSON in the nested format of SQuAD, or a table of any kind that `read_file` takes.

    Raises:
        ValueError: if it cannot be read; for the nested format with the place of what is missing.
    """
    if Path(path).suffix.lower() != ".json" or not Path(path).is_file():
        return read_file(path)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return read_file(path)  # JSON lines, or an error that names the line
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        return read_file(path)
    return Dataset.from_list(_questions(content["data"], path), features=FEATURES)


def _questions(articles: list[Any], path: str) -> list[dict[str, Any]]:
    rows = []
    for i, article in enumerate(articles):
        place = f"{path}: data[{i}]"
        for j, paragraph in enumerate(_field(article, "paragraphs", list, place)):
            at = f"{place}.paragraphs[{j}]"
            context = _field(paragraph, "context", str, at)
            for k, question in enumerate(_field(paragraph, "qas", list, at)):
                where = f"{at}.qas[{k}]"
                answers = _field(question, "answers", list, where) if "answers" in question else []
                rows.append(
                    {
                        "id": str(_field(question, "id", (str, int), where)),
                        "title": article.get("title", ""),
                        "context": context,
                        "question": _field(question, "question", str, where),
                        "answers": {
                            "text": [_field(a, "text", str, where) for a in answers],
                            "answer_start": [_field(a, "answer_start", int, where) for a in answers],
                        },
                    }
                )
    return rows


def _field(content: Any, name: str, kind: Any, place: str) -> Any:
    value = content.get(name) if isinstance(content, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"{place} has no {name!r} of the kind that SQuAD's format asks for, got {value!r}")
    return value
