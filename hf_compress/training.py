"""What the trainers of all methods share: arguments, and a family cut from the model that was trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import has_length

from .checkpoints import is_whole, last_checkpoint
from .compressed_evaluation import CompressedEvaluationMixin, check_eval_patterns
from .distillation import DistillationMixin
from .distributed import run_on_main
from .family import Family, Variant, build_family
from .family.manifest import LOCAL
from .family.storage import check_storage
from .fused_sgd import FusedSGDMixin
from .loss_scaling import LossScalingMixin
from .patterns import Pattern, parse_patterns
from .targets import find_targets, refuse_adapters
from .training_data import TrainingBatches, generators_kept

if TYPE_CHECKING:
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object


@dataclass
class CompressionArguments(TrainingArguments):
    """`transformers.TrainingArguments` and what all methods share.

    Args:
        variants: patterns that `build_family` cuts from the trained model, and the command line at the end of a run.
        remove: cut the filters, neurons and heads of variants out instead of setting them to zero, see `compress`.
        multiple_of: so many filters or neurons or a multiple stay in every layer, rounded up, where they are cut out.
        storage: of variants: "coded" for entropy-coded ones, "dense" for plain tensors; by default what fits.
        include: globs on names of weights that patterns may touch, in place of the default choice.
        exclude: globs on names of weights that patterns must not touch.
        calibration_samples: training samples for the batch-norm statistics of each variant.
        check_loss_scaling: try before the first step whether the loss is divided by `num_items_in_batch`, and correct
            the Trainer where it wrongly believes so.
        eval_patterns: patterns whose compressed weights every evaluation scores too, under `eval_{revision}_{metric}`;
            batch norms are calibrated for each as for a variant.
        teacher: folder or Hub id of a trained model of the same class; half of the training loss is then the distance
            of the logits to its own, see `DistillationMixin`.
    """

    variants: list[str] | None = field(
        default=None, metadata={"help": "Patterns to cut from the trained model, such as unstructured:0.9 and 2:4."}
    )
    remove: bool = field(
        default=False, metadata={"help": "Cut filters, neurons and heads of variants out: smaller layers, no zeros."}
    )
    multiple_of: int = field(default=1, metadata={"help": "So many filters or neurons stay, or a multiple."})
    storage: str | None = field(
        default=None, metadata={"help": "Of variants: coded (entropy-coded whole numbers) or dense; else what fits."}
    )
    include: list[str] | None = field(
        default=None, metadata={"help": "Globs on names of weights that patterns may touch."}
    )
    exclude: list[str] | None = field(
        default=None, metadata={"help": "Globs on names of weights that patterns must not touch."}
    )
    calibration_samples: int = field(
        default=1000, metadata={"help": "Training samples for the batch-norm statistics of each variant."}
    )

    check_loss_scaling: bool = field(
        default=True, metadata={"help": "Correct the loss of heads that ignore num_items_in_batch."}
    )
    eval_patterns: list[str] | None = field(
        default=None, metadata={"help": "Patterns under which every evaluation scores the weights too, such as 2:4."}
    )
    teacher: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a trained model whose logits are half of the loss."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variants is not None:
            self.variants = list(map(str, parse_patterns(self.variants)))
        check_storage(self.storage, parse_patterns(self.variants or []))
        if self.push_to_hub and self.hub_revision is not None:
            raise ValueError("hub_revision does not apply: a family has a revision for each variant; leave it out")
        for name in ("calibration_samples", "multiple_of"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        checked = check_eval_patterns(self.eval_patterns or (), self.metric_for_best_model)
        self.eval_patterns = checked if self.eval_patterns is not None else None


class CompressionMixin(CompressedEvaluationMixin, DistillationMixin, LossScalingMixin, FusedSGDMixin, _TrainerBase):
    """Goes before a `Trainer` class. Methods derive from it and set `method` and `config_class`."""

    method: ClassVar[str]
    config_class: ClassVar[type[CompressionArguments]]
    makes_variant: ClassVar[bool] = False  # whether the training itself ends in a variant, beside a dense model
    args: Any
    model: Any
    optimizer: Any
    train_dataset: Any
    _family: Family | None = None
    _is_resumed = False  # whether the weights that an optimizer is made for are those of a checkpoint

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(CompressionMixin)]
        # Not by identity, since importing the class is slow. Its methods would hide all of the mixin's.
        if any((kind.__module__, kind.__name__) == ("transformers.trainer", "Trainer") for kind in before):
            mixin = next(k.__name__ for k in cls.__mro__ if issubclass(k, CompressionMixin) and "Mixin" in k.__name__)
            raise TypeError(f"{cls.__name__}: {mixin} goes before the Trainer, as in class Mine({mixin}, Trainer)")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("args", args[1] if len(args) > 1 else None)
        if given is not None:  # the Trainer would stumble over its first missing field
            self._check_kind(given)
        super().__init__(*args, **kwargs)
        self._check_kind(self.args)
        refuse_adapters(self.model, type(self).__name__)
        self._has_own_forward = "forward" in vars(self.model)
        find_targets(self.model, self.args.include, self.args.exclude)  # a wrong glob fails before the training
        self._check_cuts()
        self._load_teacher()

    def _check_kind(self, args: Any) -> None:
        if not isinstance(args, self.config_class):
            raise ValueError(
                f"{type(self).__name__} takes a {self.config_class.__name__} as `args`, got {type(args).__name__}; "
                "every field of TrainingArguments is a field of it, and HfCompressConfig is for from_pretrained"
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; a checkpoint whose save was interrupted is passed over for the last whole one.

        Raises:
            ValueError: if `resume_from_checkpoint` is True and there is no whole one, or names one that is not.
        """
        checkpoint = self._whole_checkpoint(resume_from_checkpoint)
        self._is_resumed = checkpoint is not None
        return super().train(checkpoint, *args, **kwargs)

    def _whole_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        if resume_from_checkpoint is True:
            if (last := self._last_checkpoint()) is None:
                folder = self.args.output_dir
                raise ValueError(f"no whole checkpoint in {folder}; start without resume_from_checkpoint")
            return last
        if resume_from_checkpoint and not is_whole(resume_from_checkpoint, self.args.world_size):
            raise ValueError(
                f"{resume_from_checkpoint} is no checkpoint, or its save was interrupted; "
                "resume_from_checkpoint=True takes the last whole one of output_dir"
            )
        return resume_from_checkpoint or None

    def _last_checkpoint(self) -> str | None:
        return last_checkpoint(self.args.output_dir, self.args.world_size)

    def build_family(
        self,
        patterns: Sequence[str | Pattern] | None = None,
        output_dir: str | Path | None = None,
        recipe: dict[str, Any] | None = None,
        task: str | None = None,
        progress: Callable[[Variant], None] | None = None,
    ) -> Family:
        """Cut variants from the model as it is now, measure each as it is loaded back from disk, and save them all.

        Args:
            patterns: what to cut; `args.variants` by default.
            output_dir: a new folder; `args.output_dir`/_family by default, where an older family is replaced.
            recipe: how the model was trained, for the manifest; the arguments that differ from their defaults
                stand there by default.
            task: name of the task, for the manifest.
            progress: called with every variant when it is done, the dense checkpoint first.

        Returns:
            The family, read from its folder. Metrics come from `eval_dataset` and `compute_metrics`, batch-norm
            statistics from `train_dataset`.

        Raises:
            ValueError: without patterns, for a wrong one, or if the folder holds something else.
        """
        patterns = self.args.variants if patterns is None else patterns
        if not patterns and not self.makes_variant:
            raise ValueError('no patterns: pass some, such as ["unstructured:0.9", "2:4"], or set `variants`')
        with generators_kept():
            self._family = build_family(
                self._whole_model(),
                patterns or [],
                trained=self._trained_variants(),
                evaluate=self.evaluate_variant if self.eval_dataset is not None else None,
                calibration_data=TrainingBatches(self, self.args.seed) if self.train_dataset is not None else None,
                calibration_samples=self.args.calibration_samples,
                output_dir=Path(self.args.output_dir) / "_family" if output_dir is None else output_dir,
                method=self.method,
                task=task,
                recipe=recipe_of(self.args) if recipe is None else recipe,
                processing_class=self.processing_class,
                include=self.args.include,
                exclude=self.args.exclude,
                remove=self.args.remove,
                multiple_of=self.args.multiple_of,
                storage=self.args.storage,
                progress=progress,
            )
        if self.args.push_to_hub:
            self.push_to_hub()
        return self._family

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Publish the family that was built last (of `args.variants`, if none was), instead of a bare checkpoint.

        `build_family` does it when `args.push_to_hub` is set; checkpoints in between are not sent, whatever
        `hub_strategy` says.

        Args:
            commit_message: of every commit.
            blocking: the family is there when this returns, also with False.
            token: with write access, `args.hub_token` by default.
            revision: only None: every variant has its own.
            private: of a new repository, `args.hub_private_repo` by default.
            **kwargs: fields of the stock card, which are not looked at: ours is rendered from the manifest.

        Returns:
            Where it is, and the commit of each revision (None where nothing had changed).

        Raises:
            ValueError: with a revision, or without a family and without patterns to cut one.
        """
        if revision is not None:
            raise ValueError(f"revision={revision!r}: every variant has its own revision; leave it out")
        family = self._family or self.build_family()
        return run_on_main(
            lambda: family.push_to_hub(
                self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
                private=self.args.hub_private_repo if private is None else private,
                token=token or self.args.hub_token,
                commit_message=commit_message,
            )
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; nothing is pushed here, the family is published once at the end."""
        super().save_model(output_dir, _internal_call=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        pass  # a checkpoint on main beside a family would be loaded in its place

    def _whole_model(self) -> Any:
        """The model without wrappers; under FSDP a copy with the weights gathered, which rank 0 alone has."""
        model = self.accelerator.unwrap_model(self.model)
        if not self.is_fsdp_enabled:
            return model
        state = self.accelerator.get_state_dict(self.model)
        plain_class: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
        whole = plain_class(copy.deepcopy(model.config))
        for name in ("_weight_conversions", "generation_config"):
            if hasattr(model, name):
                setattr(whole, name, getattr(model, name))
        if self.accelerator.is_main_process:
            whole.load_state_dict(state)
        return whole.to(self.args.device)

    def _trained_variants(self) -> dict[str, Any]:
        """Pattern to model, of variants that the training has made."""
        return {}

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Row after row: `group_by_length` would shuffle this data set too, and answers belong to their questions."""
        return SequentialSampler(eval_dataset) if has_length(eval_dataset) else None

    def evaluate_variant(self, model: torch.nn.Module) -> dict[str, Any]:
        """Metrics of another model on `eval_dataset`, without a trace in the log or in callbacks."""
        names = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else [None]
        metrics: dict[str, Any] = {}
        loss_only = True if self.compute_metrics is None else None
        with self._in_place_of_the_model(model.to(self.args.device)), self.accelerator.autocast():
            for name in names:
                prefix = f"eval_{name}" if name else "eval"
                loader = self.get_eval_dataloader(name)
                output = self.evaluation_loop(loader, "Evaluation", loss_only, metric_key_prefix=prefix)
                metrics |= {k.removeprefix("eval_"): v for k, v in (output.metrics or {}).items()}
        return {k: v for k, v in metrics.items() if not k.endswith("model_preparation_time")}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._restore_weights(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._restore_weights(str(self.state.best_model_checkpoint)):
            super()._load_best_model()

    def _restore_weights(self, folder: str) -> bool:
        """Load the weights of a checkpoint as `from_pretrained` reads them; False where that is not its format.

        The stock Trainer takes the names in the file for those of the model. Many architectures have other names on
        disk (ViT, all of timm): their weights stay what they were, with a warning (transformers#43701).
        """
        model = self.accelerator.unwrap_model(self.model)
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if is_sharded or not isinstance(model, PreTrainedModel) or not (Path(folder) / "config.json").is_file():
            return False
        model_class: Any = type(model)
        try:
            restored, info = model_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
        except TypeError:  # a class that is made of more than its config
            return False
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(f"{folder} is incomplete: it lacks {len(missing)} weights, first {missing[0]}")
        model.load_state_dict(restored.state_dict())
        return True

    @contextmanager
    def _in_place_of_the_model(self, model: Any) -> Iterator[None]:
        own = self.model, self.model_wrapped, self.callback_handler.callbacks
        parts = "_modules", "_parameters", "_buffers", "training"
        kept = {name: vars(own[0])[name] for name in parts}
        if self._has_own_forward:  # TRL's is bound to the model: the parts of the other go there
            vars(own[0]).update({name: vars(model)[name] for name in parts})
            model = own[0]
        self.model = self.model_wrapped = model
        self.callback_handler.callbacks = []
        try:
            with self._unrecorded():
                yield
        finally:
            vars(own[0]).update(kept)
            self.model, self.model_wrapped, self.callback_handler.callbacks = own

    def _compressed_metrics(self, *args: Any) -> dict[str, float]:
        with self._unrecorded():
            return super()._compressed_metrics(*args)

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        """What trainers of TRL gather for the log while they compute losses is afterwards what it was."""
        is_of_trl = any(kind.__module__.startswith("trl.") for kind in type(self).__mro__)
        names = {"_metrics", "_total_train_tokens"} & set(vars(self)) if is_of_trl else ()
        kept = {name: copy.deepcopy(vars(self)[name]) for name in names}
        try:
            yield
        finally:
            vars(self).update(kept)


def recipe_of(*parts: Any) -> dict[str, Any]:
    """The changed arguments of all parts, and under `LOCAL` the names of those left out as paths of this machine."""
    recipe: dict[str, Any] = {}
    local: list[str] = []
    for part in parts:
        recipe |= changed_arguments(part)
        given = {f.name: getattr(part, f.name) for f in fields(part) if f.init and not _is_of_this_run(f.name)}
        local += [name for name, value in given.items() if _is_of_this_machine(value)]
    return {**recipe, **({LOCAL: local} if local else {})}


def changed_arguments(args: Any) -> dict[str, Any]:
    """The fields of a dataclass of arguments that differ from their defaults, as JSON; no absolute paths or secrets."""
    changed = {}
    for f in fields(args):
        value, default = getattr(args, f.name), f.default if f.default_factory is MISSING else f.default_factory()
        if isinstance(value, Enum):
            value = value.value
        is_plain = value is None or isinstance(value, (bool, int, float, str, list, dict))
        is_left_out = _is_of_this_run(f.name) or _is_of_this_machine(value)
        if f.init and not is_left_out and is_plain and value != default:
            changed[f.name] = value
    return changed


def _is_of_this_run(name: str) -> bool:
    left_out = {"output_dir", "resume_from_checkpoint", "use_cpu", "push_to_hub"}
    return name in left_out or name.startswith("hub_")


def _is_of_this_machine(value: Any) -> bool:
    return isinstance(value, str) and Path(value).is_absolute()
