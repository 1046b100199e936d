"""A region whose vertices are zero in all but K groups of weights: filters, neurons or attention heads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ....distributed import dealt_like, is_sharded, local, sharded_like, sum_over_shards
from .base import Constraint, Oracle, Tensors, check_k, count_of
from .chunks import rows, square_sum, square_sums, wide
from .elementwise import k_support_norm

_LONG = 1 << 13  # entries of a row whose squares may be added up in float32
Numbers = int | str | Sequence[int]  # one for all tensors, or one for each


class GroupOracle(Oracle):
    """A vertex that is the direction times one number for each index along the axis of its groups."""

    def __init__(
        self, directions: Tensors, scales: list[torch.Tensor], dual: torch.Tensor, squares: torch.Tensor
    ) -> None:
        self.directions, self.scales, self.dual, self.squares = directions, scales, dual, squares
        self.kept = [_few_rows(scale) for scale in scales]

    def norm(self) -> torch.Tensor:
        return self.squares.sum().sqrt()

    def vertex(self, index: int) -> torch.Tensor:
        direction = self.directions[index]
        part = (wide(local(direction)) * self.scales[index]).to(direction.dtype)
        return sharded_like(part, direction)

    def move_(self, weight: torch.Tensor, index: int, share: torch.Tensor) -> None:
        part, direction, scale = local(weight), local(self.directions[index]), self.scales[index]
        if part.device.type != "cpu" or not part.dtype == direction.dtype == scale.dtype:
            super().move_(weight, index, share)
        elif self.is_valid:
            step, kept = float(share), self.kept[index]
            part.mul_(1 - step)
            if kept is None:
                part.addcmul_(direction, scale, value=step)
            else:
                rows_kept = direction.index_select(0, kept).mul_(scale.index_select(0, kept))
                part.index_add_(0, kept, rows_kept, alpha=step)

    def squared_distance(self, weights: Tensors) -> torch.Tensor:
        squares = []
        for index, weight in enumerate(weights):
            part, direction, scale = local(weight), local(self.directions[index]), self.scales[index]
            kept = self.kept[index]
            if kept is None:
                pieces = zip(rows(part), rows(direction), rows(scale, part), strict=True)
                squares.append(square_sums(torch.addcmul(wide(w), wide(g), s, value=-1) for w, g, s in pieces))
            else:
                w, g, s = (wide(t.index_select(0, kept)) for t in (part, direction, scale))
                elsewhere = _squares_along(part, 0).index_fill_(0, kept, 0)
                squares.append(elsewhere.sum() + square_sum(torch.addcmul(w, g, s, value=-1)))
        return sum_over_shards(squares, weights)


class GroupKSupportBall(Constraint):
    """The convex hull of all weights with at most K groups beside zeros and a Euclidean norm of at most the radius.

    Its gauge is the k-support norm of the Euclidean norms of the groups. Groups that tie for the last of the K places
    share it.

    ```python
    GroupKSupportBall(k=0.1, radius="init:15")                             # filters, or rows
    GroupKSupportBall(k=300, axes=(0, 1), groups=3072, radius=30)          # neurons between two Linear layers
    GroupKSupportBall(k=3, axes="0 0 0 1", groups=12, radius="weights:1")  # heads: query, key, value, output
    GroupKSupportBall(k=3, axes="0 1", groups=12, blocks="3 1", radius=30)  # all queries, keys, values in one weight
    ```

    Args:
        k: how many groups a vertex has: a count, or a share as a float in (0, 1].
        radius: see `Constraint`.
        diameter: see `Constraint`.
        axes: the dimension of each tensor along which its groups lie: one number for all, or one for each, as a
            sequence or as text.
        groups: None makes a group of every index along the axis of every tensor. A number cuts the axis of every tensor
            into so many equal parts, and part i of all tensors together is group i.
        blocks: how many layers lie one after the other along the axis, such as query, key and value: one number for
            all, or one for each, as for axes. Each of them is cut by itself, and part i of all of them is one group.

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
        axes: Numbers = 0,
        groups: int | None = None,
        blocks: Numbers = 1,
    ) -> None:
        super().__init__(radius, diameter=diameter)
        self.k = check_k(k)
        self.axes = _parse("axes", axes, "the dimension along which groups lie", "0", 0)
        found = _parse("blocks", blocks, "how many layers lie one after the other along the axis", "3", 1)
        self.blocks = found if isinstance(found, int) or max(found) > 1 else 1
        if groups is not None and (isinstance(groups, bool) or not isinstance(groups, int) or groups < 1):
            raise ValueError(f"groups must be a whole number of at least 1, or None, got {groups!r}")
        self.groups = groups

    @property
    def options(self) -> dict[str, Any]:
        axes, blocks = (n if isinstance(n, int) else " ".join(map(str, n)) for n in (self.axes, self.blocks))
        groups = {} if self.groups is None else {"groups": self.groups}
        return {"k": self.k, "axes": axes} | groups | ({} if blocks == 1 else {"blocks": blocks})

    def check(self, weights: Tensors) -> None:
        for name, numbers in (("axes", self.axes), ("blocks", self.blocks)):
            if not isinstance(numbers, int) and len(numbers) != len(weights):
                raise ValueError(
                    f"{self} has {len(numbers)} {name}, one for each tensor, but covers {len(weights)} tensors"
                )
        for weight, axis, blocks in self._cuts(weights):
            if axis >= weight.ndim:
                raise ValueError(f"{self} has groups along dimension {axis} of a weight of shape {tuple(weight.shape)}")
            if weight.shape[axis] % (parts := blocks * (self.groups or 1)):
                raise ValueError(
                    f"{self} cuts dimension {axis} of a weight of shape {tuple(weight.shape)} into equal parts, "
                    f"but {weight.shape[axis]} is no multiple of {parts}"
                )
        if isinstance(self.k, int) and self.k > (total := self._num_groups(weights)):
            raise ValueError(f"{self} keeps {self.k} groups, but the tensors that it covers have {total}")

    def oracle(self, directions: Tensors, memory: Sequence[dict[str, Any]] | None = None) -> Oracle:
        k, squares = self.count(directions), self._squares(directions)
        weights = _largest(squares, k)
        dual = squares.dot(weights).sqrt()  # NaN times zero is NaN
        factors = weights.div_(dual * (-1 / self.radius_of(directions)))
        factors.clamp_(min=torch.finfo(torch.float32).min)  # infinity times zero would be no zero
        return GroupOracle(directions, self._along_axes(factors, directions), dual, squares)

    def count(self, tensors: Tensors) -> int:
        """K for these tensors."""
        self.check(tensors)
        return count_of(self.k, self._num_groups(tensors))

    def gauge(self, weights: Tensors) -> torch.Tensor:
        k = self.count(weights)
        return k_support_norm(self._squares(weights).sqrt(), k)

    def diameter_of_unit_ball(self, weights: Tensors) -> float:
        return 2.0

    def _cuts(self, tensors: Tensors) -> Iterable[tuple[torch.Tensor, int, int]]:
        """Each tensor, the dimension along which its groups lie, and the number of blocks."""
        axes, blocks = ([n] * len(tensors) if isinstance(n, int) else n for n in (self.axes, self.blocks))
        return zip(tensors, axes, blocks, strict=True)

    def _layouts(self, tensors: Tensors) -> list[tuple[torch.Tensor, int, tuple[int, int, int]]]:
        """Each tensor, the dimension along which its groups lie, and what it is made of: (blocks, groups, size)."""
        found = []
        for tensor, axis, blocks in self._cuts(tensors):
            length = tensor.shape[axis] // blocks
            count = length if self.groups is None else self.groups
            found.append((tensor, axis, (blocks, count, length // max(count, 1))))
        return found

    def _num_groups(self, tensors: Tensors) -> int:
        return self.groups or sum(count for _, _, (_, count, _) in self._layouts(tensors))

    def _squares(self, tensors: Tensors) -> torch.Tensor:
        """The squared norm of every group, in float64, equal on all ranks."""
        squares = []
        for tensor, axis, layout in self._layouts(tensors):
            part = _squares_along(local(tensor), axis)
            if axis == 0 and is_sharded(tensor):
                part = part.new_zeros(tensor.shape[0]).index_copy_(0, _rows_here(tensor), part)
            whole = sum_over_shards([part], [tensor]).to(local(tensors[0]).device)
            squares.append(whole if layout[1] == whole.numel() else whole.view(layout).sum((0, 2)))
        if len(squares) == 1:
            return squares[0]
        return torch.cat(squares) if self.groups is None else torch.stack(squares).sum(0)

    def _along_axes(self, factors: torch.Tensor, tensors: Tensors) -> list[torch.Tensor]:
        """From one number for each group to one for each index, in a shape that multiplies the tensor of this rank."""
        layouts = self._layouts(tensors)
        counts = [count for _, _, (_, count, _) in layouts]
        parts = factors.split(counts) if self.groups is None and len(counts) > 1 else [factors] * len(counts)
        found = []
        for numbers, (tensor, axis, layout) in zip(parts, layouts, strict=True):
            numbers = numbers.to(local(tensor).device, torch.promote_types(tensor.dtype, torch.float32))
            here = numbers if layout[1] == tensor.shape[axis] else numbers[:, None].expand(layout).reshape(-1)
            if axis == 0 and is_sharded(tensor):
                here = here.index_select(0, _rows_here(tensor))
            found.append(here.view([-1 if dim == axis else 1 for dim in range(tensor.ndim)]))
        return found


def _parse(name: str, numbers: Numbers, meaning: str, example: str, smallest: int) -> int | tuple[int, ...]:
    listed = numbers.split() if isinstance(numbers, str) else numbers
    given = listed if isinstance(listed, Sequence) else [listed]
    if not given or not all(re.fullmatch(r"\d+", str(n)) and int(n) >= smallest for n in given):
        raise ValueError(
            f"{name} must be {meaning}, as in {example}, or one number for each tensor, as in '{example} {example} 1', "
            f"got {numbers!r}"
        )
    found = tuple(map(int, given))
    return found[0] if len(found) == 1 else found


def _largest(squares: torch.Tensor, k: int) -> torch.Tensor:
    """1 for the K largest, 0 for the others; those that tie for the last places share them."""
    level = squares.topk(k, sorted=False).values.min()
    if squares.device.type == "cpu" and int((is_kept := squares >= level).sum()) == k:
        return is_kept.double()
    above, tied = squares > level, squares == level
    return above + tied * ((k - above.sum(dtype=torch.float64)) / tied.sum())


def _few_rows(scale: torch.Tensor) -> torch.Tensor | None:
    """The rows that a vertex does not leave zero, on a CPU where they are few; None elsewhere."""
    if scale.device.type != "cpu" or scale.numel() != scale.shape[0]:
        return None
    kept = scale.view(-1).nonzero().view(-1)
    return kept if 8 * kept.numel() <= scale.numel() else None


def _squares_along(part: torch.Tensor, axis: int) -> torch.Tensor:
    """The squared norm of every index along an axis, (size of the axis,), float64."""
    others = [dim for dim in range(part.ndim + 1) if dim != axis]  # with one at the end, for a vector has no others
    if part.device.type == "cpu":
        if axis == 0 and part.is_contiguous() and part.dtype == torch.float32 and part.numel() <= _LONG * part.shape[0]:
            matrix = part.detach().unsqueeze(-1).flatten(1).numpy()
            squares = torch.from_numpy(np.vecdot(matrix, matrix).astype(np.float64))
        elif axis == 0:
            squares = torch.linalg.vector_norm(wide(part).unsqueeze(-1), dim=others).double().square()
        else:
            squares = torch.stack([wide(p).unsqueeze(-1).square().sum(others) for p in rows(part)]).double().sum(0)
        if 1e-20 < float(squares.sum()) < 1e30:  # no square that counts was too small or too large for float32
            return squares
    return torch.linalg.vector_norm(part.unsqueeze(-1), dim=others, dtype=torch.float64).square()


def _rows_here(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of the rows that lie on this rank."""
    return local(dealt_like(torch.arange(tensor.shape[0], device=local(tensor).device), tensor))
