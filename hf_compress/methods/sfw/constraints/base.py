"""The interface of all feasible regions, and their text form.

A region is a ball {gauge(w) <= radius} of one tensor, or of several together. Its linear minimization oracle answers a
direction g with the vertex v that minimizes <g, v>, so that <g, v> = -radius * dual_norm(g).
"""

from __future__ import annotations

import functools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ....distributed import local, sum_over_shards
from .chunks import squared_norm

Tensors = Sequence[torch.Tensor]
_SIZES = 'a positive number, "init:VALUE" or "weights:VALUE"'


class Oracle(ABC):
    """The vertex of a region for one direction, not written out before it is used.

    Attributes:
        directions: that it answers.
        dual: their dual norm, a 0-dim float64 tensor; as all numbers (regions,) where several are answered together.
    """

    directions: Tensors
    dual: torch.Tensor

    @functools.cached_property
    def is_valid(self) -> torch.Tensor:
        """False for a direction that has no vertex: zero or not finite, as far as float32 can tell."""
        limits = torch.finfo(torch.float32)
        return (self.dual >= limits.smallest_normal) & (self.dual <= limits.max)

    @abstractmethod
    def vertex(self, index: int) -> torch.Tensor:
        """The part of the vertex that belongs to tensor `index`, of its shape and type; anything if not valid."""

    def move_(self, weight: torch.Tensor, index: int, share: torch.Tensor) -> None:
        """weight <- (1 - share) * weight + share * vertex, in place; `share` is 0 where the oracle is not valid."""
        part = local(weight)
        vertex = local(self.vertex(index))
        if part.device.type != "cpu":  # where looking would wait; 0 * NaN is no zero
            vertex = torch.where(self.is_valid, vertex, 0)
        elif not self.is_valid:
            return
        part.lerp_(vertex.to(part.dtype), share.to(part.dtype))

    def move_all_(self, weights: Tensors, share: torch.Tensor) -> None:
        """`move_` for all weights."""
        for index, weight in enumerate(weights):
            self.move_(weight, index, share.to(local(weight).device))

    def norm(self) -> torch.Tensor:
        """The Euclidean norm of the directions, a 0-dim float64 tensor."""
        return sum_over_shards([squared_norm(g) for g in self.directions], self.directions).sqrt()

    def inner(self, weights: Tensors) -> torch.Tensor:
        """<directions, weights>, a 0-dim float64 tensor."""
        pairs = zip(self.directions, weights, strict=True)
        return sum_over_shards([(local(g).double() * local(w)).sum() for g, w in pairs], weights)

    def squared_distance(self, weights: Tensors) -> torch.Tensor:
        """The squared Euclidean distance between weights and vertex, a 0-dim float64 tensor."""
        distances = [local(self.vertex(i)).to(local(w).dtype) - local(w) for i, w in enumerate(weights)]
        return sum_over_shards([torch.linalg.vector_norm(d, dtype=torch.float64).square() for d in distances], weights)


@dataclass(frozen=True)
class Size:
    """How large a ball is, before the tensors are known that it covers.

    "radius" and "diameter" are numbers. "init" and "weights" give the largest Euclidean norm inside the ball as a
    multiple: of the expected norm under torch's default initialisation, or of the norm that the weights have.
    """

    kind: str
    value: float

    def __str__(self) -> str:
        number = repr(self.value).removesuffix(".0")
        return f"{self.kind}={number}" if self.kind in ("radius", "diameter") else f"radius={self.kind}:{number}"


