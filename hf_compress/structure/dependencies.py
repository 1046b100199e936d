"""What goes with the outputs of a layer: batch norms, depthwise convolutions, and the layers that read them.

torch-pruning traces one forward pass; of its graph nothing is used but indices.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..calibration import in_eval_mode, like_parameters
from ..targets import kind_of, unwrap

# What forward passes raise for inputs or layers that do not fit.
FAILURES = (RuntimeError, TypeError, IndexError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Line:
    """Positions along one dimension of a layer that belong to some outputs of a root layer.

    Attributes:
        path: name of the layer.
        part: "outputs" (of its weight, and its bias), "inputs" (of its weight), or "norm" (of all vectors of a batch
            norm).
        indices: positions in that dimension, ascending.
        is_root: whether it is the root layer, or a layer that makes the same neurons, such as its gate.
        blocks: so many layers lie in one weight, such as query, key and value; the indices are those in all of them.
    """

    path: str
    part: str
    indices: tuple[int, ...]
    is_root: bool = False
    blocks: int = 1


class Dependencies:
    """The graph of a model.

    Args:
        model: any module; wrappers are looked through. Nothing of it is changed.
        example_inputs: a tensor, a sequence of positional arguments or a mapping of keyword arguments; one sample will
            do.

    Raises:
        ValueError: for a model that does not run on these inputs, or whose output has no gradient.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self._model = unwrap(model)
        self._names = {module: name for name, module in self._model.named_modules()}
        self._graph = _trace(self._model, example_inputs)

    def of(self, path: str, indices: Sequence[int]) -> tuple[Line, ...]:
        """What is removed together with outputs of a layer, the layer itself first.

        Args:
            path: name of a Linear or convolution.
            indices: of its outputs: filters, or rows of a Linear.

        Raises:
            ValueError: if there is no such layer or index, if all outputs are meant, or if they cannot be removed
                exactly, with the reason.
        """
        layer = layer_of(self._model, path)
        chosen = check_indices(path, indices, layer.weight.shape[0])
        if layer not in self._graph.module2node:
            raise ValueError(f"{path!r} has no part in the output of {type(self._model).__name__}")
        import torch_pruning

        is_conv = kind_of(layer)[0] == "conv"
        prune = torch_pruning.prune_conv_out_channels if is_conv else torch_pruning.prune_linear_out_channels
        group = list(self._graph.get_pruning_group(layer, prune, chosen))
        is_gated = _is_joined_by_products({item.dep.target for item in group})
        lines: dict[tuple[str, str], set[int]] = {}
        for item in group:
            module, action = item.dep.target.module, item.dep.handler.__name__
            if type(module).__module__.startswith("torch_pruning"):
                continue  # an operation without parameters
            name, part = self._part(path, module, action)
            if part == "outputs" and name != path and not is_gated and not is_depthwise(module):
                raise ValueError(f"outputs of {path!r} cannot be removed alone: those of {name!r} are joined with them")
            lines.setdefault((name, part), set()).update(map(int, item.idxs))
        if not any(part == "inputs" for _, part in lines):
            raise ValueError(f"outputs of {path!r} cannot be removed: no layer reads them, the model gives them out")
        return tuple(Line(n, part, tuple(sorted(found)), n == path) for (n, part), found in lines.items())

    def _part(self, root: str, module: Any, action: str) -> tuple[str, str]:
        name = self._names.get(module)
        if name is None:
            raise ValueError(f"outputs of {root!r} cannot be removed: a parameter outside of layers goes with them")
        if isinstance(module, _BatchNorm):
            return name, "norm"
        if not kind_of(module)[0]:
            statistics = ", whose statistics would change" if "Norm" in type(module).__name__ else ""
            raise ValueError(
                f"outputs of {root!r} cannot be removed exactly: {name!r} goes with them, a "
                f"{type(module).__name__}{statistics}"
            )
        groups = getattr(module, "groups", 1)
        if groups > 1 and not is_depthwise(module):
            raise ValueError(f"outputs of {root!r} cannot be removed: {name!r} is a convolution of {groups} groups")
        return name, "outputs" if is_depthwise(module) or "out" in action else "inputs"


def layer_of(model: nn.Module, path: str) -> Any:
    """The Linear or convolution of a name; ValueError that lists some, if there is none."""
    layers = {name: module for name, module in model.named_modules() if kind_of(module)[0]}
    if path not in layers:
        some = ", ".join(list(layers)[:8]) + (", ..." if len(layers) > 8 else "")
        raise ValueError(f"{path!r} is no Linear, Conv or Conv1D layer of {type(model).__name__}; there are: {some}")
    return layers[path]


def check_indices(path: str, indices: Sequence[int], count: int) -> list[int]:
    """The indices in ascending order; ValueError for none, one twice, one that is not there, or all."""
    chosen = sorted(int(i) for i in indices)
    if not chosen or len(set(chosen)) < len(chosen) or chosen[0] < 0 or chosen[-1] >= count:
        raise ValueError(f"indices of {path!r} are different ones from 0 to {count - 1}, at least one, got {chosen}")
    if len(chosen) == count:
        raise ValueError(f"all {count} outputs of {path!r} are to be removed; leave at least one")
    return chosen


def is_depthwise(module: Any) -> bool:
    """Whether each output of a convolution is made of the input in its place alone."""
    groups: int = getattr(module, "groups", 1)
    return groups > 1 and groups == module.in_channels == module.out_channels


def _is_joined_by_products(nodes: set[Any]) -> bool:
    """Whether outputs meet others in products only, as those of a gate: where one is zero, so is the product."""
    joins = [node for node in nodes if sum(source in nodes for source in node.inputs) > 1]
    return all("Mul" in str(getattr(node.module, "_grad_fn", "")) for node in joins)


def _trace(model: nn.Module, example_inputs: Any) -> Any:
    import torch_pruning

    graph = torch_pruning.DependencyGraph()
    with _unchanged(model), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on parameters outside of layers, which are refused where they matter
        try:
            graph.build_dependency(
                model,
                example_inputs,
                forward_fn=call,
                output_transform=lambda output: [t for t in _tensors(output) if t.grad_fn is not None],
                verbose=False,
            )
        except FAILURES as error:
            raise ValueError(f"{type(model).__name__} does not run on these example_inputs: {error}") from error
    if not graph.module2node:
        raise ValueError(f"the output of {type(model).__name__} depends on none of its layers")
    return graph


def call(model: nn.Module, inputs: Any) -> Any:
    """The output for a tensor, positional or keyword arguments, on the device and in the type of the model."""
    if isinstance(inputs, torch.Tensor):
        return model(like_parameters(model, inputs))
    if isinstance(inputs, Mapping):
        return model(**{k: like_parameters(model, v) for k, v in inputs.items()})
    return model(*(like_parameters(model, v) for v in inputs))


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Modes, hooks and frozen parameters are what they were; in between every parameter has a gradient to trace."""
    hooks = {module: set(module._forward_hooks) for module in model.modules()}
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with in_eval_mode(model):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module in hooks:
            for handle in set(module._forward_hooks) - hooks[module]:
                del module._forward_hooks[handle]


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
