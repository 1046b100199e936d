"""Cut variants from a model, and measure each one as it is loaded back from disk."""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging

from ..calibration import like_parameters, recalibrate_batch_norm
from ..distributed import is_main_process, run_on_main
from ..loading.statistics import StatisticsPack, explained, renew_
from ..oneshot import CompressionReport, compress
from ..patterns import Pattern, Unstructured, distinct_patterns, parse_pattern
from ..structure import describe
from ..targets import unwrap
from .family import Family, load_family
from .footprint import count_macs, count_parameters, disk_bytes
from .latency import measure_latency
from .manifest import Manifest, commit_folder, start_folder, write_manifest
from .plots import plot_family
from .statistics import SLIDER_SHARES, measure_statistics
from .storage import changes_shapes, check_storage, count_scales, load_model, save_model
from .variant import Variant

logger = logging.get_logger(__name__)

Evaluate = Callable[[Any], Mapping[str, Any]]


def build_family(
    model: nn.Module,
    patterns: Sequence[str | Pattern],
    evaluate: Evaluate | None = None,
    calibration_data: Iterable[Any] | None = None,
    output_dir: str | Path = "family",
    *,
    calibration_samples: int = 1000,
    slider_shares: Sequence[float] = SLIDER_SHARES,
    statistics: StatisticsPack | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    method: str = "one_shot",
    task: str | None = None,
    recipe: dict[str, Any] | None = None,
    processing_class: Any = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    remove: bool = False,
    multiple_of: int = 1,
    storage: str | None = None,
    trained: Mapping[str, Any] | None = None,
    before_save: Callable[[Any], None] | None = None,
    progress: Callable[[Variant], None] | None = None,
) -> Family:
    """Save a model and variants of it, each cut in one shot from the saved dense checkpoint, with measured numbers.

    The folder appears when everything is in it: dense/, a folder for each variant, batch_norm.safetensors where there
    are batch norms and data for them, plots/ and family.json with the hash of every file. With several processes all of
    them call this; rank 0 writes, all evaluate.

    Args:
        model: with `save_pretrained` and `from_pretrained`; it is not changed.
        patterns: such as ["unstructured:0.9", "2:4"].
        evaluate: takes a model in eval mode on the device of `model`, returns its metrics, the main one first; what is
            no number is left out.
        calibration_data: batches of training data (iterated anew for every variant) for batch-norm statistics.
        output_dir: a new folder, an empty one, or an older family that is replaced at the end.
        calibration_samples: how many samples to take at most.
        slider_shares: of unstructured patterns whose batch-norm statistics are stored for the dense checkpoint,
            with those of the variants, so that pruning on load needs no data; not where it has no batch norms.
        statistics: without `calibration_data`, those that are stored for the model, as `find_pack` gives them.
        example_inputs: keyword arguments of the model for MACs and latency; the first sample of `calibration_data`
            by default.
        method: that trained the model.
        task: such as "image-classification".
        recipe: how the model was trained; JSON.
        processing_class: tokenizer or image processor, saved with every checkpoint.
        include: globs on names, see `find_targets`.
        exclude: globs on names, see `find_targets`.
        remove: cut filters, neurons and heads out, see `compress`; other patterns are what they are without it.
        multiple_of: see `compress`.
        storage: of variants: "coded" for entropy-coded ones of few bits, "dense" for plain tensors, None for what fits.
        trained: pattern to model, of variants that were trained rather than cut; of the class of `model`, with latents
            where LilNetX trained it.
        before_save: changes the model of a variant that was cut, in place, when its batch norms have their statistics.
        progress: called with every variant when it is done, the dense checkpoint first.

    Raises:
        ValueError: for a wrong pattern, two with one revision, a model that cannot be saved, or a folder that holds
            something else. Nothing is left behind then.
        OSError: if the disk is full, or the finished folder cannot take its place; it is kept and named then.
    """
    model = unwrap(model)
    _check_arguments(model, calibration_data, recipe)
    if example_inputs is None and calibration_data is not None:
        example_inputs = _first_sample(calibration_data)
    made = {parse_pattern(pattern): unwrap(variant) for pattern, variant in (trained or {}).items()}
    cut = distinct_patterns([*made, *patterns])
    check_storage(storage, cut)
    target = Path(output_dir).absolute()
    partial = run_on_main(lambda: start_folder(target))
    job = _Job(model, partial, evaluate, calibration_data, calibration_samples, example_inputs)
    job.processing_class, job.include, job.exclude = processing_class, include, exclude
    job.remove, job.multiple_of, job.storage = remove, multiple_of, storage
    job.statistics, job.before_save = statistics, before_save
    job.patterns, job.slider_shares = [p for p in cut if p not in made], slider_shares
    try:
        with _without_progress_bars():
            dense, *variants = job.checkpoints(cut, made, progress)
        parts = dense, tuple(variants)
        manifest = Manifest(partial, method, task, _base_model(model), *parts, recipe or {}, _versions(), files={})
        run_on_main(lambda: _finish(manifest))
    except BaseException:
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    run_on_main(lambda: commit_folder(partial, target))  # which keeps the folder where it fails
    return load_family(target)


