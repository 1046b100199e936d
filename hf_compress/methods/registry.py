"""The methods that there are, for the command line and for listings."""

from __future__ import annotations

from dataclasses import dataclass

from ..training import CompressionArguments, CompressionMixin
from .cram import CrAMConfig, CrAMTrainer
from .sfw import SFWConfig, SFWTrainer


@dataclass(frozen=True)
class Method:
    """One way to train: its classes, its paper, and a line that says what it is for."""

    name: str
    config_class: type[CompressionArguments]
    trainer_class: type[CompressionMixin]
    paper: str
    description: str


METHODS = {
    method.name: method
    for method in (
        Method(
            "cram",
            CrAMConfig,
            CrAMTrainer,
            "arXiv:2207.14200",
            "weights that keep their accuracy when most of them are pruned in one shot, unstructured or N:M",
        ),
        Method(
            "sfw",
            SFWConfig,
            SFWTrainer,
            "arXiv:2205.11921",
            "weights in a region whose vertices are sparse, filter-sparse or of low rank, to be cut at any share",
        ),
    )
}
