"""Report a checkpoint without data and without loading it: one layer lies in memory at a time.

Under a global pattern the layers are read once more for every 16 bits of their type, to find the threshold exactly
(`cuts.py`); then each is read and worked through in blocks of output channels (`tally.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..family.storage import integer_weights
from ..patterns import NM, Pattern, Quantized, Unstructured, parse_patterns
from ..selection import CHUNK
from .checkpoint import Checkpoint, open_checkpoint
from .cuts import Cut, Place, Sums, find_cuts, place_cuts
from .layers import Layer, Layers, find_layers
from .result import CheckpointReport, LayerNumbers, PatternNumbers
from .spectrum import measure_spectrum
from .tally import Plan, Tally, blocks, plan
from .wire import BUDGET, Wire

SHARES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
GRID: tuple[Pattern, ...] = (
    *(Unstructured(share) for share in SHARES),
    *(Unstructured(share, "layer") for share in SHARES),
    NM(2, 4),
    NM(4, 8),
    Quantized(8),
)
_REFERENCE = "unstructured:0.9"
_COLLAPSED = 0.1


def inspect_checkpoint(
    model: str,
    patterns: str | Pattern | Sequence[str | Pattern] | None = None,
    *,
    revision: str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckpointReport:
    """What patterns would leave of a checkpoint, layer by layer: energy, bytes, decay of singular values, bottlenecks.

    Nothing is trained, evaluated, written or unpickled, and the model is never loaded: the peak of memory is the
    largest tensor and less than 300 MB. The selected weights are those of `compress` on the checkpoint in its type.

    Args:
        model: a folder, a safetensors file, or a Hub id.
        patterns: a grid of 30 to 95 % zeros, 2:4, 4:8 and int8 by default.
        revision: of a Hub id.
        include: globs on names, see `find_targets`.
        exclude: globs on names, see `find_targets`.
        progress: called with the number of layers that are done, and of all.

    Raises:
        ValueError: for a wrong pattern or glob, and a checkpoint that is missing, broken, pickled, packed or without
            targets.
    """
    plans = [plan(pattern) for pattern in dict.fromkeys(parse_patterns(patterns or GRID))]
    checkpoint = open_checkpoint(model, revision)
    layers = find_layers(checkpoint, include, exclude)
    integers = {p.text: set(integer_weights(layers.model, p.pattern, include, exclude)) for p in plans}
    job = _Job(checkpoint, plans, integers, _widest([layer.dtype for layer in layers.found]))
    job.cuts, broken = find_cuts([layer.read for layer in layers.found], job.shares("global"), job.dtype)
    numbers: list[LayerNumbers] = []
    for i, layer in enumerate(layers.found):
        numbers.append(_broken(checkpoint, layer, "NaN or infinity") if i in broken else job.measure(layer))
        if progress is not None:
            progress(i + 1, len(layers.found))
    texts = [p.text for p in plans]
    found = _summary(checkpoint, layers, numbers, texts, _REFERENCE if _REFERENCE in texts else texts[0])
    return replace(found, include=_fixed(include), exclude=_fixed(exclude))


def _fixed(globs: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if globs is None else (globs,) if isinstance(globs, str) else tuple(globs)


def _widest(dtypes: Sequence[str]) -> torch.dtype:
    """In which all magnitudes are compared, as in `selection`."""
    if "F64" in dtypes:
        return torch.float64
    return torch.bfloat16 if set(dtypes) == {"BF16"} else torch.float32


@dataclass
class _Job:
    """What is the same for all layers, and the global cuts, which lose the ties of each layer that is done."""

    checkpoint: Checkpoint
    plans: list[Plan]
    integers: dict[str, set[str]]  # by pattern the layers that are stored in integers
    dtype: torch.dtype
    cuts: list[Cut] = field(default_factory=list)

    def heads(self, scope: str) -> list[Unstructured]:
        return list(dict.fromkeys(p.head for p in self.plans if p.head and p.head.scope == scope))

    def shares(self, scope: str) -> list[float]:
        return [head.share for head in self.heads(scope)]

    def measure(self, layer: Layer) -> LayerNumbers:
        weight = layer.read()
        target = replace(layer.target, parameter=weight, bias=None)
        places = self._places(weight)
        dense = Tally(target, None, None, False)
        tallies = {
            p.text: Tally(target, p, places.get(p.head), layer.name in self.integers[p.text]) for p in self.plans
        }
        sums = Sums([place.threshold for place in places.values()])
        for number, block in enumerate(blocks(target)):
            magnitudes = block.to(self.dtype).abs()
            sums.add(magnitudes)
            for tally in (dense, *tallies.values()):
                tally.add(number, block, magnitudes)
        if not math.isfinite(sums.square_sum):
            return _broken(self.checkpoint, layer, "values whose squares are too large")
        as_it_is = dense.numbers(sums, None, None)
        below = dict(zip(places, sums.below, strict=True))
        disk = as_it_is.bytes, as_it_is.compressed_bytes
        if layer.dtype == "I8":
            disk = _on_disk(self.checkpoint, layer.stored)
        return LayerNumbers(
            **_description(layer),
            bytes=disk[0],
            compressed_bytes=disk[1],
            sparsity=as_it_is.sparsity,
            square_sum=sums.square_sum,
            patterns={p.text: tallies[p.text].numbers(sums, below.get(p.head), as_it_is) for p in self.plans},
            spectrum=measure_spectrum(weight),
            problem=None,
        )

    def _places(self, weight: torch.Tensor) -> dict[Unstructured | None, Place]:
        """Every cut in this layer."""
        within, _ = find_cuts([lambda: weight], self.shares("layer"), self.dtype)
        places_within, _ = place_cuts(weight, within, self.dtype)
        places, self.cuts = place_cuts(weight, self.cuts, self.dtype)
        return dict(zip([*self.heads("global"), *self.heads("layer")], [*places, *places_within], strict=True))


def _description(layer: Layer) -> dict[str, Any]:
    target = layer.target
    return {
        "name": layer.name,
        "stored": layer.stored,
        "shape": tuple(target.parameter.shape),
        "dtype": layer.dtype,
        "kind": target.kind,
        "reduction_dim": target.reduction_dim,
    }


def _broken(checkpoint: Checkpoint, layer: Layer, problem: str) -> LayerNumbers:
    """A layer without energy; its bytes count as they are."""
    size, compressed = _on_disk(checkpoint, layer.stored)
    return LayerNumbers(
        **_description(layer),
        bytes=size,
        compressed_bytes=compressed,
        sparsity=None,
        square_sum=None,
        patterns={},
        spectrum=None,
        problem=problem,
    )


def _on_disk(checkpoint: Checkpoint, names: Iterable[str]) -> tuple[int, int]:
    """Bytes of tensors as they are stored, and after zlib."""
    total = compressed = 0
    for name in names:
        size = checkpoint.tensors[name].bytes
        wire = Wire(size, -(-size // CHUNK))
        for start in range(0, size, CHUNK):
            if wire.wants(start // CHUNK):
                wire.add_bytes(checkpoint.read_bytes(name, start, CHUNK))
        total, compressed = total + size, compressed + wire.total()
    return total, compressed


def _summary(
    checkpoint: Checkpoint, layers: Layers, numbers: list[LayerNumbers], texts: list[str], reference: str
) -> CheckpointReport:
    targets = {name for layer in layers.found for name in layer.stored}
    rest = _on_disk(checkpoint, (name for name in checkpoint.tensors if name not in targets))
    sound = [layer for layer in numbers if not layer.problem]
    left_out = [layer for layer in numbers if layer.problem]
    for layer in left_out:
        rest = rest[0] + layer.bytes, rest[1] + layer.compressed_bytes
    tensors = checkpoint.tensors.values()
    by_name = {layer.name: layer.patterns[reference] for layer in sound}
    return CheckpointReport(
        model=checkpoint.source,
        architecture=layers.architecture,
        layers=tuple(numbers),
        patterns={text: _total(text, sound, rest) for text in texts},
        bytes=sum(tensor.bytes for tensor in tensors),
        compressed_bytes=rest[1] + sum(layer.compressed_bytes for layer in sound),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        sparsity=_mean([(layer.sparsity or 0.0, layer.numel) for layer in sound]) or 0.0,
        bytes_are="measured" if all(tensor.bytes <= BUDGET for tensor in tensors) else "estimated",
        reference=reference,
        bottlenecks=tuple(sorted(by_name, key=lambda name: -(by_name[name].sensitivity or 0.0))),
        collapsed=tuple(name for name, n in by_name.items() if n.energy is not None and n.energy < _COLLAPSED),
        notes=(*layers.notes, *(f"{layer.name} is left out: it holds {layer.problem}" for layer in left_out)),
    )


def _total(text: str, layers: list[LayerNumbers], rest: tuple[int, int]) -> PatternNumbers:
    """A pattern over all layers; `rest` are bytes and compressed bytes of everything else on disk."""
    numbers = [layer.patterns[text] for layer in layers]
    skipped = sum(n.skipped is not None for n in numbers)
    return PatternNumbers(
        sensitivity=None,
        energy=_mean([(n.energy or 0.0, layer.square_sum or 0.0) for n, layer in zip(numbers, layers, strict=True)]),
        sparsity=_mean([(n.sparsity, layer.numel) for n, layer in zip(numbers, layers, strict=True)]) or 0.0,
        bytes=rest[0] + sum(n.bytes for n in numbers),
        compressed_bytes=rest[1] + sum(n.compressed_bytes for n in numbers),
        skipped=f"{skipped} of {len(layers)} layers stay dense" if skipped else None,
    )


def _mean(pairs: list[tuple[float, float]]) -> float | None:
    """Of values with weights; None where nothing weighs."""
    total = math.fsum(weight for _, weight in pairs)
    return math.fsum(value * weight for value, weight in pairs) / total if total else None
