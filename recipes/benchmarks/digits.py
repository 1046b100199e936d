"""One run on the digits, for the benchmarks that compare methods there: train, cut all variants, measure."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from transformers import set_seed

from hf_compress.methods.registry import METHODS
from hf_compress.tasks.image_classification import DEFAULT_FLAGS, ImageClassificationArguments, prepare

RECIPES = Path(__file__).parents[1] / "image-classification"


def run(
    recipe: str, setting: dict[str, Any], patterns: list[str], seed: int, epochs: int, tuning: bool = False
) -> dict[str, Any]:
    """Train once as a recipe and a setting say, and cut all variants; accuracies in points.

    Args:
        recipe: name of a packaged one.
        setting: flags that override it.
        patterns: of the variants.
        seed: of the run, and of the split into training and test data (30 %, by class).
        epochs: of training.
        tuning: judge on 30 % of the training data, and leave the test data alone.
    """
    content = {**yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())}
    method = METHODS[content["method"]]
    of_task = ImageClassificationArguments.__dataclass_fields__
    of_run = method.config_class.__dataclass_fields__
    flags = {k: float(v) if k == "weight_decay" else v for k, v in content.items() if k in of_run}
    flags |= {**DEFAULT_FLAGS, "num_train_epochs": epochs, "seed": seed, "logging_strategy": "no"}
    set_seed(seed)
    task = ImageClassificationArguments(**{k: v for k, v in content.items() if k in of_task}, data_seed_split=seed)
    parts = prepare(task)
    if tuning:
        split = parts["train_dataset"].train_test_split(test_size=0.3, seed=seed, stratify_by_column="label")
        parts |= {"train_dataset": split["train"], "eval_dataset": split["test"]}
    with tempfile.TemporaryDirectory() as folder:
        own = {"output_dir": folder, "disable_tqdm": True, "use_cpu": True, "variants": None}
        trainer: Any = method.trainer_class(args=method.config_class(**{**flags, **setting, **own}), **parts)
        start = time.time()
        trainer.train()
        seconds = time.time() - start
        family = trainer.build_family(patterns)
        points = {str(v.pattern or "dense"): round(100 * v.metrics["accuracy"], 3) for v in family.checkpoints}
    return {"accuracy": points, "seconds": round(seconds, 1)}


def best_of(rows: list[dict[str, Any]], keys: list[str], judged_by: tuple[str, ...]) -> dict[str, Any]:
    """The setting whose mean accuracy over some checkpoints is highest."""
    row = max(rows, key=lambda r: statistics.mean(r["accuracy"][p] for p in judged_by))
    return {key: row[key] for key in keys}


def mean(rows: list[dict[str, Any]], pattern: str) -> dict[str, float]:
    """Mean and standard deviation over seeds."""
    values = [row["accuracy"][pattern] for row in rows]
    return {"mean": round(statistics.mean(values), 3), "std": round(statistics.stdev(values), 3)}


def paired(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], pattern: str) -> dict[str, float]:
    """The mean difference over seeds, and its standard error."""
    differences = [a["accuracy"][pattern] - b["accuracy"][pattern] for a, b in zip(ours, theirs, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return {"difference": round(statistics.mean(differences), 3), "standard_error": round(error, 3)}


def facts() -> dict[str, Any]:
    """Machine and versions."""
    return {
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "versions": {p: importlib.metadata.version(p) for p in ("hf_compress", "torch", "transformers")},
    }
