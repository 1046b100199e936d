"""From a model to the groups of `SFW`: which weights lie in which region, and what trains the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ...structure import find_coupled_targets
from ...targets import Groups, Target, find_targets, refuse_adapters, unwrap
from .constraints import Constraint, LpBall, parse_constraint
from .constraints.base import expected_norm
from .constraints.group import GroupKSupportBall
from .optimizer import SFW

SCOPES = ("tensor", "global")
GROUPINGS = ("filters", "neurons", "heads")


def create_sfw(
    model: nn.Module,
    constraint: str | Constraint = "k_sparse",
    k: float | None = None,
    radius: float | str | None = None,
    diameter: float | None = None,
    lr: float = 0.1,
    momentum: float = 0.9,
    dampening: float = 0.0,
    rescale: str = "gradient",
    scope: str = "tensor",
    group_by: str = "filters",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    free: str = "sgd",
    free_lr: float | None = None,
    weight_decay: float = 0.0,
    shrink: bool = True,
    **options: Any,
) -> SFW:
    """`SFW` for a model: its targets in regions, everything else (biases, norms, embeddings, task heads) without.

    A group-K-support ball holds the filters of convolutions; other targets of a model with convolutions then get an L2
    ball of the same size, as in the paper. With `group_by` it holds neurons or heads instead, one ball for all trained
    weights that share them (see `structure.find_coupled_targets`), and targets without any get the L2 ball.

    Args:
        model: whose parameters are trained.
        constraint: a region, its text, or the name of one, for which `k`, `radius` and `diameter` then stand here.
        k: a count, or a share as a float in (0, 1]; 0.05 unless the constraint has one.
        radius: a number, "init:VALUE" or "weights:VALUE", see `Constraint`; "init:15" unless the constraint has a size.
        diameter: instead of the radius.
        lr: learning rate.
        momentum: see `SFW`.
        dampening: see `SFW`.
        rescale: see `SFW`.
        scope: "tensor" for a region of each weight, "global" for one that holds them all.
        group_by: what a group of group_k_support is: "filters", or rows where there are no convolutions; "neurons" of
            feed-forward pairs; "heads" of attentions. A weight with parts in two pairs lies in the ball of the first.
        include: globs on names of weights, see `find_targets`.
        exclude: globs on names of weights, see `find_targets`.
        free: optimizer of the other parameters, "sgd" or "adamw".
        free_lr: their learning rate, `lr` by default.
        weight_decay: theirs.
        shrink: scale weights that lie outside their region radially into it, now.
        **options: further arguments of `SFW`.

    Raises:
        ValueError: for a model without targets, or without neurons or heads where these are asked for, a wrong glob, or
            what `SFW` and `parse_constraint` refuse.
    """
    model = unwrap(model)
    refuse_adapters(model, "SFW")
    region = region_of(constraint, k, radius, diameter)
    check_grouping(region, scope, group_by)
    find = find_targets if group_by == "filters" else find_coupled_targets
    targets = {n: t for n, t in find(model, include, exclude).items() if t.parameter.requires_grad}
    if not targets:
        raise ValueError(f"{type(model).__name__} has no trained weight that a constraint could cover")
    inside = {id(t.parameter) for t in targets.values()}
    others = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    groups = constrained_groups(targets, region, scope, group_by)
    if others:
        groups.append({"params": others, "constraint": None, "lr": lr if free_lr is None else free_lr})
    optimizer = SFW(groups, lr, momentum, dampening, rescale, free=free, weight_decay=weight_decay, **options)
    if shrink:
        optimizer.shrink_()
    return optimizer


def region_of(
    constraint: str | Constraint, k: float | None, radius: float | str | None, diameter: float | None
) -> Constraint:
    """The region that flags describe; what they leave open is as published: k 0.05, radius "init:15"."""
    if radius is None and diameter is None:
        radius = "init:15"
    return parse_constraint(constraint, k=0.05 if k is None else k, radius=radius, diameter=diameter)


def check_grouping(region: Constraint, scope: str, group_by: str) -> None:
    """ValueError unless a region can have this scope and these groups."""
    for name, value, allowed in (("scope", scope, SCOPES), ("group_by", group_by, GROUPINGS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if group_by == "filters":
        return
    if not isinstance(region, GroupKSupportBall):
        raise ValueError(f"group_by={group_by!r} needs the constraint group_k_support, got {region}")
    if scope != "tensor":
        raise ValueError(
            f"group_by={group_by!r} makes a ball of each layer's {group_by}, so that scope must be 'tensor', "
            f"got {scope!r}; one ball for all weights can hold filters"
        )
    if region != GroupKSupportBall(region.k, **_size_of(region)):
        raise ValueError(
            f"group_by={group_by!r} finds axes, groups and blocks in the model; leave them out of {region}"
        )


def constrained_groups(
    targets: dict[str, Target], region: Constraint, scope: str, group_by: str
) -> list[dict[str, Any]]:
    """Parameter groups of one ball each, with the names of their parameters."""
    if isinstance(region, GroupKSupportBall) and group_by != "filters":
        return _coupled(targets, region, group_by)
    if not isinstance(region, GroupKSupportBall) or not any(t.kind == "conv" for t in targets.values()):
        return _groups(targets, lambda _: region, scope)
    filters = {n: t for n, t in targets.items() if t.kind == "conv"}
    rest = {n: t for n, t in targets.items() if t.kind != "conv"}
    ball = LpBall(2, **_size_of(region))
    return _groups(filters, lambda _: region, scope) + (_groups(rest, lambda _: ball, scope) if rest else [])


def _coupled(targets: dict[str, Target], region: GroupKSupportBall, kind: str) -> list[dict[str, Any]]:
    """A ball for all weights that share neurons or heads, and an L2 ball for each other weight."""
    found = {name: (target.groups or {})[kind] for name, target in targets.items()}
    members: dict[str, dict[str, Groups]] = {}
    for name, parts in found.items():
        if not isinstance(parts, str):
            members.setdefault(parts[0].of, {})[name] = parts[0]
    if not members:
        name, reason = next(iter(found.items()))
        raise ValueError(f"group_by={kind!r} finds no {kind} in these {len(found)} weights; {name!r} for one: {reason}")
    groups = []
    for layouts in members.values():
        axes, counts, blocks = zip(*((part.dim, part.count, part.blocks) for part in layouts.values()), strict=True)
        ball = GroupKSupportBall(region.k, axes=axes, groups=counts[0], blocks=blocks, **_size_of(region))
        parameters = [(name, targets[name].parameter) for name in layouts]
        groups.append({"params": parameters, "constraint": _sized(ball, [targets[name] for name in layouts])})
    rest = {name: target for name, target in targets.items() if isinstance(found[name], str)}
    return groups + _groups(rest, lambda _: LpBall(2, **_size_of(region)), "tensor")


def _groups(targets: dict[str, Target], region: Callable[[Target], Constraint], scope: str) -> list[dict[str, Any]]:
    named = list(targets.items())
    balls: Iterable[list[tuple[str, Target]]] = [named] if scope == "global" else [[pair] for pair in named]
    return [
        {
            "params": [(name, target.parameter) for name, target in ball],
            "constraint": _along_outputs(region(ball[0][1]), [target for _, target in ball]),
        }
        for ball in balls
    ]


def _along_outputs(region: Constraint, targets: Sequence[Target]) -> Constraint:
    """The region for weights whose outputs lie along their last dimension, as those of GPT-2 do."""
    axes = [target.output_dim for target in targets]
    if isinstance(region, GroupKSupportBall) and region.axes == 0 and any(axes):
        region = GroupKSupportBall(region.k, axes=axes, groups=region.groups, blocks=region.blocks, **_size_of(region))
    return _sized(region, targets)


def _sized(region: Constraint, targets: Sequence[Target]) -> Constraint:
    """A region counts outputs along the first dimension for "init:VALUE"; where they lie elsewhere it gets a number."""
    if region.size.kind != "init" or not any(target.output_dim for target in targets):
        return region
    norm = math.sqrt(sum(expected_norm(target.parameter, target.output_dim) ** 2 for target in targets))
    unit = region.diameter_of_unit_ball([target.parameter for target in targets])
    return type(region)(**region.options, radius=2 * region.size.value * norm / unit)


def _size_of(region: Constraint) -> dict[str, Any]:
    size = region.size
    if size.kind in ("radius", "diameter"):
        return {size.kind: size.value}
    return {"radius": f"{size.kind}:{size.value}"}


class TimmSFW(SFW):
    """`SFW` as timm's optimizer factory makes it: `create_optimizer_v2(model, "sfw", lr=1.0, constraint="k_sparse")`.

    timm hands over parameters without modules: weights of two or more dimensions get a region of their own each,
    embeddings among them; the others, which timm spares weight decay, are free. `create_sfw` knows the model.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        constraint: str | Constraint = "k_sparse",
        k: float | None = None,
        radius: float | str | None = None,
        diameter: float | None = None,
        shrink: bool = True,
        **options: Any,
    ) -> None:
        region = region_of(constraint, k, radius, diameter)
        groups: list[dict[str, Any]] = []
        listed = list(params)
        for group in listed if listed and isinstance(listed[0], dict) else [{"params": listed}]:
            weights: list[torch.Tensor] = list(group["params"])
            groups += [{**group, "params": [w], "constraint": region} for w in weights if w.ndim > 1]
            free = [w for w in weights if w.ndim <= 1]
            groups += [{**group, "params": free, "constraint": None}] if free else []
        super().__init__(groups, lr, **options)
        if shrink:
            self.shrink_()
