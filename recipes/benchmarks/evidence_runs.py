"""One run of a plan of evidence.py: train as its settings say, cut every variant, measure."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kept import QUIET, Run
from transformers import AutoModelForImageClassification, TrainerCallback, set_seed

import hf_compress as hfc
from hf_compress.calibration import fold_batch_norm_
from hf_compress.family.coded import round_rest_, save_coded
from hf_compress.family.footprint import disk_bytes
from hf_compress.methods.registry import METHODS

PLAIN: dict[str, Any] = {"rho": 0.0, "patterns": []}  # CrAM with nothing to be aware of is the wrapped optimizer
CALIBRATION_SAMPLES = 1000
EVALUATED_AT_ONCE = 250


@dataclass(frozen=True)
class Task:
    """What a run trains on, and how its models are judged.

    Attributes:
        parts: arguments of a Trainer.
        score: points of a model, on all samples or so many of them.
        samples: how many there are to judge with.
        batches: of the training data, for batch norms.
        load: a saved model, with what it takes to load it.
    """

    parts: dict[str, Any]
    score: Callable[[Any, int | None], float]
    samples: int
    batches: Callable[[], Iterable[Any]]
    load: Callable[[Path], Any] = AutoModelForImageClassification.from_pretrained


class StepTimes(TrainerCallback):
    """Processor seconds of every optimizer step: a busy machine does not change them much."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.moments.append(time.process_time())

    def median(self) -> float:
        steps = [b - a for a, b in zip(self.moments, self.moments[1:], strict=False)]
        return statistics.median(steps) if steps else 0.0


def measure(settings: Run, places: dict[str, str], weights: Path | None = None) -> Run:
    """Train once and judge the result; accuracies in points.

    Args:
        settings: all that the result depends on.
        places: where the names of the settings are found: of data and of weights.
        weights: folder for what was trained, so that other variants need no other training.
    """
    set_seed(settings["seed"])
    task = TASKS[settings["task"]["name"]](settings, places)
    start, wall = time.process_time(), time.time()
    trainer, step = trained(settings, task, weights)
    seconds = {"train": round(time.process_time() - start, 1), "step": round(step, 4)}
    start = time.process_time()
    result = judged(trainer.model.eval(), settings, task)
    seconds |= {"judge": round(time.process_time() - start, 1), "wall": round(time.time() - wall, 1)}
    return {**result, "seconds": seconds, "threads": torch.get_num_threads()}


def trained(settings: Run, task: Task, weights: Path | None) -> tuple[Any, float]:
    """The trainer behind its training, and the median of the seconds of a step."""
    is_plain = settings["method"] == "plain"
    method = METHODS["cram" if is_plain else settings["method"]]
    flags = {**QUIET, "use_cpu": not torch.cuda.is_available(), "remove_unused_columns": False}
    flags |= {**(PLAIN if is_plain else {}), **settings["flags"], "seed": settings["seed"]}
    gradual, times = settings.get("gradual"), StepTimes()
    callbacks: list[Any] = [times, *([hfc.GradualPruning(**gradual)] if gradual else [])]
    kept = weights and method.name in ("cram", "sfw") and weights / f"{name_of_training(settings)}.pt"
    with tempfile.TemporaryDirectory() as folder:
        args = method.config_class(folder, **flags)
        trainer: Any = method.trainer_class(args=args, callbacks=callbacks, **task.parts)
        if kept and kept.is_file():
            trainer.model.load_state_dict(torch.load(kept, weights_only=True))
            return trainer, 0.0
        trainer.train()
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(trainer.model.state_dict(), kept.with_suffix(".aside"))
        kept.with_suffix(".aside").replace(kept)
    return trainer, times.median()


def speed(settings: Run, places: dict[str, str], samples: int = 500) -> Run:
    """Seconds of a step of a short training, and of judging one model."""
    set_seed(settings["seed"])
    task = TASKS[settings["task"]["name"]](settings, places)
    trainer, step = trained(settings, task, None)
    samples, start = min(samples, task.samples), time.process_time()
    task.score(trainer.model.eval(), samples)
    judge = (time.process_time() - start) * task.samples / samples
    return {"seconds": {"step": round(step, 4), "judge_one": round(judge, 2)}}