def _check_arguments(model: Any, calibration_data: Any, recipe: Any) -> None:
    if not hasattr(model, "save_pretrained") or not hasattr(type(model), "from_pretrained"):
        raise ValueError(
            f"{type(model).__name__} has no save_pretrained and from_pretrained; give a transformers model "
            "(a timm model in TimmWrapperForImageClassification)"
        )
    if isinstance(calibration_data, Iterator):
        raise ValueError("calibration_data is an iterator, which the first variant would use up; give a DataLoader")
    json.dumps(recipe, allow_nan=False)  # fails now rather than after the work


@dataclass
class _Job:
    """What is the same for all checkpoints of a family."""

    model: Any
    folder: Path
    evaluate: Evaluate | None
    calibration_data: Iterable[Any] | None
    calibration_samples: int
    example_inputs: Mapping[str, Any] | None
    processing_class: Any = None
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    remove: bool = False
    multiple_of: int = 1
    storage: str | None = None
    patterns: Sequence[Pattern] = ()
    slider_shares: Sequence[float] = ()
    statistics: StatisticsPack | None = None
    before_save: Callable[[Any], None] | None = None

    def checkpoints(
        self, patterns: Sequence[Pattern], made: Mapping[Pattern, Any], progress: Callable[[Variant], None] | None
    ) -> list[Variant]:
        """The dense checkpoint and one for every pattern; those in `made` were trained and are not cut."""
        done: list[Variant] = []
        for pattern in (None, *patterns):
            variant = made.get(pattern) if pattern else None
            done.append(self.checkpoint(pattern, done[0] if done else None, variant))
            if progress is not None:
                progress(done[-1])
        return done

    def checkpoint(self, pattern: Pattern | None, dense: Variant | None, trained: Any = None) -> Variant:
        """Write one checkpoint (the dense one without pattern), load it back and measure it."""
        name = pattern.revision if pattern else "dense"
        report: CompressionReport
        report, storage = run_on_main(lambda: self._write(name, pattern, trained))
        loaded = self._load(name)
        numbers = run_on_main(lambda: self._measure(name, loaded))  # before evaluate, which may change the type
        if pattern is None:
            run_on_main(self._write_statistics)
        metrics: dict[str, float | None] = {}
        if self.evaluate is not None:
            with torch.no_grad():
                metrics = _numbers(self.evaluate(loaded))
        return Variant(
            pattern=str(pattern) if pattern else None,
            revision=name if pattern else "main",
            path=name,
            made_by="one_shot" if pattern and trained is None else "trained",
            storage=storage,
            loads_with="hf_compress" if storage == "coded" else _loads_with(loaded),
            metrics=metrics,
            sparsity=report.sparsity,
            skipped=report.skipped,
            parameters_removed=dense.parameters - numbers["parameters"] if dense else 0,
            **numbers,
        )

    def _load(self, name: str) -> Any:
        loaded = load_model(type(self.model), self.folder / name)
        return loaded.to(next(self.model.parameters()).device).eval()

    def _write(self, name: str, pattern: Pattern | None, trained: Any) -> tuple[CompressionReport, str]:
        is_cut = pattern is not None and trained is None
        model = self._load("dense") if is_cut else self.model if pattern is None else trained
        if pattern is not None and is_cut:
            remove = changes_shapes(pattern, self.remove, self.storage)
            sizes = (self.multiple_of, self.example_inputs) if remove else ()
            report = compress(model, pattern, self.include, self.exclude, remove, *sizes)
            self._calibrate(model, pattern, remove)
            if self.before_save is not None:
                self.before_save(model)
        folder = self.folder / name
        kind = self.storage if pattern is not None else None
        options = kind, self.example_inputs if self.remove else None
        storage = save_checkpoint(model, self.processing_class, folder, pattern, self.include, self.exclude, *options)
        if not is_cut:  # a share of 0 changes nothing and counts the zeros
            report = compress(self._load(name), Unstructured(0.0), self.include, self.exclude)
        return report, storage

    def _calibrate(self, model: Any, pattern: Pattern, is_removed: bool) -> None:
        """Give the batch norms of a variant its own statistics, or say that they are not."""
        if self.calibration_data is not None:
            recalibrate_batch_norm(model, self.calibration_data, self.calibration_samples)
        elif problem := renew_(model, pattern, None if is_removed else self.statistics, (self.include, self.exclude)):
            logger.warning(f"{pattern}: {explained(problem)}")

    def _write_statistics(self) -> None:
        globs = self.include, self.exclude
        pack = self.statistics
        if self.calibration_data is not None:
            samples = self.calibration_data, self.calibration_samples
            pack = measure_statistics(lambda: self._load("dense"), self.patterns, self.slider_shares, *samples, *globs)
        if pack is not None:
            pack.save(self.folder)

    def _measure(self, name: str, loaded: Any) -> dict[str, Any]:
        raw, compressed = disk_bytes(self.folder / name)
        parameters, nonzero = (count - count_scales(loaded) for count in count_parameters(loaded))
        numbers = {"bytes": raw, "compressed_bytes": compressed, "parameters": parameters, "nonzero": nonzero}
        if self.example_inputs is None:
            return numbers
        inputs = {k: like_parameters(loaded, v) for k, v in self.example_inputs.items()}
        latency = measure_latency(loaded, self._load("dense"), inputs)
        return {**numbers, "macs": count_macs(loaded, inputs), "latency": latency}


