"""One checkpoint of a family with its numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A checkpoint of a family: the dense one (pattern None) or one cut from it.

    Attributes:
        pattern: canonical text, None for the dense checkpoint.
        revision: name of its git revision, and of its folder in the family.
        path: its folder, relative to the family's.
        made_by: "one_shot" (cut from the dense checkpoint) or "trained".
        storage: how its bytes are written: "dense", "factored", "int8" (compressed-tensors,
            `pip install compressed-tensors`) or "coded" (entropy-coded whole numbers).
        loads_with: "transformers", or "hf_compress" where that must be imported first.
        metrics: what `evaluate` gave for the checkpoint as it was loaded back from disk; None where it was not finite.
        bytes: of all files in the folder.
        compressed_bytes: of the same files after zlib, level 6: what a compressed download costs.
        parameters: entries of all parameters, tied ones once.
        parameters_removed: how many fewer than in the dense checkpoint; zeros do not count.
        nonzero: parameters that are not zero.
        sparsity: share of zeros in the targets.
        skipped: targets that the pattern left dense, with the reason.
        macs: multiplications for one sample, zeros multiplied too; None without example inputs.
        latency: median milliseconds for one sample beside the dense checkpoint, in one run; None without inputs.
    """

    pattern: str | None
    revision: str
    path: str
    made_by: str
    storage: str
    loads_with: str
    metrics: dict[str, float | None]
    bytes: int
    compressed_bytes: int
    parameters: int
    parameters_removed: int
    nonzero: int
    sparsity: float
    skipped: dict[str, str] = field(default_factory=dict)
    macs: int | None = None
    latency: dict[str, Any] | None = None
