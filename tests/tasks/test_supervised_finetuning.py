"""Causal models: CrAM in TRL's trainer, its numbers in the log, families, and the task of the command line."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_compress as hfc
from hf_compress.cli import run
from hf_compress.cli.train import parse
from hf_compress.methods.registry import METHODS
from hf_compress.tasks import supervised_finetuning
from hf_compress.tasks.supervised_finetuning import (
    PerplexityMixin,
    SupervisedFinetuningArguments,
    compose,
    prepare,
)
from tests.methods.cram.test_trainer import largest_difference
from tests.sft import pairs, texts, tiny_causal_model, write_json_lines

trl = pytest.importorskip("trl")


@dataclass
class CrAMSFTConfig(trl.SFTConfig, hfc.CrAMConfig):
    """As a user writes it."""


class CrAMSFTTrainer(hfc.CrAMMixin, trl.SFTTrainer):
    """As a user writes it."""

    config_class = CrAMSFTConfig


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_causal_model(tmp_path_factory.mktemp("llama"))


def make(llama, folder, trainer_class=CrAMSFTTrainer, data=None, eval_data=None, config=CrAMSFTConfig, **overrides):
    fields = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
    }
    if config is CrAMSFTConfig:
        fields |= {"patterns": ["unstructured:0.5", "2:4"], "rho": 0.1}
    return trainer_class(
        model=AutoModelForCausalLM.from_pretrained(llama),
        args=config(**{**fields, **overrides}),
        train_dataset=Dataset.from_list(data or pairs()),
        eval_dataset=Dataset.from_list(eval_data) if eval_data else None,
        processing_class=AutoTokenizer.from_pretrained(llama),
    )


def train(*args, resume=None, **options):
    trainer = make(*args, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class LastBatchOnly(CrAMSFTTrainer):
    """A mistake that the accumulation test must see: the second sweep replays one micro-batch only."""

    def get_batch_samples(self, *args, **kwargs):
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._window = batches[-1:]
        return batches, num_items


class MeanOfMeans(CrAMSFTTrainer):
    """Another one: every micro-batch counts alike, however many labels it has."""

    def get_batch_samples(self, *args, **kwargs):
        return super().get_batch_samples(*args, **kwargs)[0], None


def test_accumulation_equals_one_large_batch_with_unequal_numbers_of_labels(llama, tmp_path):
    whole = train(llama, tmp_path)
    assert len({len(row["completion"].split()) for row in pairs()}) > 3
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert largest_difference(whole.model, train(llama, tmp_path, **parts).model) < 1e-6
    for mistake in (LastBatchOnly, MeanOfMeans):
        assert largest_difference(whole.model, train(llama, tmp_path, trainer_class=mistake, **parts).model) > 1e-5


def test_the_log_counts_the_clean_sweep_and_the_clean_evaluation_only(llama, tmp_path):
    """At learning rate 0 the stock trainer of TRL and ours log the same, with all that ours computes beside."""
    options = {
        "learning_rate": 0.0,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_data": pairs(8),
    }
    ours = make(llama, tmp_path, eval_patterns=["unstructured:0.9"], **options)
    ours.build_family(["2:4"])
    ours.train()
    ours.build_family(["2:4"])
    stock = train(llama, tmp_path, trl.SFTTrainer, config=trl.SFTConfig, **options)
    log = ours.state.log_history
    assert len(log) == len(stock.state.log_history)
    for mine, theirs in zip(log, stock.state.log_history, strict=True):
        theirs = {k: v for k, v in theirs.items() if not re.search("second|runtime|flos|grad_norm", k)}
        assert {k: mine[k] for k in theirs} == pytest.approx(theirs, abs=1e-5)
    assert {"entropy", "mean_token_accuracy", "num_tokens", "compressed_loss"} <= set(log[0])
    assert log[0]["compressed_loss"] != pytest.approx(log[0]["loss"], abs=1e-4)
    assert log[1]["eval_unstructured-0.90_loss"] != pytest.approx(log[1]["eval_loss"], abs=1e-4)
    ours.evaluate()
    assert log[-1]["eval_mean_token_accuracy"] == pytest.approx(log[1]["eval_mean_token_accuracy"])


def test_a_family_holds_the_loss_of_every_variant_as_stock_transformers_computes_it(llama, tmp_path):
    trainer = make(llama, tmp_path, eval_data=[{"text": t} for t in texts(8)], data=[{"text": t} for t in texts()])
    trainer.train()
    before = {name: w.clone() for name, w in trainer.model.state_dict().items()}
    family = trainer.build_family(["2:4", "unstructured:0.9", "int8"])
    losses = []
    for variant in (family.dense, *family.variants):
        model = AutoModelForCausalLM.from_pretrained(family.path_to(variant))
        tokenizer = AutoTokenizer.from_pretrained(family.path_to(variant))
        encoded = tokenizer([f"{t}</s>" for t in texts(8)], padding=True, return_tensors="pt")
        labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
        with torch.no_grad():
            losses.append(
                model(encoded["input_ids"], attention_mask=encoded["attention_mask"], labels=labels).loss.item()
            )
        assert variant.metrics["loss"] == pytest.approx(losses[-1], abs=1e-5)
        assert variant.loads_with == "transformers"
    assert len({round(loss, 4) for loss in losses[:3]}) == 3
    weight = AutoModelForCausalLM.from_pretrained(family.path_to("2:4")).model.layers[0].mlp.up_proj.weight
    assert ((weight.reshape(-1, 4) != 0).sum(1) <= 2).all()
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], abs=1e-5)
    assert trainer.model.training is False


def test_packed_sequences(llama, tmp_path):
    data = [{"text": t} for t in texts()]
    options = {"data": data, "eval_data": data[:8], "packing": True, "max_length": 24, "max_steps": 2}
    trainer = train(llama, tmp_path, **options)
    assert len(trainer.train_dataset) < len(data)
    assert "compressed_loss" in trainer.state.log_history[0]
    assert trainer.build_family(["2:4"])["2:4"].metrics["loss"] > 0
    with pytest.raises(ValueError, match="leave second_share at 1"):
        train(llama, tmp_path, second_share=0.5, **options)


def test_resume_is_exact(llama, tmp_path):
    straight = train(llama, tmp_path / "straight", max_steps=6, optim="adamw_torch")
    train(llama, tmp_path / "parts", max_steps=3, optim="adamw_torch", save_strategy="steps", save_steps=3)
    resumed = train(llama, tmp_path / "parts", max_steps=6, optim="adamw_torch", resume=True)
    assert resumed.state.log_history[-2]["step"] == 6
    assert largest_difference(straight.model, resumed.model) == 0


def test_the_arguments_of_the_method_alone_are_refused(llama, tmp_path):
    with pytest.raises(ValueError, match="takes a CrAMSFTConfig as `args`, got CrAMConfig"):
        make(llama, tmp_path, config=hfc.CrAMConfig)


def test_perplexity_is_that_of_all_tokens(llama, tmp_path):
    class WithPerplexity(hfc.CrAMMixin, PerplexityMixin, trl.SFTTrainer):
        pass

    rows = [{"text": "the"}, {"text": "a red cat sees the big dog and a small house"}]
    trainer = make(llama, tmp_path, WithPerplexity, eval_data=rows, per_device_eval_batch_size=1, eval_patterns=["2:4"])
    with torch.no_grad():
        trainer.model.lm_head.weight *= 20  # far from uniform, so that the two texts differ
    found = trainer.evaluate()
    losses, counts = [], []
    for row in rows:
        ids = trainer.processing_class(f"{row['text']}</s>", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            losses.append(trainer.model(ids, labels=ids).loss.item())
        counts.append(ids.shape[1] - 1)
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert found["eval_perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert found["eval_loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
    assert abs(sum(losses) / 2 - mean) > 1e-3
    assert found["eval_nm-2of4_perplexity"] != pytest.approx(found["eval_perplexity"], rel=1e-4)
    assert list(trainer.build_family(["2:4"]).dense.metrics) == ["loss", "perplexity"]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_on_another_trainer(name, tmp_path):
    """Defaults are TRL's, unless the method changes them."""
    method = compose(METHODS[name])
    args = method.config_class(str(tmp_path), use_cpu=True)
    stock = trl.SFTConfig(str(tmp_path), use_cpu=True)
    assert isinstance(args, (METHODS[name].config_class, trl.SFTConfig))
    assert (args.logging_steps, args.bf16, args.max_length) == (10, True, 1024)
    changes = name == "sfw"
    assert args.learning_rate == (0.1 if changes else stock.learning_rate)
    assert args.max_grad_norm == (0.0 if changes else stock.max_grad_norm)
    assert [kind.__name__ for kind in method.trainer_class.__mro__[:2]] == [
        f"{METHODS[name].mixin_class.__name__.removesuffix('Mixin')}SFTTrainer",
        METHODS[name].mixin_class.__name__,
    ]
    for kind in (method.trainer_class, method.config_class):
        assert getattr(supervised_finetuning, kind.__name__) is kind
    assert not hasattr(supervised_finetuning, "OtherSFTTrainer")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_command_line(name, llama, tmp_path):
    data = write_json_lines(tmp_path / "data.jsonl", pairs())
    flags = ["--method", name, "--task", "supervised-finetuning", "--model_name_or_path", str(llama)]
    flags += ["--dataset_name", str(data), "--validation_share", "0.25", "--max_steps", "2", "--use_cpu"]
    flags += ["--disable_tqdm", "true", "--output_dir", str(tmp_path / "out"), "--variants", "2:4"]
    if name == "tpp":
        flags += ["--patterns", "neurons:0.5", "heads:0.5", "--grow_steps", "2", "--stabilize_steps", "2"]
    assert run(["train", *flags]) == 0
    family = hfc.load_family(tmp_path / "out/_family")
    assert (family.method, family.task) == (name, "supervised-finetuning")
    for variant in (family.dense, *family.variants):
        assert list(variant.metrics) == ["loss", "perplexity"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def arguments(llama, data, **options):
    return SupervisedFinetuningArguments(model_name_or_path=str(llama), dataset_name=str(data), **options)


def test_data_are_held_out_chosen_and_left_to_trl(llama, tmp_path):
    rows = pairs(20)
    data = write_json_lines(tmp_path / "data.jsonl", rows)
    parts = prepare(arguments(llama, data, validation_share=0.2, max_train_samples=10, max_eval_samples=3))
    assert (len(parts["train_dataset"]), len(parts["eval_dataset"])) == (10, 3)
    assert parts["train_dataset"].column_names == ["prompt", "completion"]
    known = {(row["prompt"], row["completion"]) for row in rows}
    used = [(row["prompt"], row["completion"]) for part in ("train_dataset", "eval_dataset") for row in parts[part]]
    assert set(used) <= known


def test_a_folder_with_splits_and_a_column_of_text(llama, tmp_path):
    for split, count in (("train", 6), ("test", 2)):
        rows = [{"id": i, "article": text, "text": "another"} for i, text in enumerate(texts(count))]
        write_json_lines(tmp_path / f"{split}.jsonl", rows)
    parts = prepare(arguments(llama, tmp_path, text_column="article"))
    assert parts["train_dataset"].to_dict() == {"text": texts(6)}
    assert parts["eval_dataset"].to_dict() == {"text": texts(2)}
    assert parts["model"].dtype == torch.float32
    with pytest.raises(ValueError, match="text_column: no column 'body' in"):
        prepare(arguments(llama, tmp_path, text_column="body"))
    with pytest.raises(ValueError, match="no split 'dev'; there are: train, test"):
        prepare(arguments(llama, tmp_path, eval_split="dev"))


def test_data_of_no_known_format_are_refused(llama, tmp_path):
    data = write_json_lines(tmp_path / "data.jsonl", [{"prompt": "the cat", "answer": "sees"}] * 4)
    with pytest.raises(ValueError, match="columns prompt, answer; TRL takes one of messages, prompt and completion"):
        prepare(arguments(llama, data))
    for options, message in (({"validation_share": 1.0}, "between 0 and 1"), ({"max_eval_samples": 0}, "at least 1")):
        with pytest.raises(ValueError, match=message):
            arguments(llama, data, **options)


def test_without_trl_the_task_says_what_to_install(llama, tmp_path, monkeypatch):
    compose.cache_clear()
    monkeypatch.setitem(sys.modules, "trl", None)
    flags = ["--method", "cram", "--task", "supervised-finetuning", "--model_name_or_path", str(llama)]
    with pytest.raises(ValueError, match=r"pip install 'hf_compress\[trl\]'"):
        parse([*flags, "--dataset_name", "x", "--output_dir", str(tmp_path)])
