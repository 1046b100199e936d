"""The penalty of TPP: filters that will be removed become orthogonal to the others, and small (ICLR 2023).

Its gradient has a closed form, which is added to the gradient of the task; there is no graph, and no matrix of all
filters by all filters. With W_P the rows that will be removed and W_K those that stay, the entries of the Gram matrix
W W^T that have a part in P are penalised, so that

    dW_P = c (W_P W_P^T W_P + W_P W_K^T W_K),   dW_K = c W_K W_P^T W_P.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...distributed import is_sharded, total_norm
from ...structure import Belonging, Line
from ...targets import kind_of, unwrap

GRAM_SCALES = ("mean", "n", "sum")
SLIDES: dict[str, Any] = {"gram_weight": 1.0, "gram_scale": "sum", "filter_weight": 0.0, "norm_weight": 2.0}
_BATCH = 1 << 22  # entries of all weights that one batched product takes


@dataclass(frozen=True, eq=False)
class _Rows:
    """Outputs of one layer that will be removed; `blocks` layers of equal shape may lie in its weight."""

    path: str
    root: str  # the layer of `pruned` that they go with
    role: str  # "root" has a Gram term, "passing" is made or passed on with it, "norm"
    pruned: torch.Tensor
    kept: torch.Tensor
    blocks: int = 1


class TrainabilityPenalty:
    """The penalty of rows that will be removed, and its gradient.

    ```python
    penalty = TrainabilityPenalty(model, {"layer1.0.conv1": [3, 7]}, example_inputs=batch)
    loss(batch).backward()
    penalty.add_gradients(strength=1e-4)
    ```

    For a layer with N filters W (N, D), of which P will be removed, and strength s, the gradients are
    4 s gram_weight / N^2 (G o M) W with G = W W^T and M 1 where a row or a column is in P, and s filter_weight w for
    rows and biases, s norm_weight gamma and beta for batch norms, in P. The defaults are those of the published runs;
    `**SLIDES` gives the formula of the slides.

    Args:
        model: any module; wrappers are looked through. Parameters are looked up by name at every step.
        pruned: name of a layer to the indices of its outputs that will be removed. Norms, depthwise convolutions and
            gates that go with them get the terms of their rows; of an attention name the value projection.
        example_inputs: a forward pass on them shows what goes with filters; see `structure.Belonging`.
        gram_weight: of the Gram term; 1000 is published.
        gram_scale: "mean" divides by N^2 as published, and vanishes for wide layers; "n" divides by N, where a weight
            of 16 equals the published one at 64 filters; "sum" divides by nothing.
        filter_weight: of the squared rows and biases.
        norm_weight: of the squared scales and shifts of batch norms.

    Raises:
        ValueError: for no layer, rows that cannot be removed (see `Belonging.of`), a wrong setting, or weights dealt
            to several processes.

    Source: Wang and Fu, Trainability Preserving Neural Pruning, ICLR 2023, arXiv:2207.12534, equation 3.
    """

    def __init__(
        self,
        model: nn.Module,
        pruned: Mapping[str, Sequence[int]],
        example_inputs: Any = None,
        gram_weight: float = 1000.0,
        gram_scale: str = "mean",
        filter_weight: float = 1.0,
        norm_weight: float = 1.0,
    ) -> None:
        weights = {"gram_weight": gram_weight, "filter_weight": filter_weight, "norm_weight": norm_weight}
        for name, value in weights.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if gram_scale not in GRAM_SCALES:
            raise ValueError(f"gram_scale is one of {', '.join(GRAM_SCALES)}, got {gram_scale!r}")
        if not pruned:
            raise ValueError("no layer has rows to remove; name some in `pruned`")
        self._model = unwrap(model)
        self.gram_weight, self.gram_scale = gram_weight, gram_scale
        self.filter_weight, self.norm_weight = filter_weight, norm_weight
        self._rows: list[_Rows] = []
        belonging = Belonging(self._model, example_inputs)
        for path, indices in pruned.items():
            for line in belonging.of(path, indices):
                self._add(path, line)
        self._batches = list(self._batched()) if self.gram_weight else []

    def _add(self, root: str, line: Line) -> None:
        if line.part == "inputs":
            return
        module: Any = self._model.get_submodule(line.path)
        if any(is_sharded(p) for p in module.parameters(recurse=False)):
            raise ValueError(
                f"the rows of {line.path!r} are dealt to several processes, and their products need all of them; "
                "train with DistributedDataParallel (DDP)"
            )
        others = {i for rows in self._rows if rows.path == line.path for i in rows.pruned.tolist()}
        if others & set(line.indices):
            raise ValueError(f"{line.path!r} goes with the outputs of two layers of `pruned`; name one of them")
        role = "norm" if line.part == "norm" else "root" if line.is_root else "passing"
        device, size = _device_of(module), module.num_features if role == "norm" else rows_of(module).shape[0]
        is_pruned = torch.zeros(size, dtype=torch.bool)
        is_pruned[list(line.indices)] = True
        pruned, kept = (mask.nonzero().flatten().to(device) for mask in (is_pruned, ~is_pruned))
        self._rows.append(_Rows(line.path, root, role, pruned, kept, line.blocks))

    def _batched(self) -> Iterator[list[_Rows]]:
        """Root layers whose products are taken together: of one shape, with as many rows that go."""
        alike: dict[Any, list[_Rows]] = {}
        for rows in self._rows:
            if rows.role != "root":
                continue
            weight = rows_of(self._module(rows))
            key = weight.shape, weight.dtype, weight.device, rows.blocks, len(rows.pruned)
            alike.setdefault(key, []).append(rows)
        for (shape, *_), listed in alike.items():
            count = max(1, _BATCH // shape.numel())
            yield from (listed[i : i + count] for i in range(0, len(listed), count))

    @torch.no_grad()
    def add_gradients(self, strength: float | torch.Tensor) -> None:
        """Add the gradient of the penalty to `.grad`; call it once per optimizer step, behind clipping.

        Args:
            strength: lambda of the schedule, from 0. Frozen parameters get nothing.
        """
        self._add_scaled(strength, gradient_of)

    @torch.no_grad()
    def decay_(self, strength: float | torch.Tensor, rate: float) -> None:
        """Step down the penalty by itself, for optimizers that rescale gradients, such as Adam.

        Args:
            strength: see `add_gradients`.
            rate: of the step; a learning rate of SGD divided by (1 - momentum) moves as far in the long run. The step
                of the Gram term is shortened to the one that shrinks rows the most, where it would overshoot that.
        """
        self._add_scaled(strength, lambda parameter: parameter, -rate)

    @torch.no_grad()
    def zero_(self, paths: Sequence[str] | None = None) -> None:
        """Set what will be removed to zero: rows, biases, and the scales and shifts of norms that go with them.

        Args:
            paths: of layers among those of `pruned`; all by default.
        """
        for rows in self._rows:
            if paths is None or rows.root in paths:
                for parameter, dim in self._parameters(rows):
                    parameter.index_fill_(dim, rows.pruned, 0)

    @torch.no_grad()
    def values(self) -> dict[str, torch.Tensor]:
        """The terms at strength 1, summed over layers, without a wait for the device.

        Returns:
            "gram" and "decay", 0-dim float32 (float64 for such weights).
        """
        gram, decay = [], []
        for rows in self._rows:
            if rows.role == "root":
                kept, pruned = self._split([rows])
                inside = (pruned @ pruned.mT).square().sum() + 2 * (pruned @ kept.mT).square().sum()
                gram.append(self._gram_factor(rows) / 4 * inside)
            for parameter, dim in self._parameters(rows):
                chosen = exact(parameter.index_select(dim, rows.pruned))
                decay.append(self._decay_of(rows) / 2 * chosen.square().sum())
        home = decay[0].device
        sums = [torch.stack([term.to(home) for term in found]).sum() for found in (gram, decay)]
        return {"gram": sums[0], "decay": sums[1]}

    def _add_scaled(
        self, strength: float | torch.Tensor, place: Callable[[torch.Tensor], torch.Tensor], scale: float = 1.0
    ) -> None:
        """Add the gradient of the penalty, times a scale, where `place` says for each parameter."""
        for batch in self._batches:
            trained = [rows for rows in batch if self._module(rows).weight.requires_grad]
            if trained:
                weights = [self._module(rows).weight for rows in trained]
                torch._foreach_add_([place(w) for w in weights], self._of_roots(trained, strength, -scale), alpha=scale)
        for rows in self._rows:
            factor = self._decay_of(rows) * strength
            is_done = rows.role == "root" and bool(self._batches)
            for parameter, dim in self._parameters(rows) if self._decay_of(rows) else ():
                if parameter.requires_grad and not (is_done and parameter is self._module(rows).weight):
                    chosen = parameter.index_select(dim, rows.pruned) * factor
                    place(parameter).index_add_(dim, rows.pruned, chosen.to(parameter.dtype), alpha=scale)

    def _of_roots(self, batch: list[_Rows], strength: float | torch.Tensor, rate: float) -> list[torch.Tensor]:
        """The Gram term and the decay of rows, for root layers of one shape; bounded for a step of a positive rate."""
        kept, pruned = self._split(batch)
        weights = [self._module(rows).weight for rows in batch]
        count = rows_of(self._module(batch[0])).shape[0]
        factor = self._gram_factor(batch[0]) * strength
        across, inside = pruned @ kept.mT, pruned @ pruned.mT
        of_pruned = (inside @ pruned).baddbmm_(across, kept)
        of_kept = across.mT @ pruned
        if rate > 0:
            longest = torch.minimum(_longest_step(pruned, of_pruned), _longest_step(kept, of_kept))
            factor = (longest / rate).clamp_max(factor)
        of_pruned.mul_(factor).add_(pruned * (self.filter_weight * strength))
        of_kept.mul_(factor)
        size = pruned.shape[2]
        of_pruned, of_kept = of_pruned.view(len(batch), -1, size), of_kept.view(len(batch), -1, size)
        updates = []
        for i, rows in enumerate(batch):
            update = torch.empty(count, size, dtype=pruned.dtype, device=pruned.device)
            update.index_copy_(0, rows.pruned, of_pruned[i]).index_copy_(0, rows.kept, of_kept[i])
            updates.append(as_weight(update, self._module(rows)))
        return [update.to(weight.dtype) for update, weight in zip(updates, weights, strict=True)]

    def _split(self, batch: list[_Rows]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows that stay and rows that go, in float32 at least, each (layers * blocks, rows, D)."""
        matrices = [rows_of(self._module(rows)) for rows in batch]
        blocks = batch[0].blocks
        found = []
        for which in ("kept", "pruned"):
            parts = [m.index_select(0, getattr(rows, which)) for m, rows in zip(matrices, batch, strict=True)]
            stacked = exact(torch.stack(parts))
            found.append(stacked.view(len(batch) * blocks, -1, stacked.shape[2]))
        return found[0], found[1]

    def _gram_factor(self, rows: _Rows) -> float:
        count = (len(rows.pruned) + len(rows.kept)) // rows.blocks
        return 4 * self.gram_weight / {"mean": count * count, "n": count, "sum": 1}[self.gram_scale]

    def _decay_of(self, rows: _Rows) -> float:
        return self.norm_weight if rows.role == "norm" else self.filter_weight

    def _module(self, rows: _Rows) -> Any:
        return self._model.get_submodule(rows.path)

    def _parameters(self, rows: _Rows) -> list[tuple[torch.Tensor, int]]:
        """Weight and bias of a layer, and the dimension in which its outputs lie."""
        module = self._module(rows)
        dim = 0 if rows.role == "norm" or kind_of(module)[1] else 1
        listed = ((module.weight, dim), (module.bias, 0))
        return [(parameter, dim) for parameter, dim in listed if parameter is not None]