def name_of_training(settings: Run) -> str:
    """Of the settings that the training depends on."""
    own = {k: v for k, v in settings.items() if k not in ("variants", "coded", "samples_as_cut", "made")}
    return hashlib.sha256(repr(sorted(own.items())).encode()).hexdigest()[:16]


def judged(model: Any, settings: Run, task: Task) -> Run:
    """The model as trained, every variant with old and new statistics of batch norms, and every coded file."""
    scores: dict[str, Any] = {settings["made"]: {"as_trained": task.score(model, None)}}
    for pattern in settings["variants"]:
        cut = copy.deepcopy(model)
        report = hfc.compress(cut, pattern)
        scores.setdefault(pattern, {})["zeros"] = round(report.sparsity, 4)
        if settings["samples_as_cut"]:
            scores[pattern]["as_cut"] = task.score(cut, min(settings["samples_as_cut"], task.samples))
        kind = "recalibrated" if recalibrate(cut, settings, task) else "one_shot"
        scores[pattern][kind] = task.score(cut, None)
    files = {pattern: coded(model, pattern, settings, task) for pattern in settings["coded"]}
    return {"scores": scores, "files": files, "parameters": sum(p.numel() for p in model.parameters())}


def recalibrate(model: Any, settings: Run, task: Task) -> int:
    """Statistics of the same training samples for every variant of a run; 0 for a model without batch norms."""
    torch.manual_seed(settings["seed"])
    return hfc.recalibrate_batch_norm(model, task.batches(), CALIBRATION_SAMPLES)


def coded(model: Any, pattern: str, settings: Run, task: Task) -> Run:
    """Bytes of all files of the entropy-coded checkpoint, and what they score as loaded."""
    cut = copy.deepcopy(model)
    if pattern != "lilnetx":
        hfc.compress(cut, pattern)
        if pattern != "int8":
            recalibrate(cut, settings, task)
    fold_batch_norm_(cut)
    round_rest_(cut)
    with tempfile.TemporaryDirectory() as folder:
        if pattern == "lilnetx":
            sample = {k: v[:2] for k, v in next(iter(task.batches())).items() if k != "labels"}
            save_coded(cut, Path(folder) / "coded", example_inputs=sample)
        else:
            save_coded(cut, Path(folder) / "coded", pattern)
        size, *_ = disk_bytes(Path(folder) / "coded")
        loaded = task.load(Path(folder) / "coded").eval()
        return {"bytes": size, "as_loaded": task.score(loaded, None)}


def images(settings: Run, places: dict[str, str]) -> Task:
    """CIFAR-10 from a folder of parquet files, decoded once in a process."""
    from cifar10_tpp import collate, load

    train, test = load(Path(places[settings["task"]["data"]]))
    train = train.without(0, None)
    train.is_augmented = settings["task"]["augmentation"] == "crop_flip"
    if settings["held_out"]:
        kept = train.without(0, -settings["held_out"])
        train, test = kept, train.without(len(kept), None)
        test.is_augmented = False
    model = image_model(settings["task"], places)

    def batch_of(data: Any, index: Iterable[int]) -> dict[str, torch.Tensor]:
        return collate([(data, i) for i in index])

    parts = {"model": model, "train_dataset": train, "data_collator": collate}
    return image_task(parts, train, test, batch_of)


def digits(settings: Run, places: dict[str, str]) -> Task:
    """The handwritten digits of scikit-learn; 30 % of them, by class and seed, are the test data."""
    own = {k: v for k, v in settings["task"].items() if k != "name"}
    model, train, test, collate = decoded_digits(json.dumps(own), settings["seed"])
    set_seed(settings["seed"])  # whether they were decoded before or now
    if settings["held_out"]:
        train, test = train[: -settings["held_out"]], train[-settings["held_out"] :]
    parts = {"model": copy.deepcopy(model), "train_dataset": train, "data_collator": collate}
    return image_task(parts, train, test, lambda data, index: collate([data[i] for i in index]))


@functools.cache
def decoded_digits(task: str, seed: int) -> tuple[Any, list[Any], list[Any], Any]:
    from hf_compress.tasks.image_classification import ImageClassificationArguments, prepare

    parts = prepare(ImageClassificationArguments(dataset_name="digits", **json.loads(task), data_seed_split=seed))
    return parts["model"], list(parts["train_dataset"]), list(parts["eval_dataset"]), parts["data_collator"]


