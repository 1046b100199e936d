"""Values on a grid of a few bits: what integer storage will hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..distributed import dealt_like, gathered, is_sharded, local
from ..targets import Target
from .base import Pattern

_FORMS = '"intB" with 2 to 8 bits, such as int8'


@dataclass(frozen=True)
class Quantized(Pattern):
    """Symmetric uniform rounding with one scale for each output channel; zeros stay zero.

    With q = 2^(bits-1) - 1 the scale of a channel is max|w| / q (1 where the channel is all zero), values are rounded
    half to even and clamped to +-q times the scale. Rounding twice changes nothing. Weights stay floating point:
    storage makes them integers.

    Attributes:
        bits: 2 to 8.
    """

    forms: ClassVar[str] = _FORMS
    bits: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {self.bits!r}; allowed: {_FORMS}")

    def __str__(self) -> str:
        return f"int{self.bits}"

    @classmethod
    def parse(cls, text: str) -> Quantized | None:
        match = re.fullmatch(r"int(\d+)", text)
        return cls(int(match[1])) if match else None

    @property
    def revision(self) -> str:
        return str(self)

    def compress_(self, weights: Mapping[str, Target]) -> dict[str, torch.Tensor]:
        for target in weights.values():
            weight, dim = target.parameter, target.reduction_dim
            if is_sharded(weight) and dim == 0:  # a channel is a column then, of which every rank has a part
                codes, scales = quantize(Target(gathered(weight), dim, target.kind), self.bits)
                weight.copy_(dealt_like(codes * scales, weight))
            else:
                codes, scales = quantize(Target(local(weight), dim, target.kind), self.bits)
                local(weight).copy_(codes * scales)
        return {}


def quantize(target: Target, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a weight, both in float32.

    A scale is a number that the weight's own type can hold, because that is the type in which loaders keep it: codes
    times scales, rounded to that type, are the same weights everywhere.

    Returns:
        Whole numbers of the weight's shape between -q and q, q = 2^(bits-1) - 1, and one scale for each output channel
        in a shape that multiplies them.
    """
    weight = target.parameter.detach().float()
    output_dim = 1 if target.reduction_dim == 0 and weight.ndim > 1 else 0
    others = [d for d in range(weight.ndim) if d != output_dim]
    largest = (2 ** (bits - 1)) - 1
    peak = weight.abs().amax(others, keepdim=True) if others and weight.numel() else weight.abs()
    dtype = target.parameter.dtype if target.parameter.dtype.itemsize < 4 else torch.float32
    limits = torch.finfo(dtype)
    # With fewer digits the quotient could be 0, or come out differently when the rounded weight is rounded again.
    smallest = limits.smallest_normal * limits.eps * (largest + 1)
    scales = torch.where(peak > 0, (peak / largest).to(dtype).float().clamp_min(smallest), 1.0)
    codes = (weight / scales).round_().clamp_(-largest, largest)
    return codes.add_(0.0), scales  # no -0, which integers do not have