class Constraint(ABC):
    """A ball of one tensor, or one ball of several tensors together.

    All methods take a list of tensors and answer for the concatenation of them. Numbers are 0-dim float64 tensors, and
    nothing waits for the device. Tensors are (out, in, ...).

    Args:
        radius: of the gauge ball: a number, "init:VALUE" (the largest Euclidean norm inside is VALUE times the norm
            that torch's default initialisation is expected to have) or "weights:VALUE" (VALUE times the norm that the
            weights have).
        diameter: Euclidean, instead of the radius.

    Raises:
        ValueError: for both or none of them, or a number that is not positive.
    """

    name: ClassVar[str]

    def __init__(self, radius: float | str | None = None, *, diameter: float | None = None) -> None:
        if (radius is None) == (diameter is None):
            raise ValueError(f"{self.name} takes either radius ({_SIZES}) or diameter, got {radius!r} and {diameter!r}")
        self.size = _parse_size(radius) if diameter is None else Size("diameter", _positive("diameter", diameter))

    @property
    def options(self) -> dict[str, Any]:
        """What the text form says beside the size."""
        return {}

    def __str__(self) -> str:
        parts = [f"{key}={value}" for key, value in self.options.items()]
        return f"{self.name}({', '.join([*parts, str(self.size)])})"

    def __repr__(self) -> str:
        return str(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constraint) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @abstractmethod
    def oracle(self, directions: Tensors, memory: Sequence[dict[str, Any]] | None = None) -> Oracle:
        """The vertex that answers a direction; sharded tensors (DTensor) give what one process gives.

        Args:
            directions: of any type; bfloat16 and float16 are computed in float32.
            memory: for each tensor a dictionary of tensors that a region may keep from step to step, the optimizer's
                state; without it the answer depends on the directions alone.
        """

    def kind_together(self, weights: Tensors) -> tuple[Hashable, ...] | None:
        """What regions must have in common to be answered together; None where each is answered by itself."""
        return None

    @classmethod
    def oracle_together(cls, balls: Sequence[Constraint], groups: Sequence[Tensors]) -> Oracle:
        """One oracle for several regions of one kind, its numbers (regions,); see `kind_together`."""
        raise TypeError(f"{cls.name} is answered by itself")

    @abstractmethod
    def gauge(self, weights: Tensors) -> torch.Tensor:
        """The norm whose unit ball this is, scaled: weights are inside where it is at most the radius."""

    @abstractmethod
    def diameter_of_unit_ball(self, weights: Tensors) -> float:
        """The Euclidean diameter for radius 1; it depends on shapes alone."""

    def check(self, weights: Tensors) -> None:  # noqa: B027, most regions cover everything
        """ValueError if this region cannot cover such tensors, for a k that is too large for instance."""

    def lmo(self, directions: Tensors) -> list[torch.Tensor]:
        """The vertex v with the smallest <directions, v>; zeros for a direction that is zero or not finite."""
        oracle = self.oracle(directions)
        vertices = [oracle.vertex(i) for i in range(len(directions))]
        return [torch.where(oracle.is_valid.to(v.device), v, torch.zeros((), dtype=v.dtype)) for v in vertices]

    def dual_norm(self, directions: Tensors) -> torch.Tensor:
        """max <directions, w> over the ball of radius 1."""
        return self.oracle(directions).dual

    def radius_of(self, weights: Tensors) -> float:
        """The radius as a number; "weights" looks at the values, everything else at shapes alone."""
        if self.size.kind == "radius":
            return self.size.value
        if self.size.kind == "diameter":
            return self.size.value / self.diameter_of_unit_ball(weights)
        return 2 * self.size.value * self._reference_norm(weights) / self.diameter_of_unit_ball(weights)

    def _reference_norm(self, weights: Tensors) -> float:
        if self.size.kind == "init":
            return math.sqrt(sum(expected_norm(w) ** 2 for w in weights))
        squares = [torch.linalg.vector_norm(local(w.detach()), dtype=torch.float64).square() for w in weights]
        norm = math.sqrt(float(sum_over_shards(squares, weights)))
        if not 0 < norm < math.inf:
            raise ValueError(
                f"radius={self.size.kind}:{self.size.value} is a multiple of the norm of the weights, which is {norm}; "
                "give a number or init:VALUE"
            )
        return norm

    def resolved(self, weights: Tensors) -> Constraint:
        """The same region with its radius as a number."""
        self.check(weights)
        return type(self)(**self.options, radius=self.radius_of(weights))

    def diameter(self, weights: Tensors) -> torch.Tensor:
        """The largest Euclidean distance between two points of the ball."""
        size = self.radius_of(weights) * self.diameter_of_unit_ball(weights)
        return torch.tensor(size, dtype=torch.float64)

    @torch.no_grad()
    def shrink_(self, weights: Tensors) -> torch.Tensor:
        """Scale weights that lie outside radially onto the boundary, in place.

        Returns:
            The factor, at most 1.
        """
        gauge, radius = self.gauge(weights), self.radius_of(weights)
        factor = torch.where(gauge > radius, radius / gauge, 1.0)
        for weight in weights:
            local(weight).mul_(factor.to(local(weight).device, local(weight).dtype))
        return factor

    def project_(self, weights: Tensors) -> None:
        """Move weights to the nearest point of the ball, in place.

        Raises:
            TypeError: for a region whose projection has no closed form.
        """
        raise TypeError(f"{self.name} has no projection in closed form; shrink_ scales weights into it")


def expected_norm(weight: torch.Tensor, output_dim: int = 0) -> float:
    """sqrt(out / 3), the norm that torch's default initialisation (uniform, a = sqrt 5) gives on average.

    It holds for Linear and Conv weights of any kernel and any groups. A tensor of one dimension counts as the scale of
    a norm layer, which is all ones.
    """
    return math.sqrt(weight.shape[output_dim] / 3) if weight.ndim > 1 else math.sqrt(max(weight.numel(), 1))


def count_of(k: float, total: int) -> int:
    """How many k means of `total`: a whole number is a count, a float in (0, 1] a share; at least 1."""
    return k if isinstance(k, int) else max(1, math.floor(k * total))


def check_k(k: Any) -> int | float:
    """`k` if it is a count or a share; ValueError otherwise."""
    is_count = isinstance(k, int) and not isinstance(k, bool) and k >= 1
    is_share = isinstance(k, float) and 0 < k <= 1
    if not is_count and not is_share:
        raise ValueError(f"k must be a whole number of at least 1, or a share in (0.0, 1.0], got {k!r}")
    return k


def _parse_size(radius: Any) -> Size:
    if not isinstance(radius, str):
        return Size("radius", _positive("radius", radius))
    kind, colon, number = radius.partition(":")
    if not colon:
        kind, number = "radius", radius
    if kind not in ("radius", "init", "weights") or not re.fullmatch(r"[\d.]+(e[+-]?\d+)?", number):
        raise ValueError(f"radius must be {_SIZES}, got {radius!r}")
    return Size(kind, _positive("radius", float(number)))


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be {_SIZES if name == 'radius' else 'a positive number'}, got {value!r}")
    return float(value)