def image_task(parts: dict[str, Any], train: Any, test: Any, batch_of: Callable[..., dict[str, torch.Tensor]]) -> Task:
    """A task of images: accuracy on the test images, batch norms from training images drawn by the global generator."""

    @torch.inference_mode()
    def score(model: Any, samples: int | None) -> float:
        right, count = 0, samples or len(test)
        model = model.to(memory_format=torch.channels_last)
        for start in range(0, count, EVALUATED_AT_ONCE):
            batch = batch_of(test, range(start, min(start + EVALUATED_AT_ONCE, count)))
            found = model(batch["pixel_values"].to(next(model.parameters()).device)).logits.argmax(-1).cpu()
            right += int((found == batch["labels"]).sum())
        return round(100 * right / count, 3)

    def batches() -> Iterable[Any]:
        order = torch.randperm(len(train))[:CALIBRATION_SAMPLES].tolist()
        for start in range(0, len(order), EVALUATED_AT_ONCE):
            yield {"pixel_values": batch_of(train, order[start : start + EVALUATED_AT_ONCE])["pixel_values"]}

    return Task(parts, score, len(test), batches)


def questions(settings: Run, places: dict[str, str]) -> Task:
    """Span extraction as in minilm_squad.py; points are F1."""
    from transformers import AutoModelForQuestionAnswering

    from hf_compress.tasks.question_answering import QuestionAnsweringArguments, prepare

    if settings["held_out"]:
        raise ValueError("questions are not held out: give the arms no grid")
    own = {k: v for k, v in settings["task"].items() if k not in ("name", "data", "model")}
    folder = Path(places[settings["task"]["data"]])
    files: Any = {"train_file": str(folder / "train.parquet"), "eval_file": str(folder / "validation.parquet")}
    model = places[settings["task"]["model"]]
    parts = prepare(QuestionAnsweringArguments(model, **files, **own, data_seed_split=settings["seed"]))
    parts["data_collator"].pad_to_multiple_of = 16
    parts["model"].set_attn_implementation("eager")  # faster than torch's on CPUs when probabilities are not dropped
    for layer in parts["model"].bert.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    with tempfile.TemporaryDirectory() as name:
        flags = {**QUIET, **PLAIN, "per_device_eval_batch_size": 8, "bf16": settings["flags"].get("bf16", False)}
        judge = hfc.CrAMTrainer(args=hfc.CrAMConfig(name, **flags), **{**parts, "model": copy.deepcopy(parts["model"])})

    def score(model: Any, samples: int | None) -> float:
        return round(judge.evaluate_variant(model)["f1"], 3)

    def batches() -> Iterable[Any]:
        return judge.get_train_dataloader()

    load = AutoModelForQuestionAnswering.from_pretrained
    return Task(parts, score, len(parts["eval_dataset"]), batches, load)


def image_model(task: Run, places: dict[str, str]) -> Any:
    """A net of timm, with the start weights that the plan names, or new."""
    import timm
    from safetensors.torch import load_file
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    labels: Any = {"num_labels": 10}
    config: Any = TimmWrapperConfig(architecture=task["model"], model_args=task.get("model_args", {}), **labels)
    model: Any = TimmWrapperForImageClassification(config)
    if task.get("weights"):
        file = Path(places[task["weights"]])
        if not hashlib.sha256(file.read_bytes()).hexdigest().startswith(task["weights_sha256"]):
            raise ValueError(f"{file} holds other weights than those of the plan, {task['weights_sha256']}...")
        state = load_file(file)
    else:
        state = timm.create_model(task["model"], num_classes=10, **task.get("model_args", {})).state_dict()
    model.timm_model.load_state_dict(state, strict=False)  # files may lack num_batches_tracked
    if task.get("stem") == "cifar":  # of the published nets for small images, which timm's cannot have
        width = model.timm_model.conv1.out_channels
        model.timm_model.conv1 = torch.nn.Conv2d(3, width, 3, padding=1, bias=False)
        torch.nn.init.kaiming_normal_(model.timm_model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.timm_model.maxpool = torch.nn.Identity()
    return model.to(memory_format=torch.channels_last)


TASKS = {"images": images, "digits": digits, "questions": questions}
