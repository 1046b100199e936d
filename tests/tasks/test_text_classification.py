"""Text classification: every source of data, single texts and pairs, and what is said when something is missing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import EvalPrediction, Trainer, TrainingArguments

from hf_compress.tasks.text_classification import TextClassificationArguments, prepare
from hf_compress.training import changed_arguments, recipe_of
from tests.text import tiny_text_model

GOOD, BAD = (
    ("it is a good film", "a great film and not bad", "very good"),
    ("it was bad", "dull, very dull!", "not good"),
)


def texts(count, seed=0):
    """Sentences and whether they are good."""
    draw = np.random.default_rng(seed)
    labels = [i % 2 for i in range(count)]
    return {"sentence": [str(draw.choice((BAD, GOOD)[label])) + f" {i}" for i, label in enumerate(labels)]}, labels


def sentences(count, feature=None, labels=None, name="label"):
    columns, classes = texts(count)
    features = Features({"sentence": Value("string"), name: feature or ClassLabel(names=["bad", "good"])})
    return Dataset.from_dict({**columns, name: classes if labels is None else labels}, features=features)


def save(folder, **splits):
    DatasetDict(splits).save_to_disk(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_text_model(tmp_path_factory.mktemp("bert"), "text-classification"))


@pytest.fixture
def prepared(model, tmp_path):
    """`prepare` with the tiny model, on a data set that is given as splits."""

    def call(splits=None, **overrides):
        source = {"dataset_name": save(tmp_path / "data", **splits)} if splits else {}
        return prepare(TextClassificationArguments(**{"model_name_or_path": model, **source, **overrides}))

    return call


def written(dataset, path):
    {".csv": dataset.to_csv, ".jsonl": dataset.to_json, ".parquet": dataset.to_parquet}[path.suffix](path)
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_files(prepared, tmp_path, suffix):
    names = ["bad" if i % 2 else "good" for i in range(20)]
    train = written(sentences(20, Value("string"), names), tmp_path / f"train{suffix}")
    dev = written(sentences(6, Value("string"), names[:6]), tmp_path / f"dev{suffix}")
    parts = prepared(train_file=train, eval_file=dev)
    assert (len(parts["train_dataset"]), len(parts["eval_dataset"])) == (20, 6)
    assert parts["model"].config.id2label == {0: "bad", 1: "good"}
    assert parts["eval_dataset"]["labels"][:] == [1, 0, 1, 0, 1, 0]
    held_out = prepared(dataset_name=train, validation_share=0.2)
    assert (len(held_out["train_dataset"]), len(held_out["eval_dataset"])) == (16, 4)
    assert sorted(held_out["eval_dataset"]["labels"]) == [0, 0, 1, 1]


def test_samples_are_what_the_tokenizer_makes_of_the_text(prepared):
    parts = prepared({"train": sentences(8), "validation": sentences(4)})
    tokenizer, data = parts["processing_class"], parts["train_dataset"]
    assert set(data.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert data["labels"][:] == [0, 1] * 4
    for i, text in enumerate(sentences(8)["sentence"]):
        assert data[i]["input_ids"] == tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in data[i]["input_ids"]
    rows = sorted((data[i] for i in range(8)), key=lambda row: len(row["input_ids"]))
    short, long = parts["data_collator"](rows[:2]), parts["data_collator"](rows)
    assert short["input_ids"].shape == (2, len(rows[1]["input_ids"]))  # as long as its longest, not more
    assert long["input_ids"].shape == (8, len(rows[-1]["input_ids"]))
    assert short["input_ids"].shape[1] < long["input_ids"].shape[1]
    assert long["attention_mask"].sum() == sum(len(row["input_ids"]) for row in rows)
    assert parts["model"](**long).loss.isfinite()


PAIRS = [("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"), ("question", "sentence")]


@pytest.mark.parametrize("columns", [*PAIRS, ("one", "other")])
def test_pairs(prepared, columns):
    first, labels = texts(12)
    second, _ = texts(12, seed=1)
    rows = {columns[0]: first["sentence"], columns[1]: second["sentence"], "label": labels, "idx": list(range(12))}
    options = dict(zip(("text_column", "text_pair_column"), columns, strict=True)) if columns[0] == "one" else {}
    parts = prepared({"train": Dataset.from_dict(rows), "test": Dataset.from_dict(rows)}, **options)
    sample, tokenizer = parts["train_dataset"][3], parts["processing_class"]
    assert sample["input_ids"] == tokenizer(first["sentence"][3], second["sentence"][3])["input_ids"]
    assert set(sample["token_type_ids"]) == {0, 1}


@pytest.mark.parametrize("column", ["sentence", "text", "review"])
def test_single_texts_of_other_names(prepared, column):
    columns, labels = texts(12)
    data = Dataset.from_dict({"title": ["film"] * 12, column: columns["sentence"], "label": labels})
    parts = prepared({"train": data}, **({"text_column": column} if column == "review" else {}))
    assert len(parts["train_dataset"]) + len(parts["eval_dataset"]) == 12
    given = {tuple(parts["processing_class"](text)["input_ids"]) for text in data[column]}
    assert {tuple(ids) for ids in parts["train_dataset"]["input_ids"]} < given


def test_a_named_column_alone_is_single_where_there_is_a_pair(prepared):
    data = sentences(12).rename_column("sentence", "premise").add_column("hypothesis", ["what"] * 12)
    parts = prepared({"train": data, "test": data}, text_column="hypothesis")
    assert parts["train_dataset"][0]["input_ids"] == parts["processing_class"]("what")["input_ids"]


@pytest.mark.parametrize(
    ("feature", "labels", "names"),
    [
        (None, None, ["bad", "good"]),
        (Value("int64"), [3, 1, 2] * 4, ["1", "2", "3"]),
        (Value("string"), ["b", "c", "a"] * 4, ["a", "b", "c"]),
        (Value("bool"), [True, False] * 6, ["False", "True"]),
    ],
)
def test_labels_become_classes(prepared, feature, labels, names):
    data = sentences(12, feature, labels, name="labels")
    parts = prepared({"train": data, "test": data})
    wanted = data["labels"] if labels is None else [names.index(str(label)) for label in labels]
    assert list(parts["train_dataset"]["labels"]) == list(wanted)
    assert list(parts["model"].config.id2label.values()) == names
    assert parts["model"].config.problem_type == "single_label_classification"
    assert parts["model"].classifier.out_features == len(names)


def test_a_pretrained_model_gets_a_new_head_in_float32(prepared, model, tmp_path):
    from transformers import BertForQuestionAnswering, BertForSequenceClassification

    source = BertForQuestionAnswering.from_pretrained(tiny_text_model(tmp_path / "squad", "question-answering"))
    source.to(torch.bfloat16).save_pretrained(tmp_path / "squad")
    data = sentences(12, Value("int64"), [0, 1, 2, 3] * 3)
    for path, kind in ((tmp_path / "squad", BertForQuestionAnswering), (model, BertForSequenceClassification)):
        parts = prepared({"train": data, "test": data}, model_name_or_path=str(path))
        kept = kind.from_pretrained(path).bert.encoder.layer[1].output.dense.weight.float()
        assert torch.equal(parts["model"].bert.encoder.layer[1].output.dense.weight, kept)
        assert parts["model"].classifier.out_features == 4
        assert {p.dtype for p in parts["model"].parameters()} == {torch.float32}


def test_zeros_of_a_pruned_model_are_there(prepared, model, tmp_path):
    from transformers import BertForSequenceClassification

    import hf_compress as hfc

    pruned = BertForSequenceClassification.from_pretrained(model)
    hfc.compress(pruned, "unstructured:0.8")
    pruned.save_pretrained(tmp_path / "pruned")
    tiny_text_model(tmp_path / "whole", "text-classification")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "pruned" / name).write_text((tmp_path / "whole" / name).read_text())
    loaded = prepared({"train": sentences(8), "test": sentences(4)}, model_name_or_path=str(tmp_path / "pruned"))
    weights = [t.parameter for t in hfc.find_targets(loaded["model"]).values()]
    assert sum(int((w == 0).sum()) for w in weights) == int(0.8 * sum(w.numel() for w in weights))


def test_metrics(prepared):
    logits, labels = np.eye(2)[[1, 1, 0, 0, 1]], np.array([1, 0, 0, 1, 1])
    two = prepared({"train": sentences(8), "test": sentences(4)})
    wanted = {"accuracy": 0.6, "f1": 2 / 3, "matthews_correlation": 1 / 6}
    assert two["compute_metrics"](EvalPrediction(logits, labels)) == pytest.approx(wanted)
    four = sentences(12, Value("int64"), [0, 1, 2, 3] * 3)
    more = prepared({"train": four, "test": four})["compute_metrics"]
    wide = np.pad(logits, ((0, 0), (0, 2)))
    assert more(EvalPrediction(wide, labels)) == pytest.approx({**wanted, "f1": (2 / 3 + 1 / 2) / 2})
    assert two["preprocess_logits_for_metrics"]((logits, "hidden"), labels) is logits
    assert two["preprocess_logits_for_metrics"](logits, labels) is logits


def test_the_stock_trainer_learns_it(prepared, tmp_path):
    parts = prepared({"train": sentences(64), "validation": sentences(32)})
    args = TrainingArguments(
        str(tmp_path / "out"),
        learning_rate=1e-2,
        num_train_epochs=6,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = Trainer(args=args, **parts)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] > 0.9
    assert metrics["eval_matthews_correlation"] > 0.8


def test_samples_for_a_trial_are_drawn_from_all_classes(prepared):
    data = sentences(40).sort("label")

    def chosen(**overrides):
        parts = prepared({"train": data, "test": data}, max_train_samples=12, max_eval_samples=6, **overrides)
        return [parts[key]["input_ids"][:] for key in ("train_dataset", "eval_dataset")], parts["train_dataset"]

    (train, evaluation), dataset = chosen()
    assert (len(train), len(evaluation)) == (12, 6)
    assert set(dataset["labels"]) == {0, 1}
    assert chosen()[0] == [train, evaluation]
    assert chosen(data_seed_split=1)[0] != [train, evaluation]


def test_long_texts_are_cut(prepared):
    data = Dataset.from_dict({"text": ["a film " * 400, "bad"] * 4, "label": [0, 1] * 4})
    splits = {"train": data, "test": data}
    assert len(prepared(splits)["train_dataset"][0]["input_ids"]) == 512
    assert len(prepared(splits, max_length=20)["train_dataset"][0]["input_ids"]) == 20
    for wrong in (2, 0, 513):
        with pytest.raises(ValueError, match=f"max_length must be from 3 to 512 for .*, got {wrong}"):
            prepared(splits, max_length=wrong)


def test_what_a_file_replaces_is_not_told():
    args = TextClassificationArguments(
        "net", dataset_name="nyu-mll/glue", dataset_config_name="sst2", train_file="a.csv"
    )
    assert changed_arguments(args) == {"model_name_or_path": "net", "train_file": "a.csv"}


def test_a_recipe_has_no_path_of_a_machine_but_says_where_one_was():
    args = TextClassificationArguments("/data/net", train_file="/data/a.csv", max_length=20)
    assert recipe_of(args) == {"max_length": 20, "local": ["model_name_or_path", "train_file"]}
    assert "local" not in recipe_of(TextClassificationArguments("net", max_length=20))


def test_unlabelled_samples_are_refused_and_their_split_named(prepared):
    """As in the split test of GLUE."""
    splits = {"train": sentences(8), "validation": sentences(4), "test": sentences(3, labels=[-1] * 3)}
    assert len(prepared(splits)["eval_dataset"]) == 4
    message = r"split 'test' of .* has labels in column 'label' that are no class: \[-1\].*choose another eval_split"
    with pytest.raises(ValueError, match=message):
        prepared(splits, eval_split="test")


def test_a_row_without_a_text_is_named(prepared):
    holes = Dataset.from_dict({"text": ["a", None, "b", None], "other": ["a", "b", "c", None], "label": [0, 1, 0, 1]})
    pair = {"text_column": "text", "text_pair_column": "other"}
    whole = Dataset.from_dict({"text": ["a", "b"] * 4, "other": ["a", "b"] * 4, "label": [0, 1] * 4})
    with pytest.raises(ValueError, match="text_column: column 'text' in split 'test' of .* 2 rows .* first row 1;"):
        prepared({"train": whole, "test": holes})
    with pytest.raises(ValueError, match="text_pair_column: column 'other' in split 'train' of .* 1 rows .* row 3;"):
        prepared({"train": holes.remove_columns("text").add_column("text", list("abcd")), "test": whole}, **pair)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dataset_name": None}, "give .*dataset_name .* train_file"),
        ({"text_column": "body"}, "text_column: no column 'body' in .*; there are: sentence, label"),
        (
            {"text_column": "sentence", "text_pair_column": "body"},
            "text_pair_column: no column 'body' in .*; there are: sentence, label",
        ),
        ({"text_pair_column": "sentence"}, "text_pair_column is 'sentence', but there is no text_column"),
        ({"label_column": "stars"}, "label_column: no column 'stars' in .*; there are: sentence, label"),
        ({"text_column": "label"}, "text_column: column 'label' in split 'train' .* no texts; name another"),
        ({"label_column": "sentence"}, "one class only"),
        ({"eval_split": "dev"}, "no split 'dev'; there are: train, test"),
        ({"validation_share": 0}, "validation_share must be between 0 and 1, got 0"),
        ({"max_train_samples": 0}, "max_train_samples must be at least 1, got 0"),
    ],
)
def test_mistakes(prepared, overrides, message):
    data = sentences(8)
    if overrides == {"label_column": "sentence"}:
        data = data.map(lambda row: {"sentence": "all alike"})
    with pytest.raises(ValueError, match=message):
        prepared({"train": data, "test": data}, **overrides)


def test_a_data_set_without_a_usual_column_says_what_there_is(prepared):
    data = sentences(8).rename_column("sentence", "review")
    message = "none of the usual columns of texts .*sentence1 and sentence2.*; name one of: review, label"
    with pytest.raises(ValueError, match=message):
        prepared({"train": data, "test": data})


def test_labels_that_are_no_classes(prepared):
    data = sentences(4, Value("float32"), [0.5] * 4)
    with pytest.raises(ValueError, match="holds .*, no classes; name another with label_column"):
        prepared({"train": data, "test": data})


def test_models_without_a_tokenizer_that_fits(prepared, tmp_path):
    from transformers import AutoTokenizer, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

    folder = tiny_text_model(tmp_path / "bert", "text-classification")
    data = {"train": sentences(8), "test": sentences(4)}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="bert has no tokenizer; save one there"):
        prepared(data, model_name_or_path=str(folder))
    with pytest.raises(ValueError, match="the tokenizer of .*nowhere cannot be loaded"):
        prepared(data, model_name_or_path=str(tmp_path / "nowhere"))
    tokenizer.add_tokens(["film noir"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="the tokenizer has 132 tokens, the model 131"):
        prepared(data, model_name_or_path=str(folder))
    model = BertForSequenceClassification.from_pretrained(folder)
    model.resize_token_embeddings(132)
    model.save_pretrained(folder)
    assert prepared(data, model_name_or_path=str(folder))["model"].num_labels == 2
    # A model that was made to write texts has no token to fill batches with.
    config = GPT2Config(vocab_size=132, n_embd=8, n_layer=1, n_head=1, n_positions=64, eos_token_id=3)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "gpt")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "gpt")
    with pytest.raises(ValueError, match="the tokenizer of .*gpt has no pad_token to fill batches with"):
        prepared(data, model_name_or_path=str(tmp_path / "gpt"))
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(tmp_path / "gpt")
    parts = prepared(data, model_name_or_path=str(tmp_path / "gpt"))
    batch = parts["data_collator"]([parts["train_dataset"][i] for i in range(6)])
    assert 0 in batch["attention_mask"]
    assert parts["model"].config.pad_token_id == parts["processing_class"].pad_token_id == 3
    assert parts["model"](**{k: v for k, v in batch.items() if k != "token_type_ids"}).loss.isfinite()
