"""Question answering from files to scores: windows, positions, metrics of known logits, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, EvalPrediction, Trainer, TrainingArguments

import hf_compress as hfc
from hf_compress.cli import run
from hf_compress.tasks.question_answering import QuestionAnsweringArguments, prepare
from tests.text import tiny_text_model

WORDS = "ada bob film year good dull great what where when who question answer".split()
FAST = "--max_steps 2 --per_device_train_batch_size 4 --per_device_eval_batch_size 8 --use_cpu --disable_tqdm true"
FAST += " --dataloader_pin_memory false --calibration_samples 8 --max_length 48 --doc_stride 8"


def questions(count, seed=0, **changes):
    """Rows in the form of SQuAD whose answer is a word of a context that is longer than a window."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        words = list(rng.choice(WORDS, 30))
        at = int(rng.integers(30))
        start = len(" ".join(words[:at])) + (at > 0)
        answers = {"text": [words[at]], "answer_start": [start]}
        row = {"id": f"{seed}-{i}", "question": "  Who was it?", "context": " ".join(words), "answers": answers}
        rows.append({**row, **changes})
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(tiny_text_model(tmp_path_factory.mktemp("bert"), "question-answering"))


@pytest.fixture
def files(tmp_path):
    return {
        "train_file": write(tmp_path / "train.jsonl", questions(12)),
        "eval_file": write(tmp_path / "eval.jsonl", questions(6, seed=1)),
    }


def known_logits(features, size):
    """Logits that point at the labelled positions, and at no answer where the window does not hold it."""
    start, end = np.zeros((2, len(features), size))
    for i, row in enumerate(features):
        start[i, row["start_positions"]] = end[i, row["end_positions"]] = 9
    labels = tuple(np.array(features[name]) for name in ("start_positions", "end_positions"))
    return EvalPrediction(predictions=(start, end), label_ids=labels)


def test_the_right_logits_score_all_points_and_others_do_not(bert, files):
    parts = prepare(QuestionAnsweringArguments(bert, **files, max_length=48, doc_stride=8))
    features = parts["eval_dataset"]
    assert len(features) > 6  # contexts do not fit one window
    assert max(map(len, features["input_ids"])) <= 48
    known = known_logits(features, 48)
    assert parts["compute_metrics"](known) == {"exact_match": 100, "f1": 100}
    flipped = EvalPrediction(predictions=[-x for x in known.predictions], label_ids=known.label_ids)
    assert parts["compute_metrics"](flipped)["f1"] < 50
    fewer = [x[1:] for x in known.predictions]
    with pytest.raises(ValueError, match="do not belong to 1[0-9] windows"):
        parts["compute_metrics"](EvalPrediction(predictions=fewer, label_ids=None))
    with pytest.raises(ValueError, match="window by window"):
        parts["compute_metrics"](EvalPrediction(predictions=fewer, label_ids=[x[1:] for x in known.label_ids]))


def test_grouping_by_length_mixes_no_answers(bert, files, tmp_path):
    """transformers' Trainer groups the evaluation data too: its answers would belong to other questions."""
    parts = prepare(QuestionAnsweringArguments(bert, **files, max_length=48, doc_stride=8))
    flags = {"per_device_eval_batch_size": 2, "use_cpu": True, "report_to": "none"}
    scores = []
    for strategy in ("random", "group_by_length"):
        args = hfc.CrAMConfig(str(tmp_path), train_sampling_strategy=strategy, **flags)
        scores.append(hfc.CrAMTrainer(args=args, **parts).evaluate())
    for name in ("eval_f1", "eval_exact_match", "eval_loss"):
        assert scores[0][name] == pytest.approx(scores[1][name])
    args = TrainingArguments(str(tmp_path), train_sampling_strategy="group_by_length", **flags)
    with pytest.raises(ValueError, match="group_by_length"):
        Trainer(args=args, **parts).evaluate()


def test_questions_without_answer_are_found_in_the_data(bert, tmp_path):
    none = {"answers": {"text": [], "answer_start": []}}
    rows = [*questions(4), *(row | none | {"id": f"n{i}"} for i, row in enumerate(questions(2, seed=2)))]
    path = write(tmp_path / "both.jsonl", rows)
    parts = prepare(QuestionAnsweringArguments(bert, train_file=path, eval_file=path, max_length=48, doc_stride=8))
    scores = parts["compute_metrics"](known_logits(parts["eval_dataset"], 48))
    assert scores["f1"] == scores["exact_match_unanswerable"] == scores["f1_answerable"] == 100
    parts = prepare(
        QuestionAnsweringArguments(
            bert, train_file=path, eval_file=path, max_length=48, doc_stride=8, unanswerable=False
        )
    )
    assert parts["compute_metrics"](known_logits(parts["eval_dataset"], 48))["f1"] < 100


