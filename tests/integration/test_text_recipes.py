"""The recipes of text classification start: on a tiny BERT and a few sentences, from the command line to a family."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer

import hf_compress as hfc
from hf_compress.cli import run
from hf_compress.cli.recipes import read_recipe
from tests.text import tiny_text_model

FAST = "--max_steps 2 --per_device_train_batch_size 4 --per_device_eval_batch_size 8"
FAST += " --use_cpu --disable_tqdm true --dataloader_pin_memory false --calibration_samples 8"
METRICS = {"accuracy", "f1", "matthews_correlation"}


@pytest.fixture
def data(tmp_path):
    """Flags that say where a few sentences are, with the columns of SST-2."""
    for name, count in (("train", 24), ("validation", 12)):
        rows = [
            {"idx": i, "sentence": f"{'very good' if i % 2 else 'dull, not good'}: film {i}", "label": i % 2}
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return [
        f"--{flag}={tmp_path / name}.jsonl" for flag, name in (("train_file", "train"), ("eval_file", "validation"))
    ]


def test_sst2_cram_starts_and_gives_a_family(tmp_path, data, capsys):
    recipe, model = read_recipe("sst2_cram"), tiny_text_model(tmp_path / "bert", "text-classification")
    flags = ["--model_name_or_path", str(model), *data, *FAST.split(), "--output_dir", str(tmp_path / "out")]
    variants = ["unstructured:0.8", "2:4"]
    assert run(["train", "sst2_cram", *flags, "--variants", *variants]) == 0, capsys.readouterr().err
    family = hfc.load_family(tmp_path / "out" / "_family")
    assert [v.pattern for v in family.variants] == variants
    assert (family.task, family.method) == ("text-classification", "cram")
    for variant in family.variants:
        assert all(0 <= abs(variant.metrics[name]) <= 1 for name in METRICS)
        assert variant.macs > 0
    assert family.variants[0].sparsity == pytest.approx(0.8, abs=1e-3)
    assert family.recipe["patterns"] == recipe["patterns"]
    assert family.recipe["learning_rate"] == float(recipe["learning_rate"])
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "_family" / "nm-2of4")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out" / "_family" / "nm-2of4")("a good film", return_tensors="pt")
    assert loaded(**tokens).logits.shape == (1, 2)
    log = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert log["global_step"] == 2
    assert any("eval_accuracy" in row for row in log["log_history"])


def test_sst2_sparse_transfer_keeps_the_zeros_of_another_task(tmp_path, data, capsys):
    source = tiny_text_model(tmp_path / "squad", "question-answering")
    pruned = AutoModelForQuestionAnswering.from_pretrained(source)
    report = hfc.compress(pruned, "unstructured:0.8")
    pruned.save_pretrained(source)
    flags = ["--model_name_or_path", str(source), *data, *FAST.split(), "--output_dir", str(tmp_path / "out")]
    assert run(["train", "sst2_sparse_transfer", *flags]) == 0, capsys.readouterr().err
    before = dict(pruned.named_parameters())
    dense, cut = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "_family" / name)
        for name in ("dense", "unstructured-0.80")
    )
    weights = [target.parameter for target in hfc.find_targets(dense, exclude=["*pooler*"]).values()]
    assert sum(int((w == 0).sum()) for w in weights) == int(0.8 * sum(w.numel() for w in weights))
    for name, weight in dense.named_parameters():
        if name in report.layers:
            assert torch.equal(weight == 0, before[name] == 0)
            assert not torch.equal(weight, before[name])
        assert torch.equal(weight, cut.get_parameter(name))
