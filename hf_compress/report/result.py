"""What a report says: of every layer, of all of them together, and of the file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from .spectrum import Spectrum

SCHEMA = 1


@dataclass(frozen=True)
class PatternNumbers:
    """What a pattern leaves of a layer, or of all layers together.

    Attributes:
        energy: 1 - |w - C(w)|^2 / |w|^2: for zeros the share of the sum of squares that is kept; None of nothing.
        sensitivity: |w - C(w)| / sqrt(inputs of the layer): by how much its outputs change, in the root mean square,
            for inputs of length 1 in random directions. None for all layers together.
        sparsity: share of zeros.
        bytes: as they are stored, one a weight and the scales where int8 is stored in integers.
        compressed_bytes: of them after zlib, level 6.
        skipped: why the pattern leaves the layer dense, None if it does not.
    """

    energy: float | None
    sensitivity: float | None
    sparsity: float
    bytes: int
    compressed_bytes: int
    skipped: str | None = None


@dataclass(frozen=True)
class LayerNumbers:
    """A target of the checkpoint.

    Attributes:
        name: in the model.
        stored: its tensors on disk.
        shape: of the weight.
        dtype: on disk, in the words of safetensors.
        kind: "linear", "conv" or "conv1d".
        reduction_dim: where groups of N:M lie.
        bytes: on disk, before any pattern.
        compressed_bytes: of them after zlib, level 6.
        sparsity: share of zeros, before any pattern; None where the layer is broken.
        square_sum: of all entries; None where the layer is broken.
        patterns: canonical text to what it leaves; empty where the layer is broken.
        spectrum: decay of the singular values; None where there are none.
        problem: why nothing could be measured, None if it could.
    """

    name: str
    stored: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    kind: str
    reduction_dim: int
    bytes: int
    compressed_bytes: int
    sparsity: float | None
    square_sum: float | None
    patterns: dict[str, PatternNumbers]
    spectrum: Spectrum | None
    problem: str | None

    @property
    def numel(self) -> int:
        """Entries of the weight."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class CheckpointReport:
    """What `inspect_checkpoint` found.

    Attributes:
        model: what was asked for.
        architecture: the class of the model, None where names and shapes decided which weights are targets.
        layers: the targets, in the order of the model.
        patterns: canonical text to its numbers over all layers that could be measured.
        bytes: of all tensors on disk, those that are no targets too.
        compressed_bytes: of them after zlib, level 6.
        parameters: entries of all tensors.
        sparsity: share of zeros in the targets.
        bytes_are: whether compressed bytes are "measured", or "estimated": of tensors of more than 256 KiB slices of
            1 KiB from all over the tensor stand for the rest (on MiniLM totals come within 1 %).
        reference: the pattern by which bottlenecks are named: "unstructured:0.9", or the first where it is not asked
            for.
        bottlenecks: names of the layers by falling sensitivity to it.
        collapsed: names of the layers that keep less than 10 % of their energy under it.
        notes: what could not be measured, and what was assumed.
        include: the globs that targets were chosen with, None for none.
        exclude: the globs that targets were left out with, None for none.
    """

    model: str
    architecture: str | None
    layers: tuple[LayerNumbers, ...]
    patterns: dict[str, PatternNumbers]
    bytes: int
    compressed_bytes: int
    parameters: int
    sparsity: float
    bytes_are: str
    reference: str
    bottlenecks: tuple[str, ...]
    collapsed: tuple[str, ...]
    notes: tuple[str, ...]
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None

    def to_json(self) -> str:
        """The report as text; numbers that do not exist are null."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, allow_nan=False)

    def save(self, path: Path) -> None:
        """Write the JSON."""
        path.write_text(self.to_json() + "\n", encoding="utf-8")