def test_without_an_eval_split_contexts_are_held_out(bert, tmp_path):
    rows = [row | {"id": f"{i}-{row['id']}"} for row in questions(10) for i in range(2)]
    path = write(tmp_path / "train.jsonl", rows)
    parts = prepare(QuestionAnsweringArguments(bert, train_file=path, validation_share=0.3))
    train, held_out = ({tuple(ids) for ids in parts[name]["input_ids"]} for name in ("train_dataset", "eval_dataset"))
    assert len(train) == 7
    assert len(held_out) == 3
    assert not train & held_out


def test_the_nested_format_and_a_limit_of_samples(bert, tmp_path):
    articles = [
        {"paragraphs": [{"context": row["context"], "qas": [{**row, "answers": [answer]}]}]}
        for row in questions(5)
        for answer in [{"text": row["answers"]["text"][0], "answer_start": row["answers"]["answer_start"][0]}]
    ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"version": "1.1", "data": articles}))
    args = QuestionAnsweringArguments(bert, train_file=str(path), eval_file=str(path), max_train_samples=3)
    parts = prepare(args)
    assert (len(parts["train_dataset"]), len(parts["eval_dataset"])) == (3, 5)


def test_a_folder_of_parquet_files(bert, tmp_path):
    for split, seed in (("train", 0), ("validation", 1)):
        Dataset.from_list(questions(4, seed)).to_parquet(tmp_path / f"{split}.parquet")
    parts = prepare(QuestionAnsweringArguments(bert, dataset_name=str(tmp_path)))
    assert len(parts["eval_dataset"]) == 4


