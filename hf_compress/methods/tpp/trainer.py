"""TPP in the Trainer: one run trains, regularizes, removes and retrains, and goes on where it was interrupted."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, SchedulerType, Trainer
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

from ...checkpoints import cpu_copy, last_checkpoint
from ...distributed import run_on_main
from ...oneshot import merged_on_disk
from ...patterns import distinct_patterns
from ...structure import remove, write_description
from ...targets import find_targets, refuse_half_precision
from ...training import CompressionMixin
from ...training_data import TrainingBatches, generators_kept
from .config import TPPConfig
from .penalty import TrainabilityPenalty
from .regularization import Regularization, TPPProgress, all_layers, read_progress
from .selection import Selection, select
from .trainability import mean_jacobian_singular_value

logger = logging.get_logger(__name__)

_MAX_OUTPUTS = 2000  # for each, the Jacobian takes a backward pass
# The parts of a run in their order, and the folder of their checkpoints inside `output_dir`.
PHASES = {"dense": "dense", "regularize": "regularized", "retrain": "."}


class TPPMixin(CompressionMixin):
    """Makes any `Trainer` class train with TPP: `class MyTPPTrainer(TPPMixin, MyTrainer)`.

    The model that is passed becomes smaller; `build_family` shows it beside the dense one. Checkpoints of the
    regularization lie in `output_dir`/regularized, those of the retraining in `output_dir`. While the penalty works,
    the log gets its "penalty_strength" and "penalty_norm" beside "grad_norm", which is of the task alone.
    """

    method = "tpp"
    config_class = TPPConfig
    makes_variant = True
    lr_scheduler: Any
    callback_handler: Any
    state: Any
    progress: TPPProgress
    regularization: Regularization
    _dense: Any = None
    _has_begun = False
    _stopped_at = 0
    _first_logs: dict[str, float | None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._first_logs = {}
        if self.optimizer is not None or self.lr_scheduler is not None or self.model_init is not None:
            raise ValueError(
                "TPP makes new parameters, which an optimizer or scheduler that is passed does not know, nor one that "
                "belongs to a model_init; pass a model, and name optimizer and scheduler in the arguments (optim, "
                "lr_scheduler_type), or pass optimizer_cls_and_kwargs"
            )
        self.progress = TPPProgress()
        self.add_callback(self.progress)
        self.regularization = Regularization(self._on_train_begin, self._on_step_begin)
        self.add_callback(self.regularization)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, for all parts of the run; True finds the last whole checkpoint of the last of them.

        Trackers see one training after the other, each from step 0.

        Raises:
            ValueError: under FSDP and DeepSpeed, for weights in half precision, for patterns that remove nothing or not
                exactly (tried on a copy before anything is trained), if this object has trained before, or as
                `CompressionMixin.train`.
        """
        self._refuse_what_does_not_fit()
        if self._has_begun:
            raise ValueError(
                "a TPPTrainer trains once, for its model becomes another one; make a new TPPTrainer with the model at "
                "the start, and pass resume_from_checkpoint=True to go on"
            )
        checkpoint = self._whole_checkpoint(resume_from_checkpoint)
        progress, is_done = read_progress(checkpoint) if checkpoint else (None, False)
        if progress is None or progress.phase == "dense":
            self._try_out()
        self._has_begun = True
        own, output = self.args, None
        history: list[dict[str, float]] = []
        if checkpoint and progress is not None:
            vars(self.progress).update(vars(progress))
            checkpoint = self._take_over(checkpoint, is_done)
        try:
            for phase in list(PHASES)[list(PHASES).index(self.progress.phase) :]:
                if progress is not None and phase == progress.phase and checkpoint is None:
                    continue  # it is done
                self._begin(phase)
                self.args = _arguments_of(phase, own)
                if self.args.max_steps <= 0 and self.args.num_train_epochs <= 0:
                    continue
                with self._early_stopping(phase == "retrain"):
                    output = super().train(checkpoint, *args, **kwargs)
                history += self.state.log_history
                checkpoint = None
                if phase == "regularize" and self.state.global_step < self.state.max_steps:
                    self._stopped_at = self.state.global_step
                    logger.warning(f"The regularization was stopped in step {self._stopped_at}; nothing is removed.")
                    break
        finally:
            self.args = own
        self.state.log_history = history
        return output

    @contextmanager
    def _early_stopping(self, is_wanted: bool) -> Iterator[None]:
        """Metrics fall while rows shrink, which is no reason to stop."""
        callbacks = self.callback_handler.callbacks
        kept = [] if is_wanted else [each for each in callbacks if isinstance(each, EarlyStoppingCallback)]
        self.callback_handler.callbacks = [each for each in callbacks if each not in kept]
        try:
            yield
        finally:
            self.callback_handler.callbacks += kept

    def _refuse_what_does_not_fit(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            name = "FSDP" if self.is_fsdp_enabled else "DeepSpeed"
            raise ValueError(
                f"TPP multiplies all rows of a layer with each other, and {name} deals them to the processes; launch "
                "it with DistributedDataParallel (DDP): accelerate launch --multi_gpu"
            )
        refuse_half_precision(self.model, "TPP")

    def _try_out(self) -> None:
        """What would fail later fails now, on a copy: the choice, the penalty, the removal, names of variants."""
        self.args.schedule(len(all_layers(self.model)))

        def tried() -> str:
            found, copied = self._selected(), cpu_copy(self.model)
            inputs = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in self._sample().items()}
            layers = [copied.get_submodule(path) for path in found.pruned]
            if self.args.penalty != "none" and not any(p.requires_grad for each in layers for p in each.parameters()):
                raise ValueError(
                    f"all {len(layers)} layers that lose {found.pattern} are frozen, so that no penalty could make it "
                    'needless; unfreeze them, or set penalty="none"'
                )
            TrainabilityPenalty(copied, found.pruned, inputs)
            remove(copied, found.pruned, inputs)
            return found.pattern

        distinct_patterns([run_on_main(tried), *(self.args.variants or ())])

    def _last_checkpoint(self) -> str | None:
        found = (self._last_of(phase) for phase in reversed(PHASES))
        return next((path for path in found if path), None)

    def _last_of(self, phase: str) -> str | None:
        return last_checkpoint(Path(str(self.args.output_dir)) / PHASES[phase], self.args.world_size)

    def _take_over(self, checkpoint: str, is_done: bool) -> str | None:
        """Be in the part of the run that a checkpoint is of.

        Returns:
            The checkpoint, whose weights the Trainer loads; None where that part was done, and they are loaded here.
        """
        phase = self.progress.phase
        if phase != "dense":
            if self.args.dense_epochs:
                if (dense := self._last_of("dense")) is None:
                    folder = f"{self.args.output_dir}/dense"
                    raise ValueError(f"{checkpoint} goes on from a dense model that is not in {folder}")
                self._load_from_checkpoint(dense)
            self._dense = cpu_copy(self.model)
        if phase == "retrain":
            self._remove()
        elif is_done:
            self._load_from_checkpoint(checkpoint)
            self._load_rng_state(checkpoint)
            return None
        return checkpoint

    def _begin(self, phase: str) -> None:
        """What happens before a part of the run, unless it was begun already."""
        if phase == self.progress.phase:
            return
        self.model = self.model_wrapped = _unprepared(self.accelerator.unwrap_model(self.model))
        self.optimizer = self.lr_scheduler = None
        if phase == "regularize":
            self._dense = cpu_copy(self.model)
            self._choose()
            self._first_logs = {"trainability": self.trainability(), "speed_up": self.progress.speed_up}
        else:
            before = self.trainability()
            self._remove()
            self._first_logs = {"trainability_before_removal": before, "trainability": self.trainability()}
        self.progress.phase = phase

    def _selected(self) -> Selection:
        args, model = self.args, self.model
        reasons = merged_on_disk(model, find_targets(model, include=["*"]))
        sizes = args.speed_up, args.multiple_of
        return select(model, args.patterns, self._sample(), *sizes, args.include, args.exclude, reasons)

    def _choose(self) -> None:
        """Which rows go, from the weights as they are now."""
        found: Selection = run_on_main(self._selected)
        for path, reason in found.skipped.items():
            logger.info(f"{path} keeps its shape: {reason}")
        self.progress.pruned, self.progress.pattern = found.pruned, found.pattern
        self.progress.speed_up = round(found.speed_up, 4)

    def _remove(self) -> None:
        self.regularization.end()
        remove(self.model, self.progress.pruned, self._sample())
        write_description(self.model)

    def _sample(self, count: int = 2) -> dict[str, Any]:
        """Training samples without their labels."""
        with generators_kept():
            batch = dict(next(iter(TrainingBatches(self, self.args.seed))))
        inputs: dict[str, Any] = self._prepare_inputs(batch)
        labels = {*self.label_names, "labels", "label", "label_ids"}
        cut = {k: v[:count] if isinstance(v, torch.Tensor) and v.ndim else v for k, v in inputs.items()}
        return {k: v for k, v in cut.items() if k not in labels}

    def trainability(self) -> float | None:
        """Mean Jacobian singular value on `trainability_samples` training samples; None for inputs without gradient."""
        if not self.args.trainability_samples:
            return None
        try:
            inputs = self._sample(self.args.trainability_samples)
            return mean_jacobian_singular_value(self.model, inputs, max_outputs=_MAX_OUTPUTS)
        except (ValueError, torch.OutOfMemoryError) as reason:
            logger.info(f"no mean Jacobian singular value: {reason}")
            return None

    def _trained_variants(self) -> dict[str, Any]:
        return {self.progress.pattern: self.model}

    def _whole_model(self) -> Any:
        if self._dense is None or self.progress.phase != "retrain":
            stopped = f": the regularization was stopped in step {self._stopped_at}" if self._stopped_at else " yet"
            raise ValueError(f"nothing has been removed{stopped}; call train() first")
        return self._dense.to(self.args.device)

    def _on_train_begin(self) -> None:
        """When model and optimizer of a part of the run are ready."""
        callbacks = self.callback_handler.callbacks  # the Trainer may have read this one from a checkpoint
        self.progress = next(each for each in callbacks if isinstance(each, TPPProgress))
        if self.progress.phase == "regularize":
            pruned, inputs = self.progress.pruned, self._sample()
            e_folds = self.regularization.begin(self.model, self.args, pruned, inputs, self.optimizer)
            self._first_logs["e_folds"] = e_folds

    def _on_step_begin(self) -> None:
        logs = {name: value for name, value in self._first_logs.items() if value is not None}
        self._first_logs = {}
        if logs and not self.state.global_step:
            self.log(logs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds strength and norm of the penalty in the step before."""
        if "loss" in logs:
            logs |= self.regularization.logs(max(0, self.state.global_step - 1))
        super().log(logs, *args, **kwargs)


def _unprepared(model: Any) -> Any:
    """The model as it was before Accelerate: removal is checked in full precision, and it can be prepared again."""
    vars(model).pop("_is_accelerate_prepared", None)
    if "_original_forward" in vars(model):
        del model.forward
        original = vars(model).pop("_original_forward")
        if original != model.forward:  # of TRL, which patches the model
            model.forward = original
    return model


def _arguments_of(phase: str, args: TPPConfig) -> TPPConfig:
    """What the Trainer is told in one part of the run."""
    own = copy.copy(args)
    own.output_dir = str(Path(str(args.output_dir)) / PHASES[phase])
    if phase == "retrain":
        return own
    own.load_best_model_at_end, own.metric_for_best_model = False, None
    if own.save_strategy == SaveStrategy.BEST:
        own.save_strategy = SaveStrategy(IntervalStrategy(own.eval_strategy).value)
    if phase == "dense":
        own.num_train_epochs, own.max_steps = args.dense_epochs, -1
        own.learning_rate = args.learning_rate if args.dense_learning_rate is None else args.dense_learning_rate
        return own
    rate = args.regularize_learning_rate
    own.learning_rate = args.learning_rate / 10 if rate is None else rate
    own.lr_scheduler_type, own.lr_scheduler_kwargs, own.warmup_steps = SchedulerType.CONSTANT, {}, 0
    own.max_steps, own.num_train_epochs = args.schedule().steps, 0
    return own


class TPPTrainer(TPPMixin, Trainer):
    """`transformers.Trainer` that trains with TPP; takes a `TPPConfig` as `args`, everything else as usual.

    ```python
    args = TPPConfig("out", patterns=["filters:0.5"], learning_rate=0.01, num_train_epochs=30)
    trainer = TPPTrainer(model=model, args=args, train_dataset=..., eval_dataset=...)
    trainer.train()
    family = trainer.build_family()
    ```
    """
