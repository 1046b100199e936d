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
    module: Any
    root: str  # the layer of `pruned` that they go with
    role: str  # "root" has a Gram term, "passing" is made or passed on with it, "norm"
    pruned: torch.Tensor
    kept: torch.Tensor
    blocks: int = 1

    def parameters(self) -> list[tuple[torch.Tensor, int]]:
        """Weight and bias of the layer, and the dimension in which its outputs lie."""
        dim = 0 if self.role == "norm" or kind_of(self.module)[1] else 1
        return [(p, d) for p, d in ((self.module.weight, dim), (self.module.bias, 0)) if p is not None]


class _Batch:
    """Root layers whose products are taken together: of one shape, with as many rows that go."""

    def __init__(self, rows: Sequence[_Rows]) -> None:
        self.modules = [each.module for each in rows]
        self.blocks, count = rows[0].blocks, len(rows[0].pruned) + len(rows[0].kept)
        self.rows, self.num_pruned = count // self.blocks, len(rows[0].pruned) // self.blocks
        order = []
        for i, each in enumerate(rows):  # of each block first what goes, then what stays
            parts = (each.pruned.view(self.blocks, -1), each.kept.view(self.blocks, -1))
            order.append(torch.cat(parts, 1).flatten() + i * count)
        self._order = torch.cat(order)
        self._back = self._order.argsort()

    def ordered(self) -> torch.Tensor:
        """All rows in float32 at least, (layers * blocks, rows, D): `num_pruned` that go, then those that stay."""
        stacked = exact(torch.stack([rows_of(module) for module in self.modules]))
        return stacked.flatten(0, 1).index_select(0, self._order).view(-1, self.rows, stacked.shape[2])

    def back(self, ordered: torch.Tensor) -> list[torch.Tensor]:
        """The way back from `ordered`, in the shapes and types of the weights."""
        rows = ordered.flatten(0, 1).index_select(0, self._back)
        listed = rows.view(len(self.modules), -1, rows.shape[1]).unbind()
        return [as_weight(m, module).to(module.weight.dtype) for m, module in zip(listed, self.modules, strict=True)]


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
        self._vectors = list(self._decaying_vectors())
        decaying = (rows for rows in self._rows if self._decay_of(rows) and rows.module.weight is not None)
        self._matrices = [r for r in decaying if r.module.weight.ndim > 1 and (r.role != "root" or not self._batches)]

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
        self._rows.append(_Rows(line.path, module, root, role, pruned, kept, line.blocks))

    def _batched(self) -> Iterator[_Batch]:
        alike: dict[Any, list[_Rows]] = {}
        for rows in self._rows:
            if rows.role != "root":
                continue
            weight = rows_of(rows.module)
            key = weight.shape, weight.dtype, weight.device, rows.blocks, len(rows.pruned)
            alike.setdefault(key, []).append(rows)
        for (shape, *_), listed in alike.items():
            count = max(1, _BATCH // shape.numel())
            yield from (_Batch(listed[i : i + count]) for i in range(0, len(listed), count))

    def _decaying_vectors(self) -> Iterator[tuple[list[tuple[Any, str]], torch.Tensor]]:
        """Module and name of biases, and of scales and shifts of norms, with the weights of their decay end to end."""
        alike: dict[Any, tuple[list[tuple[Any, str]], list[torch.Tensor]]] = {}
        for rows in self._rows:
            for name in ("weight", "bias"):
                vector = getattr(rows.module, name)
                if vector is not None and vector.ndim == 1 and self._decay_of(rows):
                    factors = torch.zeros_like(vector, requires_grad=False)
                    names, listed = alike.setdefault((vector.device, vector.dtype), ([], []))
                    names.append((rows.module, name))
                    listed.append(factors.index_fill_(0, rows.pruned, self._decay_of(rows)))
        for names, listed in alike.values():
            yield names, torch.cat(listed)

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
                for parameter, dim in rows.parameters():
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
                batch = _Batch([rows])
                pruned, kept = batch.ordered().tensor_split([batch.num_pruned], 1)
                inside = (pruned @ pruned.mT).square().sum() + 2 * (pruned @ kept.mT).square().sum()
                gram.append(self._gram_factor(batch.rows) / 4 * inside)
            for parameter, dim in rows.parameters():
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
            updates = self._of_roots(batch, strength, -scale)
            _add([m.weight for m in batch.modules], updates, place, scale)
        for names, factors in self._vectors:
            vectors = [module._parameters[name] for module, name in names]
            update = torch.cat(vectors).mul_(factors).mul_(strength)
            _add(vectors, update.split([len(vector) for vector in vectors]), place, scale)
        for rows in self._matrices:
            weight, dim = rows.parameters()[0]
            if weight.requires_grad:
                chosen = weight.index_select(dim, rows.pruned) * (self._decay_of(rows) * strength)
                place(weight).index_add_(dim, rows.pruned, chosen.to(weight.dtype), alpha=scale)

    def _of_roots(self, batch: _Batch, strength: float | torch.Tensor, rate: float) -> list[torch.Tensor]:
        """The Gram term and the decay of rows, for root layers of one shape; bounded for a step of a positive rate."""
        rows = batch.ordered()
        update = torch.empty_like(rows)
        factor = self._gram_factor(batch.rows) * strength
        pruned, kept = rows.tensor_split([batch.num_pruned], 1)
        of_pruned, of_kept = update.tensor_split([batch.num_pruned], 1)
        _multiply(pruned, kept, of_pruned, of_kept)
        if rate > 0:
            longest = torch.minimum(_longest_step(pruned, of_pruned), _longest_step(kept, of_kept))
            factor = (longest / rate).clamp_max(factor)
        update.mul_(factor)
        of_pruned.add_(pruned * (self.filter_weight * strength))
        return batch.back(update)

    def _gram_factor(self, rows: int) -> float:
        return 4 * self.gram_weight / {"mean": rows * rows, "n": rows, "sum": 1}[self.gram_scale]

    def _decay_of(self, rows: _Rows) -> float:
        return self.norm_weight if rows.role == "norm" else self.filter_weight


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


def _add(
    parameters: Sequence[torch.Tensor],
    updates: Sequence[torch.Tensor],
    place: Callable[[torch.Tensor], torch.Tensor],
    scale: float,
) -> None:
    """Add updates where `place` says, for parameters that are trained."""
    trained = [(place(p), update) for p, update in zip(parameters, updates, strict=True) if p.requires_grad]
    if trained:
        torch._foreach_add_([where for where, _ in trained], [update for _, update in trained], alpha=scale)


def gradient_norm(penalty: Any, strength: float) -> torch.Tensor:
    """The L2 norm of what `add_gradients` of a penalty adds; 0-dim float32 at least."""
    found: dict[torch.Tensor, torch.Tensor] = {}
    with torch.no_grad():
        penalty._add_scaled(strength, lambda parameter: found.setdefault(parameter, torch.zeros_like(parameter)))
    return total_norm(found.values())


def _multiply(pruned: torch.Tensor, kept: torch.Tensor, of_pruned: torch.Tensor, of_kept: torch.Tensor) -> None:
    """Write W_P W^T W and W_K W_P^T W_P, by the Gram matrix of rows or that of columns, whichever takes less."""
    (p, d), k = pruned.shape[1:], kept.shape[1]
    if 2 * (p + k) * d < p * (2 * p + 3 * k):
        of_rows = pruned.mT @ pruned
        torch.bmm(kept, of_rows, out=of_kept)
        torch.bmm(pruned, of_rows.baddbmm_(kept.mT, kept), out=of_pruned)
    else:
        across = pruned @ kept.mT
        torch.bmm(across.mT, pruned, out=of_kept)
        torch.bmm(pruned @ pruned.mT, pruned, out=of_pruned)
        of_pruned.baddbmm_(across, kept)


def _longest_step(rows: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The step along the gradient after which the rows are smallest, for each of a batch; 0 for a gradient of 0."""
    tiny = torch.finfo(rows.dtype).tiny
    return (rows * gradient).sum((1, 2), keepdim=True) / gradient.square().sum((1, 2), keepdim=True).clamp_min(tiny)


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient of a parameter, zeros where it has none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
