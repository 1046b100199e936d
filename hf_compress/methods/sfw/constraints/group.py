"""A region whose vertices are zero in all but K groups of weights: filters, neurons or attention heads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from ....distributed import dealt_like, local, sharded_like, sum_over_shards
from .base import Constraint, Oracle, Tensors, check_k, count_of
from .chunks import rows, square_sum, summed, wide
from .elementwise import k_support_norm

Axes = int | str | Sequence[int]


class GroupOracle(Oracle):
    """A vertex that is the direction times one number for each index along the axis of its groups."""

    def __init__(self, directions: Tensors, scales: list[torch.Tensor], dual: torch.Tensor, norm: torch.Tensor) -> None:
        self.directions, self.scales, self.dual, self._norm = directions, scales, dual, norm

    def norm(self) -> torch.Tensor:
        return self._norm

    def vertex(self, index: int) -> torch.Tensor:
        direction = self.directions[index]
        part = (wide(local(direction)) * self.scales[index]).to(direction.dtype)
        return sharded_like(part, direction)

    def move_(self, weight: torch.Tensor, index: int, share: torch.Tensor) -> None:
        part, direction, scale = local(weight), local(self.directions[index]), self.scales[index]
        if part.device.type != "cpu" or not part.dtype == direction.dtype == scale.dtype:
            super().move_(weight, index, share)
        elif self.is_valid:
            share, kept = share.to(part.dtype), self._few_rows(index)
            part.mul_(1 - share)
            if kept is None:
                part.addcmul_(direction, scale * share)
            else:
                part.index_add_(0, kept, direction.index_select(0, kept).mul_(scale.index_select(0, kept) * share))

    def squared_distance(self, weights: Tensors) -> torch.Tensor:
        squares = []
        for index, weight in enumerate(weights):
            part, direction, scale = local(weight), local(self.directions[index]), self.scales[index]
            kept = self._few_rows(index)
            if kept is None:
                pieces = zip(rows(part), rows(direction), rows(scale, part), strict=True)
                squares.append(summed(square_sum(torch.addcmul(wide(w), wide(g), s, value=-1)) for w, g, s in pieces))
            else:
                w, g, s = (wide(t.index_select(0, kept)) for t in (part, direction, scale))
                elsewhere = _squares_along(part, 0).index_fill_(0, kept, 0)
                squares.append(elsewhere.sum() + square_sum(torch.addcmul(w, g, s, value=-1)))
        return sum_over_shards(squares, weights)

    def _few_rows(self, index: int) -> torch.Tensor | None:
        """The rows that a vertex does not leave zero, on a CPU where they are few; None elsewhere."""
        scale = self.scales[index]
        if scale.device.type != "cpu" or scale.numel() != scale.shape[0]:
            return None
        kept = scale.flatten().nonzero().flatten()
        return kept if 8 * kept.numel() <= scale.numel() else None


class GroupKSupportBall(Constraint):
    """The convex hull of all weights with at most K groups beside zeros and a Euclidean norm of at most the radius.

    Its gauge is the k-support norm of the Euclidean norms of the groups. Groups that tie for the last of the K places
    share it.

    ```python
    GroupKSupportBall(k=0.1, radius="init:15")                             # filters, or rows
    GroupKSupportBall(k=300, axes=(0, 1), groups=3072, radius=30)          # neurons between two Linear layers
    GroupKSupportBall(k=3, axes="0 0 0 1", groups=12, radius="weights:1")  # heads: query, key, value, output
    ```

    Args:
        k: how many groups a vertex has: a count, or a share as a float in (0, 1].
        radius: see `Constraint`.
        diameter: see `Constraint`.
        axes: the dimension of each tensor along which its groups lie: one number for all, or one for each, as a
            sequence or as text.
        groups: None makes a group of every index along the axis of every tensor. A number cuts the axis of every tensor
            into so many equal parts, and part i of all tensors together is group i.

    Source: Zimmer, Spiegel and Pokutta, Compression-aware Training of Neural Networks using Frank-Wolfe,
    arXiv:2205.11921; several tensors in one group are new here.
    """

    name = "group_k_support"

    def __init__(
        self,
        k: float,
        radius: float | str | None = None,
        *,
        diameter: float | None = None,
        axes: Axes = 0,
        groups: int | None = None,
    ) -> None:
        super().__init__(radius, diameter=diameter)
        self.k = check_k(k)
        self.axes = _parse_axes(axes)
        if groups is not None and (isinstance(groups, bool) or not isinstance(groups, int) or groups < 1):
            raise ValueError(f"groups must be a whole number of at least 1, or None, got {groups!r}")
        self.groups = groups

    @property
    def options(self) -> dict[str, Any]:
        axes = self.axes if isinstance(self.axes, int) else " ".join(map(str, self.axes))
        return {"k": self.k, "axes": axes} | ({} if self.groups is None else {"groups": self.groups})

    def check(self, weights: Tensors) -> None:
        if not isinstance(self.axes, int) and len(self.axes) != len(weights):
            raise ValueError(
                f"{self} has {len(self.axes)} axes, one for each tensor, but covers {len(weights)} tensors"
            )
        for weight, axis in zip(weights, self._axes_of(weights), strict=True):
            if axis >= weight.ndim:
                raise ValueError(f"{self} has groups along dimension {axis} of a weight of shape {tuple(weight.shape)}")
            if self.groups is not None and weight.shape[axis] % self.groups:
                raise ValueError(
                    f"{self} cuts dimension {axis} of a weight of shape {tuple(weight.shape)} into equal parts, "
                    f"but {weight.shape[axis]} is no multiple of {self.groups}"
                )
        if isinstance(self.k, int) and self.k > (total := self._num_groups(weights)):
            raise ValueError(f"{self} keeps {self.k} groups, but the tensors that it covers have {total}")

    def oracle(self, directions: Tensors, memory: Sequence[dict[str, Any]] | None = None) -> Oracle:
        k, squares = self.count(directions), self._squares(directions)
        level = squares.kthvalue(squares.numel() - k + 1).values
        above, tied = squares > level, squares == level
        missing = k - above.sum(dtype=torch.float64)
        dual = (torch.where(above, squares, 0).sum() + missing * level).sqrt()
        dual = torch.where(squares.isfinite().all(), dual, torch.nan)
        factors = (above + tied * (missing / tied.sum())) * (-self.radius_of(directions) / dual)
        factors = factors.clamp(min=torch.finfo(torch.float32).min)  # infinity times zero would be no zero
        return GroupOracle(directions, self._along_axes(factors, directions), dual, squares.sum().sqrt())

    def count(self, tensors: Tensors) -> int:
        """K for these tensors."""
        self.check(tensors)
        return count_of(self.k, self._num_groups(tensors))

    def gauge(self, weights: Tensors) -> torch.Tensor:
        k = self.count(weights)
        return k_support_norm(self._squares(weights).sqrt(), k)

    def diameter_of_unit_ball(self, weights: Tensors) -> float:
        return 2.0

    def _axes_of(self, tensors: Tensors) -> Sequence[int]:
        return [self.axes] * len(tensors) if isinstance(self.axes, int) else self.axes

    def _sizes(self, tensors: Tensors) -> list[int]:
        return [t.shape[axis] for t, axis in zip(tensors, self._axes_of(tensors), strict=True)]

    def _num_groups(self, tensors: Tensors) -> int:
        return self.groups or sum(self._sizes(tensors))

    def _squares(self, tensors: Tensors) -> torch.Tensor:
        """The squared norm of every group, in float64, equal on all ranks."""
        squares = []
        for tensor, axis in zip(tensors, self._axes_of(tensors), strict=True):
            part = _squares_along(local(tensor), axis)
            if axis == 0:
                part = part.new_zeros(tensor.shape[0]).index_copy_(0, _rows_here(tensor), part)
            squares.append(sum_over_shards([part], [tensor]).to(local(tensors[0]).device))
        if self.groups is None:
            return torch.cat(squares)
        return torch.stack([s.view(self.groups, -1).sum(1) for s in squares]).sum(0)

    def _along_axes(self, factors: torch.Tensor, tensors: Tensors) -> list[torch.Tensor]:
        """From one number for each group to one for each index, in a shape that multiplies the tensor of this rank."""
        if self.groups is None:
            spread = factors.split(self._sizes(tensors))
        else:
            spread = tuple(factors.repeat_interleave(size // self.groups) for size in self._sizes(tensors))
        found = []
        for numbers, tensor, axis in zip(spread, tensors, self._axes_of(tensors), strict=True):
            here = numbers.to(local(tensor).device, torch.promote_types(tensor.dtype, torch.float32))
            if axis == 0:
                here = here.index_select(0, _rows_here(tensor))
            found.append(here.view([-1 if dim == axis else 1 for dim in range(tensor.ndim)]))
        return found


def _parse_axes(axes: Axes) -> int | tuple[int, ...]:
    given = axes.split() if isinstance(axes, str) else [axes] if isinstance(axes, int) else list(axes)
    if not given or not all(re.fullmatch(r"\d+", str(axis)) for axis in given):
        raise ValueError(
            f"axes must be the dimension along which groups lie, as in 0, or one for each tensor, as in '0 0 1', "
            f"got {axes!r}"
        )
    found = tuple(map(int, given))
    return found[0] if len(found) == 1 else found


def _squares_along(part: torch.Tensor, axis: int) -> torch.Tensor:
    """The squared norm of every index along an axis, (size of the axis,), float64."""
    others = [dim for dim in range(part.ndim + 1) if dim != axis]  # with one at the end, for a vector has no others
    if part.device.type == "cpu":
        if axis == 0:
            squares = torch.linalg.vector_norm(wide(part).unsqueeze(-1), dim=others).double().square()
        else:
            squares = torch.stack([wide(p).unsqueeze(-1).square().sum(others) for p in rows(part)]).double().sum(0)
        if 1e-20 < squares.sum() < 1e30:  # no square that counts was too small or too large for float32
            return squares
    return torch.linalg.vector_norm(part.unsqueeze(-1), dim=others, dtype=torch.float64).square()


def _rows_here(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of the rows that lie on this rank."""
    return local(dealt_like(torch.arange(tensor.shape[0], device=local(tensor).device), tensor))