def _device_of(module: Any) -> torch.device:
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def rows_of(module: Any) -> torch.Tensor:
    """The weight of a layer as a matrix with a row for each output."""
    weight: torch.Tensor = module.weight.detach()
    return weight.T if weight.ndim == 2 and kind_of(module)[1] == 0 else weight.flatten(1)


def as_weight(matrix: torch.Tensor, module: Any) -> torch.Tensor:
    """A matrix of `rows_of` in the shape of the weight."""
    return matrix.T if module.weight.ndim == 2 and kind_of(module)[1] == 0 else matrix.view(module.weight.shape)


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def gradient_norm(penalty: Any, strength: float) -> torch.Tensor:
    """The L2 norm of what `add_gradients` of a penalty adds; 0-dim float32 at least."""
    found: dict[torch.Tensor, torch.Tensor] = {}
    with torch.no_grad():
        penalty._add_scaled(strength, lambda parameter: found.setdefault(parameter, torch.zeros_like(parameter)))
    return total_norm(found.values())


def _longest_step(rows: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The step along the gradient after which the rows are smallest, for each of a batch; 0 for a gradient of 0."""
    tiny = torch.finfo(rows.dtype).tiny
    return (rows * gradient).sum((1, 2), keepdim=True) / gradient.square().sum((1, 2), keepdim=True).clamp_min(tiny)


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient of a parameter, zeros where it has none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