def save_checkpoint(
    model: Any,
    processing_class: Any,
    folder: Path,
    pattern: Pattern | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    storage: str | None = None,
    example_inputs: Any = None,
) -> str:
    """Save a model, in integers or factors if it can be (see `save_model`), and its tokenizer or image processor.

    Returns:
        The storage of the model, see `save_model`.

    Raises:
        OSError: if the disk is full.
    """
    try:
        storage = save_model(model, folder, pattern, include, exclude, storage, example_inputs)
    except SafetensorError as error:  # which is no OSError, whatever the system said
        raise OSError(f"cannot write {folder}: {error}") from error
    if processing_class is not None:
        processing_class.save_pretrained(folder)
    return storage


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers draws two bars for every checkpoint that is saved and loaded."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _finish(manifest: Manifest) -> None:
    plot_family(manifest, manifest.folder / "plots" / "sparsity")
    write_manifest(manifest)


def _first_sample(batches: Iterable[Any]) -> dict[str, Any] | None:
    batch = next(iter(batches), None)
    if not isinstance(batch, Mapping):
        return None
    labels = ("labels", "label", "label_ids")
    return {k: v[:1] if isinstance(v, torch.Tensor) and v.ndim else v for k, v in batch.items() if k not in labels}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics that are one number; None, which JSON has a word for, where it is not finite."""
    found: dict[str, float | None] = {}
    for name, value in metrics.items():
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):  # a matrix, a text
            continue
        found[name] = number if math.isfinite(number) else None
    return found


def _loads_with(model: nn.Module) -> str:
    ours = any(type(m).__module__.split(".")[0] == "hf_compress" for m in model.modules())
    return "hf_compress" if ours or describe(model) else "transformers"


def _base_model(model: Any) -> str | None:
    """The name that it was loaded by; None for an absolute path, which is nobody's business."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if name and not Path(name).is_absolute() else None


def _versions() -> dict[str, str]:
    packages = ("hf_compress", "torch", "transformers", "timm", "datasets", "accelerate", "compressed-tensors")
    return {name: importlib.metadata.version(name) for name in packages}
