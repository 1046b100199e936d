"""Supervised fine-tuning of causal language models, with TRL's `SFTTrainer` behind the method.

Data come from the Hub, a folder, or a file. Their format is TRL's: plain text, prompts and completions, or messages,
see https://huggingface.co/docs/trl/dataset_formats; tokens, chat templates, packing and masks are TRL's too. TRL is
an extra, and is imported when this task is used.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset

from ..methods.registry import METHODS, Method
from .data import check_columns, check_counts, hold_out, load_splits, some, used_splits

if TYPE_CHECKING:
    from transformers import Trainer as _TrainerBase
else:
    _TrainerBase = object

DEFAULT_FLAGS: dict[str, Any] = {}
# Columns that TRL takes as they are, the first format whose columns are all there.
_FORMATS = (("messages",), ("prompt", "completion"), ("conversations",), ("text",), ("input_ids",))


@dataclass
class SupervisedFinetuningArguments:
    """Data and model of a supervised fine-tuning run.

    Args:
        model_name_or_path: a pretrained causal language model with its tokenizer, local or on the Hub.
        dataset_name: a data set of the Hub, a local folder, or a file (JSON, JSON lines, CSV, TSV, parquet, text).
        dataset_config_name: of a Hub data set with several.
        text_column: of plain text, in place of the columns that TRL knows: messages, prompt and completion, text.
        eval_split: evaluated on; "validation" or "test" by default, whichever comes first.
        validation_share: share of the training data held out, where there is no split to evaluate on.
        data_seed_split: seed of that split, and of the choice of max_train_samples and max_eval_samples.
        max_train_samples: so many, chosen at random, for a trial run.
        max_eval_samples: so many, chosen at random, for a trial run.
    """

    model_name_or_path: str = field(metadata={"help": "A pretrained causal language model."})
    dataset_name: str = field(metadata={"help": "A Hub data set, a local folder, or a file."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    text_column: str | None = field(default=None, metadata={"help": "Column of plain text."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    validation_share: float = field(default=0.05, metadata={"help": "Share held out where there is no eval split."})
    data_seed_split: int = field(default=0, metadata={"help": "Seed of the held-out share and of max_*_samples."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use so many only, chosen at random."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use so many only, chosen at random."})

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must be between 0 and 1, got {self.validation_share}")
        check_counts(max_train_samples=self.max_train_samples, max_eval_samples=self.max_eval_samples)


class PerplexityMixin(_TrainerBase):
    """Goes before a `Trainer` class for causal models; evaluations get "perplexity" beside "loss".

    It is exp of the mean loss of a token, over all tokens of the data set; "loss" is the mean of the batches' means.
    """

    _token_losses: list[torch.Tensor]  # for each batch their sum, and how many there are

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As of the class behind it; the losses of the tokens are kept."""
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None:
            count = (inputs["labels"][:, 1:] != -100).sum().to(loss.device)
            self._token_losses.append(torch.stack([loss.float() * count, count.float()]))
        return loss, logits, labels

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As of the class behind it, with the perplexity among its metrics."""
        self._token_losses = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if output.metrics is not None and self._token_losses:
            sums = torch.stack(self._token_losses).cpu().double().sum(0).float()
            total, count = self.accelerator.reduce(sums.to(self.args.device), "sum")
            output.metrics[f"{metric_key_prefix}_perplexity"] = (total / count).exp().item()
        return output


@functools.cache
def compose(method: Method) -> Method:
    """The method in front of `PerplexityMixin` and TRL's `SFTTrainer`; its classes are attributes of this module too.

    Raises:
        ValueError: if TRL is not installed.
    """
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise ValueError(
            f"supervised-finetuning needs TRL, which cannot be imported ({error}): pip install 'hf_compress[trl]'"
        ) from error
    return method.on(type("SFTTrainer", (PerplexityMixin, SFTTrainer), {}), SFTConfig, __name__)


def __getattr__(name: str) -> Any:
    """CrAMSFTTrainer, CrAMSFTConfig and those of the other methods."""
    if name.endswith(("SFTTrainer", "SFTConfig")):
        for method in map(compose, METHODS.values()):
            for kind in (method.trainer_class, method.config_class):
                if kind.__name__ == name:
                    return kind
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def prepare(args: SupervisedFinetuningArguments) -> dict[str, Any]:
    """What `SFTTrainer` takes: model, data sets as they were read, processing_class."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train, evaluation = _load_data(args)
    return {
        # Master weights; TRL's bf16 is mixed precision.
        "model": AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32),
        "train_dataset": train,
        "eval_dataset": evaluation,
        "processing_class": AutoTokenizer.from_pretrained(args.model_name_or_path),
    }


def _load_data(args: SupervisedFinetuningArguments) -> tuple[Dataset, Dataset]:
    """The samples to train and to evaluate on, in a format that TRL knows."""
    name, seed = args.dataset_name, args.data_seed_split
    splits = load_splits(name, args.dataset_config_name)
    used = used_splits(splits, name, args.eval_split)
    if args.text_column is not None:
        check_columns(splits, used, name, text_column=args.text_column)
    train, *others = (_in_a_format(splits[split], split, args) for split in used)
    if not others:
        train, *others = hold_out(train, args.validation_share, seed, None)
    return some(train, args.max_train_samples, seed), some(others[0], args.max_eval_samples, seed)


def _in_a_format(dataset: Dataset, split: str, args: SupervisedFinetuningArguments) -> Dataset:
    """Only the column of plain text, as "text", or the data set as it is where TRL knows what it holds."""
    if args.text_column is not None:
        return dataset.select_columns([args.text_column]).rename_columns({args.text_column: "text"})
    if not any(set(columns) <= set(dataset.column_names) for columns in _FORMATS):
        known = ", ".join(" and ".join(columns) for columns in _FORMATS)
        raise ValueError(
            f"split {split!r} of {args.dataset_name} has the columns {', '.join(dataset.column_names)}; TRL takes one "
            f"of {known}. Name the column of plain text with text_column"
        )
    return dataset