WRONG_ROWS = [
    ({"context": " "}, r"question 1 of the training data \(id '9-0'\) has an empty context"),
    ({"question": ""}, "has an empty question"),
    ({"answers": {"text": ["zebra"], "answer_start": [0]}}, "'zebra' does not stand at character 0"),
    ({"answers": {"text": [""], "answer_start": [0]}}, "'' does not stand at character 0"),
    ({"answers": {"text": ["ada"], "answer_start": [-3]}}, "does not stand at character -3"),
    ({"answers": {"text": ["ada"], "answer_start": []}}, "1 answers and 0 of their starts"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_ROWS)
def test_a_wrong_row_is_named(bert, tmp_path, files, changes, message):
    rows = [*questions(1), *questions(1, seed=9, **changes)]
    arguments = {**files, "train_file": write(tmp_path / "wrong.jsonl", rows)}
    with pytest.raises(ValueError, match=message):
        prepare(QuestionAnsweringArguments(bert, **arguments))


@pytest.mark.parametrize("column", ["id", "question", "context", "answers"])
def test_a_missing_column_is_named(bert, tmp_path, files, column):
    rows = [{k: v for k, v in row.items() if k != column} for row in questions(2)]
    arguments = {**files, "eval_file": write(tmp_path / "less.jsonl", rows)}
    with pytest.raises(ValueError, match=f"no column {column!r} in split 'validation'"):
        prepare(QuestionAnsweringArguments(bert, **arguments))


def test_other_mistakes_are_named(bert, tmp_path, files):
    flat = write(tmp_path / "flat.jsonl", questions(2, answers="ada"))
    with pytest.raises(ValueError, match="it must hold lists 'text'"):
        prepare(QuestionAnsweringArguments(bert, train_file=flat))
    twice = write(tmp_path / "twice.jsonl", [*questions(2), *questions(1)])
    with pytest.raises(ValueError, match="have the id '0-0'"):
        prepare(QuestionAnsweringArguments(bert, train_file=files["train_file"], eval_file=twice))
    with pytest.raises(ValueError, match="takes at most 512 tokens"):
        prepare(QuestionAnsweringArguments(bert, **files, max_length=600))
    with pytest.raises(ValueError, match="doc_stride must be"):
        QuestionAnsweringArguments(bert, **files, max_length=64, doc_stride=64)
    with pytest.raises(ValueError, match="give dataset_name"):
        prepare(QuestionAnsweringArguments(bert))
    one = write(tmp_path / "one.jsonl", questions(1))
    with pytest.raises(ValueError, match="all questions have one context"):
        prepare(QuestionAnsweringArguments(bert, train_file=one))


RECIPES = ["bert_base_squad_cram", "bert_base_squad_cram_nm", "bert_base_squad_sfw", "minilm_squad_cram"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_train_and_score_variants(bert, files, tmp_path, capsys, recipe):
    data = ["--train_file", files["train_file"], "--eval_file", files["eval_file"]]
    model = ["--model_name_or_path", bert, "--output_dir", str(tmp_path / "out")]
    assert run(["train", recipe, *data, *model, *FAST.split()]) == 0, capsys.readouterr().err
    family = hfc.load_family(tmp_path / "out" / "_family")
    assert str(tmp_path) not in json.dumps(family.recipe)  # no path of this machine is published
    for variant in family.checkpoints:
        assert 0 <= variant.metrics["exact_match"] <= variant.metrics["f1"] <= 100
        assert variant.loads_with == "transformers"


def test_neurons_and_heads_are_removed(bert, files, tmp_path, capsys):
    data = ["--train_file", files["train_file"], "--eval_file", files["eval_file"]]
    model = ["--model_name_or_path", bert, "--output_dir", str(tmp_path / "out"), "--dense_epochs", "1"]
    schedule = "--grow_steps 2 --stabilize_steps 2 --grow_every 1".split()
    command = ["train", "bert_base_squad_tpp", *data, *model, *schedule, *FAST.split(), "--patterns"]
    assert run([*command, "neurons:0.5", "heads:0.5"]) == 0, capsys.readouterr().err
    family = hfc.load_family(tmp_path / "out" / "_family")
    variant = family["neurons:0.5+heads:0.5"]
    assert variant.made_by == "trained"
    assert variant.macs < family.dense.macs
    loaded = AutoModelForQuestionAnswering.from_pretrained(family.path_to(variant))
    assert sum(p.numel() for p in loaded.parameters()) == variant.parameters < family.dense.parameters


def test_the_coded_checkpoint_answers_as_the_dense_one_does(bert, files, tmp_path, capsys):
    data = ["--train_file", files["train_file"], "--eval_file", files["eval_file"]]
    model = ["--model_name_or_path", bert, "--output_dir", str(tmp_path / "out"), "--half_rest", "false"]
    assert run(["train", "bert_base_squad_lilnetx", *data, *model, *FAST.split()]) == 0, capsys.readouterr().err
    family = hfc.load_family(tmp_path / "out" / "_family")
    coded, dense = family["lilnetx"], family.dense
    assert coded.storage == "coded"
    assert coded.bytes < dense.bytes
    assert coded.metrics == dense.metrics
    states = [AutoModelForQuestionAnswering.from_pretrained(family.path_to(v)).state_dict() for v in (coded, dense)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_sparse_fine_tuning_keeps_every_zero(bert, files, tmp_path, capsys):
    model = AutoModelForQuestionAnswering.from_pretrained(bert)
    hfc.compress(model, "unstructured:0.8")
    model.save_pretrained(tmp_path / "sparse")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "sparse")
    data = ["--train_file", files["train_file"], "--eval_file", files["eval_file"]]
    folders = ["--model_name_or_path", str(tmp_path / "sparse"), "--output_dir", str(tmp_path / "out")]
    command = ["train", "bert_base_squad_sparse_finetune", *data, *folders, *FAST.split()]
    assert run(command) == 0, capsys.readouterr().err
    tuned = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    before, after = ({n: t.parameter for n, t in hfc.find_targets(m).items()} for m in (model, tuned))
    assert all(((before[name] != 0) | (after[name] == 0)).all() for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_recipe_in_two_processes(bert, files, tmp_path):
    """Scores of two processes and weights are those of one process."""
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        data = ["--train_file", files["train_file"], "--eval_file", files["eval_file"]]
        flags = ["--model_name_or_path", bert, "--output_dir", str(out), *FAST.split(), "--variants", "2:4"]
        flags += ["--learning_rate", "0.1", "--optim", "sgd", "--per_device_train_batch_size", str(4 // processes)]
        flags += ["--train_sampling_strategy", "sequential", "--eval_patterns", "2:4"]
        command = ["-m", "hf_compress", "train", "minilm_squad_cram", *data, *flags]
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
            launcher += ["--main_process_port", str(20_000 + os.getpid() % 20_000)]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"cram on {processes} process" in done.stdout
        found[processes] = hfc.load_family(out / "_family")
        assert "dataset_name" not in found[processes].recipe  # SQuAD is the recipe's, and was not looked at
        log = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
        assert {"eval_f1", "eval_nm-2of4_f1"} <= {key for row in log for key in row}
    for one, two in zip(*(found[n].checkpoints for n in (1, 2)), strict=True):
        assert one.metrics["f1"] == pytest.approx(two.metrics["f1"], abs=1e-3)
    one, two = (AutoModelForQuestionAnswering.from_pretrained(tmp_path / n).state_dict() for n in "12")
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4
    start = AutoModelForQuestionAnswering.from_pretrained(bert).state_dict()
    assert max((one[name] - start[name]).abs().max().item() for name in one) > 1e-2
