"""Scores of the compressed weights in every evaluation: compress in place, evaluate, restore bit for bit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .calibration import recalibrate_batch_norm
from .distributed import local, reshard
from .patterns import Pattern, distinct_patterns, parse_patterns
from .structure import find_coupled_targets
from .targets import Target
from .training_data import TrainingBatches, generators_kept

if TYPE_CHECKING:
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object

# A metric whose name holds one of these is meant to be one of compressed weights.
_OF_A_PATTERN = re.compile(r"(unstructured|filters|neurons|heads|low[-_]rank)[-:]\d|nm-\d+of\d")


class CompressedEvaluationMixin(_TrainerBase):
    """Makes `evaluate` score the weights under every pattern of `args.eval_patterns` too.

    The log, callbacks, trackers and the choice of the best model see `eval_{revision}_{metric}` beside `eval_{metric}`.
    """

    args: Any
    model: Any
    train_dataset: Any
    _cutting_flags: ClassVar[tuple[str, ...]] = ("eval_patterns", "variants")  # which hold patterns
    _score_compressed: Callable[[], dict[str, float]] | None = None

    def _check_cuts(self) -> None:
        """ValueError where a pattern could not be evaluated or cut, before anything is trained."""
        targets = self._targets() if any(getattr(self.args, flag) for flag in self._cutting_flags) else {}
        if self.args.eval_patterns:
            is_fsdp1 = self.is_fsdp_enabled and not self.accelerator.is_fsdp2
            if self.is_deepspeed_enabled or is_fsdp1 or getattr(self.model, "is_quantized", False):
                raise ValueError(
                    "eval_patterns writes into single weights, which DeepSpeed, FSDP1 and quantized models hide; leave "
                    "it out, or run on one process, with DistributedDataParallel or with FSDP2 (fsdp_version: 2)"
                )
            if not targets:
                raise ValueError(f"eval_patterns has nothing to compress: {type(self.model).__name__} has no target")
        for flag in self._cutting_flags:
            for pattern in parse_patterns(getattr(self.args, flag) or []):
                pattern.check(targets, flag)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """As of the class behind it, and then the same data with the weights under each of `args.eval_patterns`.

        Weights, buffers and random generators are afterwards what they were, also when an error is raised.

        Returns:
            The metrics, those of a pattern under `{prefix}_{revision}_{metric}`, without times.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.args.eval_patterns and not isinstance(data, dict):  # of a dict every data set comes here by itself
            self._score_compressed = lambda: self._compressed_metrics(eval_dataset, ignore_keys, metric_key_prefix)
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        finally:
            self._score_compressed = None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the compressed metrics to those of an evaluation, which returns and shows the same dict afterwards."""
        score = self._score_compressed
        if score is not None and any(key.endswith("_runtime") for key in logs):
            self._score_compressed = None
            logs.update(score())
        super().log(logs, *args, **kwargs)

    def _compressed_metrics(self, eval_dataset: Any, ignore_keys: Any, prefix: str) -> dict[str, float]:
        found: dict[str, float] = {}
        loss_only = True if self.compute_metrics is None else None
        model, targets = self.accelerator.unwrap_model(self.model), self._targets()
        with self._unobserved(), _restored(model, targets) as restore:
            loader = self.get_eval_dataloader(eval_dataset)
            for pattern in parse_patterns(self.args.eval_patterns):
                pattern.project_(targets)
                self._recalibrate(model)
                output = self.evaluation_loop(loader, "Evaluation", loss_only, ignore_keys, metric_key_prefix=prefix)
                for key, value in (output.metrics or {}).items():
                    if not key.endswith("_model_preparation_time"):
                        found[f"{prefix}_{pattern.revision}_{key.removeprefix(f'{prefix}_')}"] = value
                restore()
        return found

    def _recalibrate(self, model: nn.Module) -> None:
        """Batch norms as those of a variant."""
        if self.train_dataset is not None:
            with closing(iter(TrainingBatches(self, self.args.seed))) as batches:
                recalibrate_batch_norm(model, batches, self.args.calibration_samples)

    @contextmanager
    def _unobserved(self) -> Iterator[None]:
        """No callback sees the batches, and no random generator moves."""
        callbacks, device = self.callback_handler.callbacks, self.args.device
        self.callback_handler.callbacks = []
        try:
            with (
                generators_kept(),
                torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type),
            ):
                yield
        finally:
            self.callback_handler.callbacks = callbacks

    def _targets(self) -> dict[str, Target]:
        model = self.accelerator.unwrap_model(self.model)
        reshard(model)
        return find_coupled_targets(model, self.args.include, self.args.exclude)


@contextmanager
def _restored(model: nn.Module, targets: dict[str, Target]) -> Iterator[Callable[[], None]]:
    """Whatever happens inside, targets, their biases and batch-norm statistics are afterwards what they were.

    Yields:
        A function that restores them at once.
    """
    touched = [local(t.parameter) for t in targets.values()]
    touched += [local(t.bias) for t in targets.values() if t.bias is not None]
    touched += [b for m in model.modules() if isinstance(m, _BatchNorm) for b in m.buffers(recurse=False)]
    copies = [tensor.detach().clone() for tensor in touched]

    @torch.no_grad()
    def restore() -> None:
        reshard(model)
        for tensor, copy in zip(touched, copies, strict=True):
            tensor.copy_(copy)

    try:
        yield restore
    finally:
        restore()


def check_eval_patterns(patterns: str | Sequence[str | Pattern], best: str | None) -> list[str]:
    """The canonical texts of patterns to evaluate.

    Args:
        patterns: as flags name them.
        best: `metric_for_best_model`.

    Raises:
        ValueError: for a wrong pattern, two with one revision, or a `best` of a pattern that is not evaluated.
    """
    revisions = {pattern.revision: pattern for pattern in distinct_patterns(patterns)}
    if best is not None and _OF_A_PATTERN.search(best) and not any(f"_{r}_" in f"_{best}" for r in revisions):
        names = ", ".join(f"eval_{revision}_METRIC" for revision in revisions) or "none, as eval_patterns is not set"
        raise ValueError(
            f"metric_for_best_model={best!r} is of a pattern that is not evaluated; allowed of compressed weights: "
            f"{names}; add the pattern to eval_patterns, or choose another metric"
        )
    return [str(pattern) for pattern in revisions.values()]
