"""The methods that there are, for the command line and for listings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from transformers import TrainingArguments

from ..training import CompressionArguments, CompressionMixin
from .cram import CrAMConfig, CrAMMixin, CrAMTrainer
from .lilnetx import LilNetXConfig, LilNetXMixin, LilNetXTrainer
from .sfw import SFWConfig, SFWMixin, SFWTrainer
from .tpp import TPPConfig, TPPMixin, TPPTrainer


@dataclass(frozen=True)
class Method:
    """One way to train: its classes, its paper, and a line that says what it is for."""

    name: str
    config_class: type[CompressionArguments]
    mixin_class: type[CompressionMixin]
    trainer_class: type[CompressionMixin]
    paper: str
    description: str

    def on(self, trainer_class: type, config_class: type, module: str) -> Method:
        """The method on top of another trainer than `transformers.Trainer`.

        Args:
            trainer_class: a `Trainer`, such as TRL's `SFTTrainer`.
            config_class: the dataclass of its arguments. Where a default of it and one of the method differ, that of
                the method counts if the method changes it from `TrainingArguments`.
            module: where the new classes can be found by name, as those of "CrAM" and `SFTTrainer` are named
                CrAMSFTTrainer and CrAMSFTConfig; a checkpoint of the Trainer names the class of its arguments.
        """
        name = self.mixin_class.__name__.removesuffix("Mixin")
        stock = {f.name: _default(f) for f in fields(TrainingArguments)}
        hints = get_type_hints(self.config_class)
        changed = [f for f in fields(self.config_class) if f.name in stock and _default(f) != stock[f.name]]
        config: Any = dataclasses.make_dataclass(
            f"{name}{config_class.__name__}",
            [(f.name, hints[f.name], _copy(f)) for f in changed],
            bases=(config_class, self.config_class),
        )
        config.__module__ = module
        members = {"config_class": config, "__module__": module, "__doc__": self.mixin_class.__doc__}
        trainer: Any = type(f"{name}{trainer_class.__name__}", (self.mixin_class, trainer_class), members)
        return dataclasses.replace(self, config_class=config, trainer_class=trainer)


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _copy(f: dataclasses.Field[Any]) -> Any:
    """A field to declare again: one belongs to one class."""
    return dataclasses.field(default=f.default, default_factory=f.default_factory, metadata=f.metadata)


METHODS = {
    method.name: method
    for method in (
        Method(
            "cram",
            CrAMConfig,
            CrAMMixin,
            CrAMTrainer,
            "arXiv:2207.14200",
            "weights that keep their accuracy when most of them are pruned in one shot, unstructured or N:M",
        ),
        Method(
            "sfw",
            SFWConfig,
            SFWMixin,
            SFWTrainer,
            "arXiv:2205.11921",
            "weights in a region whose vertices are sparse, filter-sparse or of low rank, to be cut at any share",
        ),
        Method(
            "tpp",
            TPPConfig,
            TPPMixin,
            TPPTrainer,
            "arXiv:2207.12534",
            "filters, neurons or heads that are chosen, made needless and removed: a smaller, faster model",
        ),
        Method(
            "lilnetx",
            LilNetXConfig,
            LilNetXMixin,
            LilNetXTrainer,
            "arXiv:2204.02965",
            "weights decoded from whole numbers whose entropy is part of the loss: a file of a few bits per weight",
        ),
    )
}
