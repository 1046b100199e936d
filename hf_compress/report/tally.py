"""One layer under one pattern, worked through in blocks of output channels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..patterns import NM, Chain, Pattern, Quantized, Unstructured
from ..patterns.quantized import quantize
from ..selection import CHUNK
from ..targets import Target
from .cuts import Place, Sums, prune_mask
from .result import PatternNumbers
from .wire import Wire


@dataclass(frozen=True)
class Plan:
    """How a pattern is measured: what lies below a cut becomes zero, then `rest` compresses what is left."""

    pattern: Pattern
    head: Unstructured | None
    rest: Pattern | None

    @property
    def text(self) -> str:
        """Canonical text of the pattern."""
        return str(self.pattern)


def plan(pattern: Pattern) -> Plan:
    """ValueError for a pattern that cannot be measured one layer at a time, in blocks."""
    parts = pattern.parts if isinstance(pattern, Chain) else (pattern,)
    head = parts[0] if isinstance(parts[0], Unstructured) else None
    rest = parts[1:] if head else parts
    if not all(isinstance(part, (NM, Quantized)) for part in rest):
        raise ValueError(f"a report cannot measure {pattern}: it takes unstructured:SHARE, then N:M, then intB")
    return Plan(pattern, head, None if not rest else Chain(rest) if len(rest) > 1 else rest[0])


def blocks(target: Target) -> Iterator[torch.Tensor]:
    """Views of some output channels after the other; groups of N:M and channels of intB lie whole in one of them."""
    weight, axis = target.parameter, target.output_dim
    step = _step(target)
    for start in range(0, weight.shape[axis] if weight.numel() else 0, step):
        yield weight.narrow(axis, start, min(step, weight.shape[axis] - start))


class Tally:
    """Adds up what a pattern leaves of a layer.

    Args:
        target: with the weight.
        plan: of the pattern, None for the layer as it is.
        place: of the plan's cut.
        as_integers: whether the result is stored in integers, whose bytes then count.
    """

    def __init__(self, target: Target, plan: Plan | None, place: Place | None, as_integers: bool) -> None:
        self._target, self._place, self._as_integers = target, place, as_integers
        self._rest = plan.rest if plan else None
        self._skipped = plan.pattern.skip_reason(target) if plan else None
        weight = target.parameter
        channels = weight.shape[target.output_dim]
        size = weight.numel() * (1 if as_integers else weight.element_size())
        self._inputs = weight.shape[target.reduction_dim] * target.conv_groups
        self._scales = channels * weight.element_size() if as_integers else 0
        self._wire = Wire(size, -(-channels // _step(target)) if weight.numel() else 0)
        self._bytes = size + self._scales
        self._nonzero, self._lost = 0, 0.0

    def add(self, number: int, block: torch.Tensor, magnitudes: torch.Tensor) -> None:
        """The blocks one after the other, with their numbers and their magnitudes in the type of the cut."""
        is_wanted = self._wire.wants(number)
        if self._skipped or not (self._rest or is_wanted):
            return
        values = block
        if self._place:
            values = block.masked_fill(prune_mask(self._target.parameter, block, magnitudes, self._place), 0)
        if self._rest:
            values = block.clone() if values is block else values
            self._rest.compress_({"": replace(self._target, parameter=values)})
            self._nonzero += int(torch.count_nonzero(values))
            self._lost += float((block.double() - values.double()).square_().sum())
        if is_wanted:
            of_values = replace(self._target, parameter=values)
            self._wire.add(quantize(of_values, 8)[0].to(torch.int8) if self._as_integers else values)

    def numbers(self, sums: Sums, below: tuple[int, float] | None, dense: PatternNumbers | None) -> PatternNumbers:
        """When all blocks are added.

        Args:
            sums: of the layer.
            below: entries below the threshold of the cut, and the sum of their squares.
            dense: the numbers of the layer as it is, None where this is its tally.
        """
        if self._skipped and dense:
            return replace(dense, skipped=self._skipped)
        count = self._target.parameter.numel()
        zeros, lost = sums.zeros, 0.0
        if self._rest:
            zeros, lost = count - self._nonzero, self._lost
        elif self._place and below:
            zeros = max(zeros, below[0] + self._place.ties)
            lost = below[1] + (self._place.ties * self._place.threshold**2 if self._place.ties else 0.0)
        return PatternNumbers(
            energy=1 - lost / sums.square_sum if sums.square_sum else None,
            sensitivity=math.sqrt(max(lost, 0.0) / max(1, self._inputs)),
            sparsity=zeros / count if count else 0.0,
            bytes=self._bytes,
            compressed_bytes=self._wire.total() + self._scales,
        )


def _step(target: Target) -> int:
    """Output channels in a block."""
    weight = target.parameter
    return max(1, CHUNK * weight.shape[target.output_dim] // max(1, weight.numel()))
