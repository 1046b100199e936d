"""Metrics: what scikit-learn says of the same arrays, and the same through the library `evaluate`, without the Hub."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from hf_compress.tasks.metrics import accuracy, evaluate_module, f1, matthews_correlation


def pairs(classes):
    """Predictions and references of one length."""
    one = st.integers(0, classes - 1)
    return st.lists(st.tuples(one, one), min_size=1, max_size=40).map(lambda rows: np.array(rows).T)


def by_sklearn(name, references, predictions, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes without a sample
        return getattr(sklearn.metrics, name)(references, predictions, **options)


@given(pairs(2))
def test_two_classes_as_scikit_learn(arrays):
    predictions, references = arrays
    wanted = by_sklearn("f1_score", references, predictions, labels=[1], average="macro")  # of class 1, also if alone
    assert f1(predictions, references) == pytest.approx(wanted)
    assert accuracy(predictions, references) == pytest.approx(by_sklearn("accuracy_score", references, predictions))


@given(pairs(4))
def test_more_classes_as_scikit_learn(arrays):
    predictions, references = arrays
    wanted = by_sklearn("f1_score", references, predictions, average="macro")
    assert f1(predictions, references, "macro") == pytest.approx(wanted)
    wanted = by_sklearn("matthews_corrcoef", references, predictions)
    assert matthews_correlation(predictions, references) == pytest.approx(wanted, abs=1e-12)


def test_values_by_hand():
    predictions, references = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]
    assert f1(predictions, references) == pytest.approx(2 / 3)
    assert f1(predictions, references, "macro") == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert matthews_correlation(predictions, references) == pytest.approx((2 * 1 - 1 * 1) / 6)
    assert f1([0, 0], [0, 0]) == 0
    assert matthews_correlation([0, 0], [0, 1]) == 0
    assert matthews_correlation([2, 0, 1], [2, 0, 1]) == 1
    assert matthews_correlation([0, 1], [1, 0]) == -1


def test_many_samples_do_not_overflow():
    """The variances are squares of the count."""
    draw = np.random.default_rng(0)
    references = draw.integers(0, 2, 300_000).astype(np.int32)
    predictions = np.where(draw.random(300_000) < 0.9, references, 1 - references)
    assert matthews_correlation(predictions, references) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("metric", [accuracy, f1, matthews_correlation])
def test_shapes_that_differ_or_are_empty(metric):
    with pytest.raises(ValueError, match=r"predictions \(2,\) and references \(1,\) must have one shape"):
        metric([1, 0], [1])
    with pytest.raises(ValueError, match="not empty"):
        metric([], [])


def test_mistakes():
    with pytest.raises(ValueError, match=r'average="binary" takes classes 0 and 1, got \[0, 2\]; use "macro"'):
        f1([0, 2], [0, 2])
    with pytest.raises(ValueError, match='average must be "binary" or "macro", got \'micro\''):
        f1([0, 1], [0, 1], "micro")
    with pytest.raises(ValueError, match="no metric 'bleu'; there are: accuracy, f1, matthews_correlation, squad"):
        evaluate_module("bleu")


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Load a metric with `evaluate`, which keeps copies of modules and predictions in a folder."""
    import evaluate

    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    return lambda name: evaluate.load(evaluate_module(name), cache_dir=str(tmp_path))


def test_evaluate_loads_the_metrics_by_path(load):
    predictions, references = [0, 1, 2, 2, 1], [0, 2, 2, 2, 1]
    for metric in (accuracy, matthews_correlation):
        computed = load(metric.__name__).compute(predictions=predictions, references=references)
        assert computed == {metric.__name__: metric(predictions, references)}
    computed = load("f1").compute(predictions=predictions, references=references, average="macro")
    assert computed == {"f1": f1(predictions, references, "macro")}
    assert load("f1").compute(predictions=[1, 1, 0], references=[1, 0, 0]) == {"f1": f1([1, 1, 0], [1, 0, 0])}


def test_evaluate_combines_them_and_takes_batches(load):
    import evaluate

    metrics = evaluate.combine([load("accuracy"), load("f1")])
    metrics.add_batch(predictions=[1, 0], references=[1, 1])
    metrics.add_batch(predictions=[1], references=[0])
    assert metrics.compute() == pytest.approx({"accuracy": 1 / 3, "f1": 0.5})


def test_evaluate_scores_answers(load):
    answers = [
        {"id": "a", "prediction_text": "the Eiffel Tower"},
        {"id": "b", "prediction_text": "in the year 1889"},
    ]
    references = [
        {"id": "a", "answers": {"text": ["a tower", "Eiffel tower"], "answer_start": [0, 2]}},
        {"id": "b", "answers": {"text": ["1889"], "answer_start": [7]}},
    ]
    scores = load("squad").compute(predictions=answers, references=references)
    assert scores == pytest.approx({"exact_match": 50, "f1": 100 * (1 + 2 * (1 / 3) / (1 / 3 + 1)) / 2})
