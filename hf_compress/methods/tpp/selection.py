"""Which filters, neurons and heads TPP will remove: those of least mean magnitude, chosen once, before it trains."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import torch
from torch import nn

from ...calibration import in_eval_mode
from ...patterns import Filters, Heads, Neurons, Pattern, parse_pattern
from ...patterns.groups import Grouped
from ...structure import Belonging, Line, find_coupled_targets, reasons_to_stay
from ...structure.dependencies import call
from ...targets import Groups, Target, kind_of, unwrap

_FORMS = "filters:SHARE, neurons:SHARE or heads:SHARE, alone or behind a glob on layers, such as *layer1.*=filters:0.5"
_MOST = Decimal("0.995")  # of the rows of a layer go at most, as published


@dataclass(frozen=True)
class Rule:
    """The share of groups that goes from the layers that a glob matches.

    Attributes:
        glob: on names of layers; None means all that can lose groups.
        pattern: its kind of groups and its share.
    """

    glob: str | None
    pattern: Grouped

    @classmethod
    def parse(cls, text: str) -> Rule:
        """From "filters:0.5" or "*layer1.*.conv1=filters:0.5"; ValueError names the forms."""
        glob, equals, name = text.rpartition("=") if isinstance(text, str) else ("", "", text)
        pattern: Pattern = parse_pattern(name)
        if not isinstance(pattern, Grouped) or (equals and not glob):
            raise ValueError(f"{text!r} removes nothing; allowed: {_FORMS}")
        return cls(glob if equals else None, pattern)

    def __str__(self) -> str:
        return f"{self.glob}={self.pattern}" if self.glob else str(self.pattern)


@dataclass(frozen=True)
class Selection:
    """What goes.

    Attributes:
        pruned: name of a layer to the indices of its outputs that go; of an attention the value projection.
        patterns: "filters:0.5" and the like, with the share of all groups of these layers that goes.
        skipped: name of a layer that keeps its shape to the reason.
        speed_up: multiplications of Linear layers and convolutions before, divided by those after.
    """

    pruned: dict[str, list[int]]
    patterns: tuple[Grouped, ...]
    skipped: dict[str, str]
    speed_up: float

    @property
    def pattern(self) -> str:
        """All patterns as one text, a chain where there are several."""
        return "+".join(map(str, self.patterns))


def select(
    model: nn.Module,
    rules: Sequence[str | Rule],
    example_inputs: Any,
    speed_up: float | None = None,
    multiple_of: int = 1,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    reasons: Mapping[str, str] | None = None,
) -> Selection:
    """Choose the outputs that go from each layer: min(ceil(share * n), floor(0.995 n)), of least mean magnitude.

    Args:
        model: any module; wrappers are looked through.
        rules: patterns, or globs on layers and patterns; the last one that matches a layer counts, and layers that no
            rule matches keep their shape, as do those of a share of 0.
        example_inputs: one sample to run the model on.
        speed_up: shares are multiplied by one number, so that the multiplications fall to 1 / speed_up at least.
        multiple_of: so many filters or neurons or a multiple stay, rounded up; heads are not rounded.
        include: globs on names of weights, see `find_targets`.
        exclude: globs on names of weights, see `find_targets`.
        reasons: why weights cannot change, for those that are known not to.

    Raises:
        ValueError: for a glob that matches no layer, a layer that a glob names and that cannot lose outputs exactly,
            nothing to remove, or a speed-up that cannot be reached.

    Source: Wang and Fu, arXiv:2207.12534, section 3.3.
    """
    model = unwrap(model)
    parsed = [rule if isinstance(rule, Rule) else Rule.parse(rule) for rule in rules]
    belonging = Belonging(model, example_inputs)
    targets = find_coupled_targets(model, include, exclude)
    stay = {**reasons_to_stay(model, is_replaced=False), **(reasons or {})}
    groups, skipped = _removable(model, parsed, belonging, targets, stay)
    macs = _Multiplications(model, groups, example_inputs)
    counts = {g.path: g.count_pruned(multiple_of=multiple_of) for g in groups}
    if speed_up is not None:
        counts = _reach(groups, macs, speed_up, multiple_of)
    pruned = {g.path: g.smallest(counts[g.path]) for g in groups if counts[g.path]}
    if not pruned:
        raise ValueError(f"{', '.join(map(str, parsed))} removes nothing from {type(model).__name__}")
    return Selection(pruned, _patterns(groups, counts), skipped, macs.dense / macs.after(counts))


@dataclass(frozen=True)
class _Group:
    """Filters, neurons or heads of one layer, or of layers that make them together."""

    path: str
    pattern: Grouped
    groups: Groups
    rows: int
    scores: torch.Tensor
    lines: tuple[Line, ...]  # that go with the first of them

    def count_pruned(self, factor: float = 1.0, multiple_of: int = 1) -> int:
        """How many go, for a factor of the share."""
        count = self.groups.count
        share = min(Decimal(repr(self.pattern.share)) * Decimal(factor), Decimal(1))
        left = count - min(math.ceil(share * count), math.floor(_MOST * count))
        multiple = 1 if isinstance(self.pattern, Heads) else multiple_of
        return max(0, count + -left // multiple * multiple)

    def smallest(self, count: int) -> list[int]:
        """The rows of those that go, ascending; of equal scores the lower position goes first."""
        return _rows_of(self.scores.sort(stable=True).indices[:count].sort().values, self.rows, self.groups)


def _removable(
    model: nn.Module,
    rules: Sequence[Rule],
    belonging: Belonging,
    targets: Mapping[str, Target],
    stay: Mapping[str, str],
) -> tuple[list[_Group], dict[str, str]]:
    """The groups that the rules mean, in the order of layers, and why other layers keep their shape."""
    found: list[_Group] = []
    skipped: dict[str, str] = {}
    used: set[Rule] = set()
    covered: set[str] = set()  # layers whose outputs go with those of another that was found
    for kind in (Filters, Neurons, Heads):
        own = [rule for rule in rules if isinstance(rule.pattern, kind)]
        for makers in _makers(targets, kind) if own else ():
            meant = [rule for rule in own if _matches(rule, makers)]
            used.update(meant)
            if not meant or not meant[-1].pattern.share or makers[0][0] in covered:
                continue
            try:
                group = _group(makers, meant[-1].pattern, belonging, targets, stay)
                found.append(group)
                covered |= {line.path for line in group.lines if line.part == "outputs"}
            except ValueError as reason:
                if meant[-1].glob is not None:
                    raise ValueError(f"{meant[-1]} names a layer that keeps its shape: {reason}") from reason
                skipped[makers[0][0]] = str(reason)
    for rule in rules:
        if rule.glob is not None and rule not in used:
            some = [makers[0][0] for makers in _makers(targets, type(rule.pattern))]
            listed = ", ".join(some[:8]) + (", ..." if len(some) > 8 else "")
            raise ValueError(f"{rule} matches no layer with {rule.pattern.name}; there are: {listed or 'none'}")
    if not found:
        reasons = "".join(f"; {path!r} for one: {reason}" for path, reason in list(skipped.items())[:1])
        raise ValueError(
            f"{type(model).__name__} has nothing that {', '.join(map(str, rules))} removes{reasons}; filters are of "
            "convolutions, neurons and heads of transformers"
        )
    return found, skipped


def _makers(targets: Mapping[str, Target], kind: type[Grouped]) -> Iterator[list[tuple[str, Groups]]]:
    """Layers that make the same groups, and how these lie in each; of heads the one that makes values first."""
    made: dict[str, list[tuple[str, Groups]]] = {}
    for name, target in targets.items():
        path = name.rpartition(".")[0]
        if kind is Filters:
            if target.kind == "conv":
                yield [(path, Groups("filters", 0, target.parameter.shape[0]))]
            continue
        parts = target.groups[kind.name] if target.groups is not None else ""
        for part in parts if isinstance(parts, tuple) else ():
            if part.dim == target.output_dim:
                made.setdefault(part.of, []).append((path, part))
    for members in made.values():
        yield sorted(members, key=lambda m: kind is Heads and not m[0].rpartition(".")[2].startswith("v"))


def _matches(rule: Rule, makers: Sequence[tuple[str, Groups]]) -> bool:
    return rule.glob is None or any(fnmatch.fnmatchcase(path, rule.glob) for path, _ in makers)


def _group(
    makers: Sequence[tuple[str, Groups]],
    pattern: Grouped,
    belonging: Belonging,
    targets: Mapping[str, Target],
    stay: Mapping[str, str],
) -> _Group:
    """Raises ValueError where outputs of the layer cannot be removed, or it has one group."""
    path, groups = makers[0]
    if groups.count < 2:
        raise ValueError(f"{path!r} has one of its {pattern.name}, and one stays")
    rows = targets[f"{path}.weight"].parameter.shape[groups.dim]
    lines = belonging.of(path, _rows_of([0], rows, groups))
    for line in lines:
        if f"{line.path}.weight" in stay:
            raise ValueError(f"{line.path!r} stays: {stay[f'{line.path}.weight']}")
    scores = torch.stack([_mean_magnitudes(targets[f"{maker}.weight"], part) for maker, part in makers]).mean(0)
    return _Group(path, pattern, groups, rows, scores, lines)


def _rows_of(members: Any, rows: int, groups: Groups) -> list[int]:
    found: list[int] = torch.arange(rows).view(groups.blocks, groups.count, -1)[:, members].flatten().tolist()
    return found


def _mean_magnitudes(target: Target, groups: Groups) -> torch.Tensor:
    """Mean |w| of each group in one weight, in float64 on the CPU."""
    weight = target.parameter.detach()
    others = [d for d in range(weight.ndim) if d != groups.dim]
    return weight.double().abs().mean(others).cpu().view(groups.blocks, groups.count, -1).mean((0, 2))


class _Multiplications:
    """Multiplications of Linear layers and convolutions, as groups go; attention itself is not counted."""

    def __init__(self, model: nn.Module, groups: Sequence[_Group], example_inputs: Any) -> None:
        self._of_layer = _count(model, example_inputs)
        self._groups = groups
        self.dense = sum(self._of_layer.values())
        self._sizes: dict[str, dict[str, int]] = {}
        for path in self._of_layer:
            layer: Any = model.get_submodule(path)
            reduction_dim = kind_of(layer)[1]
            shape = layer.weight.shape
            self._sizes[path] = {"outputs": shape[1 - reduction_dim], "inputs": shape[reduction_dim]}

    def after(self, counts: Mapping[str, int]) -> float:
        gone = {path: {"outputs": 0.0, "inputs": 0.0} for path in self._of_layer}
        for group in self._groups:
            for line in group.lines:
                if line.part != "norm" and line.path in gone:
                    size = self._sizes[line.path][line.part]
                    gone[line.path][line.part] += counts[group.path] * len(line.indices) / size
        return sum(
            macs * (1 - gone[path]["outputs"]) * (1 - gone[path]["inputs"]) for path, macs in self._of_layer.items()
        )


def _reach(groups: Sequence[_Group], macs: _Multiplications, speed_up: float, multiple_of: int) -> dict[str, int]:
    """The smallest common factor of all shares that reaches the goal, by bisection over where counts change."""
    counts_at = lambda factor: {g.path: g.count_pruned(factor, multiple_of) for g in groups}  # noqa: E731
    factors = sorted({(i + 0.5) / g.groups.count / g.pattern.share for g in groups for i in range(g.groups.count)})
    reached = lambda factor: macs.dense / macs.after(counts_at(factor)) >= speed_up  # noqa: E731
    if not reached(factors[-1]):
        most = macs.dense / macs.after(counts_at(factors[-1]))
        raise ValueError(f"a speed-up of {speed_up:g} is out of reach: these layers give at most {most:.2f}")
    low, high = 0, len(factors) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(factors[middle]) else (middle + 1, high)
    return counts_at(factors[low])


def _patterns(groups: Sequence[_Group], counts: Mapping[str, int]) -> tuple[Grouped, ...]:
    """A pattern for every kind: the share as it was asked for where it is one, else that of all groups together."""
    found: list[Grouped] = []
    for kind in (Filters, Neurons, Heads):
        own = [g for g in groups if isinstance(g.pattern, kind) and counts[g.path]]
        if own:
            shares = {g.pattern.share for g in own}
            is_as_asked = all(counts[g.path] == g.count_pruned() for g in own)
            share = shares.pop() if len(shares) == 1 and is_as_asked else None
            total = sum(counts[g.path] for g in own) / sum(g.groups.count for g in own)
            found.append(replace(own[0].pattern, share=round(total, 3) if share is None else share, norm="l2"))
    return tuple(found)


def _count(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """Multiplications of each layer in one forward pass."""
    found: dict[str, int] = {}

    def hook(path: str, layer: Any) -> Any:
        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            weight = layer.weight
            outputs = weight.shape[1 - kind_of(layer)[1]]
            found[path] = found.get(path, 0) + output.numel() // outputs * weight.numel()

        return layer.register_forward_hook(add)

    handles = [hook(path, module) for path, module in model.named_modules() if kind_of(module)[0]]
    try:
        with torch.no_grad(), in_eval_mode(model):
            call(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
