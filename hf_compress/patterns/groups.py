"""Whole filters, hidden neurons and attention heads: the groups of smallest norm are zero.

What belongs to one neuron or head lies in several weights, so that these share one score: `structure` finds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..distributed import dealt_like, gathered, local, shard_group, sharded_like
from ..selection import keep_largest
from ..targets import Groups, Target
from .base import Pattern, check_share, count_pruned, format_share, parse_share, revision_share
from .masking import zero_

_NORMS = {"l1": 1, "l2": 2}


def _forms(name: str) -> str:
    return f'"{name}:SHARE" with a share removed in [0, 1), such as {name}:0.5 (by L2) or {name}:0.5:l1'


@dataclass(frozen=True)
class Grouped(Pattern):
    """The same share of the groups of every layer is zero: exactly floor(share * n), ties by position."""

    name: ClassVar[str]
    share: float
    norm: str = "l2"

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", check_share(self.share, self.forms))
        if self.norm not in _NORMS:
            raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {self.norm!r}; allowed: {self.forms}")

    def __str__(self) -> str:
        return f"{self.name}:{format_share(self.share)}" + ("" if self.norm == "l2" else f":{self.norm}")

    @classmethod
    def parse(cls, text: str) -> Any:
        name, *rest = text.split(":")
        if name != cls.name:
            return None
        if len(rest) not in (1, 2):
            raise ValueError(f"{text!r} is no pattern; allowed: {cls.forms}")
        return cls(parse_share(rest[0], cls.forms), *rest[1:])

    @property
    def revision(self) -> str:
        return f"{self.name}-{revision_share(self.share)}" + ("" if self.norm == "l2" else f"-{self.norm}")

    def groups_of(self, name: str, target: Target) -> tuple[Groups, ...] | str:
        """The groups that a weight has a part in, or why it has none.

        Raises:
            ValueError: for a weight that does not say what belongs to it.
        """
        if target.groups is None:
            raise ValueError(
                f"{self} must know which weights belong together, and a weight alone does not say: use hfc.compress, "
                "or targets of hf_compress.structure.find_coupled_targets(model)"
            )
        return target.groups[self.name]

    def skip_reason(self, target: Target) -> str | None:
        found = self.groups_of("", target)
        return found if isinstance(found, str) else None

    def select(self, weights: Mapping[str, Target]) -> dict[str, torch.Tensor]:
        return self._masks(weights, self.kept(weights))

    def compress_(self, weights: Mapping[str, Target]) -> dict[str, torch.Tensor]:
        """As for every pattern. An output that is removed loses its bias too; what stands behind it stays."""
        return self.write_(weights, self.kept(weights))

    def write_(
        self, weights: Mapping[str, Target], kept: Mapping[str, list[tuple[Groups, torch.Tensor]]]
    ) -> dict[str, torch.Tensor]:
        """Set to zero what is not kept, with the biases of outputs that go; returns the masks."""
        masks = self._masks(weights, kept)
        for name, mask in masks.items():
            target = weights[name]
            zero_(local(target.parameter), local(mask))
            for groups, line in kept[name]:
                if target.bias is not None and groups.dim == target.output_dim:
                    line = dealt_like(line.to(target.bias.device), target.bias)
                    zero_(local(target.bias), local(line))
        return masks

    def kept(self, weights: Mapping[str, Target], multiple_of: int = 1) -> dict[str, list[tuple[Groups, torch.Tensor]]]:
        """For each weight its groups, and a bool vector along their dimension: True is kept.

        Args:
            weights: see `select`.
            multiple_of: so many groups or a multiple are kept, or all: rounded up.
        """
        found = {name: self.groups_of(name, target) for name, target in weights.items()}
        parts: dict[str, list[tuple[str, Groups]]] = {}
        for name, groups in found.items():
            for part in groups if isinstance(groups, tuple) else ():
                parts.setdefault(part.of, []).append((name, part))
        if found and not parts:
            name, reason = next(iter(found.items()))
            raise ValueError(f"{self} finds no {self.name} in these {len(found)} weights; {name!r} for one: {reason}")
        kept: dict[str, list[tuple[Groups, torch.Tensor]]] = {name: [] for name in weights}
        for members in parts.values():
            keep = self._keep([(weights[name].parameter.detach(), part) for name, part in members], multiple_of)
            for name, part in members:
                size = weights[name].parameter.shape[part.dim] // max(1, part.blocks * part.count)
                line = keep.to(weights[name].parameter.device).repeat_interleave(size).repeat(part.blocks)
                kept[name].append((part, line))
        return kept

    def _keep(self, members: list[tuple[torch.Tensor, Groups]], multiple_of: int) -> torch.Tensor:
        """Which groups are kept. Sums in float64, rounded, order ties alike on shards and on one process."""
        power = _NORMS[self.norm]
        sums = [_powers(weight, groups, power) for weight, groups in members]
        powers = torch.stack([s.to(sums[0].device) for s in sums]).sum(0)
        scores = powers if power == 1 else powers.sqrt()
        if all(weight.dtype != torch.float64 for weight, _ in members):
            scores = scores.float()
        total = scores.numel()
        left = total - count_pruned(self.share, total)
        return keep_largest([scores], total - min(total, -(-left // multiple_of) * multiple_of))[0]

    def _masks(
        self, weights: Mapping[str, Target], kept: Mapping[str, list[tuple[Groups, torch.Tensor]]]
    ) -> dict[str, torch.Tensor]:
        masks = {}
        for name, lines in kept.items():
            weight = weights[name].parameter
            part = torch.ones_like(local(weight), dtype=torch.bool)
            for groups, line in lines:
                here = local(dealt_like(line, weight)) if groups.dim == 0 else line
                part &= here.view([-1 if d == groups.dim else 1 for d in range(weight.ndim)])
            masks[name] = sharded_like(part, weight)
        return masks


def _powers(weight: torch.Tensor, groups: Groups, power: int) -> torch.Tensor:
    """The sum of |w|^power of each group of one weight, the same on all ranks."""
    others = [d for d in range(weight.ndim) if d != groups.dim]
    if shard_group(weight) or not others:
        magnitudes = weight.double().abs().pow(power)
        along = gathered(magnitudes.sum(others) if others else magnitudes)
    else:
        along = torch.linalg.vector_norm(weight, power, others, dtype=torch.float64).pow(power)
    return along.view(groups.blocks, groups.count, -1).sum((0, 2)) if along.numel() else along


@dataclass(frozen=True)
class Filters(Grouped):
    """Output channels of convolutions: floor(share * n) of every layer are zero, with their biases.

    Every layer is judged by itself, also where a residual addition ties it to others, and a batch norm behind a
    filter stays as it is, so that its shift still comes out. Plain tensors count as convolutions.

    Attributes:
        share: of the filters removed from each layer, in [0, 1).
        norm: "l2" or "l1" of a filter.

    Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv:1608.08710 (by L1).
    """

    name: ClassVar[str] = "filters"
    forms: ClassVar[str] = _forms(name)

    def groups_of(self, name: str, target: Target) -> tuple[Groups, ...] | str:
        """Its rows, for the weight of a convolution."""
        if target.kind not in ("conv", "tensor"):
            return "it is no convolution"
        if target.parameter.ndim == 0:
            return "it is a single number"
        return (Groups(name, 0, target.parameter.shape[0]),)


@dataclass(frozen=True)
class Neurons(Grouped):
    """Hidden neurons of feed-forward pairs: floor(share * n) of every pair are zero.

    A neuron is its row of the first layer (of both, where one gates the other), its bias, and its column of the second
    layer: the weights share one score, biases have no say, and all become zero. Nothing of the neuron is left.

    Attributes:
        share: of the neurons removed from each pair, in [0, 1).
        norm: "l2" or "l1" of all weights of a neuron.
    """

    name: ClassVar[str] = "neurons"
    forms: ClassVar[str] = _forms(name)


@dataclass(frozen=True)
class Heads(Grouped):
    """Attention heads: floor(share * n) of every attention are zero.

    A head is its rows of query, key and value, their biases, and its columns of the output projection. Queries that
    share a key and a value are removed together with them, so that such a group counts as one head.

    Attributes:
        share: of the heads removed from each attention, in [0, 1).
        norm: "l2" or "l1" of all weights of a head.
    """

    name: ClassVar[str] = "heads"
    forms: ClassVar[str] = _forms(name)
