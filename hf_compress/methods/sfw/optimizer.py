"""Stochastic Frank-Wolfe: every step moves the weights of a region towards one of its vertices.

With m the momentum of the gradient, v the vertex that minimizes <m, v> and D the diameter of the region,

    w <- (1 - s) w + s v,    s = clamp(lr * factor, 0, 1)

where `rescale` chooses the factor: 1 ("none"), 1 / D ("diameter"), |m| / |w - v| ("gradient", which makes a step as
long as one of SGD) or 2 |m| / D ("fast_gradient"). Sources: Pokutta, Spiegel and Zimmer, arXiv:2010.07243; Miao et al.,
ICLR 2022; Zimmer, Spiegel and Pokutta, Compression-aware Training of Neural Networks using Frank-Wolfe,
arXiv:2205.11921.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from ...distributed import is_sharded, local
from .constraints import parse_constraint
from .constraints.chunks import numbers_on

RESCALES = ("none", "diameter", "gradient", "fast_gradient")
FREE = ("sgd", "adamw")


class SFW(torch.optim.Optimizer):
    """Stochastic Frank-Wolfe for groups with a constraint, SGD or AdamW for those without.

    ```python
    region = KSparsePolytope(k=21, radius=0.25)
    opt = SFW([{"params": [w], "constraint": region}, {"params": biases, "constraint": None}], lr=0.1)
    ```

    A group is one ball over all its parameters, so that a ball for each parameter takes a group for each. There is no
    weight decay in a region: the factor 1 - s is one. A direction that is zero or not finite leaves the weights of its
    group where they are, and empties their momentum. `create_sfw` makes the groups of a model.

    Args:
        params: groups with a "constraint": a region, its text ("k_sparse(k=0.05, radius=0.25)"), or None. Radii of the
            form init:VALUE and weights:VALUE become numbers here.
        lr: learning rate, at least 0; at most 1 with `rescale="none"`, where it is the share s.
        momentum: in [0, 1).
        dampening: 0 for heavy ball, the value of `momentum` for an average of gradients. In (fast_)gradient mode, steps
            of the heavy ball are about 1 / (1 - momentum) times as long.
        rescale: see above.
        free: "sgd" or "adamw", the optimizer of groups without constraint; they may have an `lr` of their own.
        weight_decay: of groups without constraint (coupled for "sgd", decoupled for "adamw").
        betas: of "adamw".
        eps: of "adamw".

    Attributes:
        tracks_gap: compute `gap` in the coming steps.
        gap: the Frank-Wolfe gap <m, w - v> of the last step, summed over groups: 0 where no vertex is better; a 0-dim
            tensor, None if it was not tracked.

    Raises:
        ValueError: for a wrong number or mode, a region that does not fit its tensors, or parameters that are not
            floating point.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 0.1,
        momentum: float = 0.9,
        dampening: float = 0.0,
        rescale: str = "gradient",
        *,
        free: str = "sgd",
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.tracks_gap = False
        self.gap: torch.Tensor | None = None
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "rescale": rescale, "free": free}
        defaults |= {"weight_decay": weight_decay, "betas": tuple(betas), "eps": eps, "constraint": None, "asked": None}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its constraint gets its radius as a number."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
            if group["constraint"] is not None:
                weights = [p.detach() for p in group["params"]]
                asked = parse_constraint(group["constraint"])
                group["asked"], group["constraint"] = str(asked), asked.resolved(weights)
        except ValueError as error:
            self.param_groups.pop()
            names = group.get("param_names")
            raise ValueError(f"{', '.join(names)}: {error}" if names else str(error)) from error

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; no wait for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights and group["constraint"] is None:
                (_step_sgd if group["free"] == "sgd" else _step_adamw)(group, weights, self.state)
        gaps = [gap for groups in self._bundles() if (gap := self._step_balls(groups)) is not None]
        self.gap = torch.stack([gap.to(gaps[0].device) for gap in gaps]).sum() if gaps else None
        return loss

    @torch.no_grad()
    def shrink_(self) -> list[torch.Tensor]:
        """Scale the weights of each group radially into its region, in place.

        Returns:
            The factors, at most 1, of the groups with a constraint, in their order.
        """
        return [g["constraint"].shrink_(g["params"]) for g in self.param_groups if g["constraint"] is not None]

    def _bundles(self) -> Iterable[list[dict[str, Any]]]:
        """Groups with a region and a gradient, several together where their regions can be and their settings agree."""
        found: dict[Any, list[dict[str, Any]]] = {}
        for i, group in enumerate(self.param_groups):
            if group["constraint"] is not None and any(p.grad is not None for p in group["params"]):
                kind = group["constraint"].kind_together(group["params"])
                settings = [group[name] for name in ("lr", "momentum", "dampening", "rescale")]
                found.setdefault(i if kind is None else (*kind, *settings), []).append(group)
        return found.values()

    def _step_balls(self, groups: list[dict[str, Any]]) -> torch.Tensor | None:
        # In a ball of several a weight without gradient counts as one with a gradient of zero.
        weights = [p for group in groups for p in group["params"]]
        directions = [[self._direction(group, p) for p in group["params"]] for group in groups]
        balls = [group["constraint"] for group in groups]
        if len(groups) == 1:
            oracle = balls[0].oracle(directions[0], [self.state[p] for p in weights])
        else:
            oracle = balls[0].oracle_together(balls, directions)
        radii = [ball.radius_of(group["params"]) for ball, group in zip(balls, groups, strict=True)]
        is_valid = oracle.is_valid
        share = (_factor(groups, oracle, weights, radii) * groups[0]["lr"]).nan_to_num(0).clamp(0, 1) * is_valid
        gap = None
        if self.tracks_gap:
            gap = torch.where(is_valid, oracle.inner(weights) + _numbers(radii, weights) * oracle.dual, 0).sum()
        oracle.move_all_(weights, share)
        for group, is_lost in zip(groups, is_valid.logical_not().view(-1).unbind(), strict=True):
            self._empty_where(is_lost, group["params"])
        return gap

    def _direction(self, group: dict[str, Any], parameter: torch.Tensor) -> Any:
        gradient = parameter.grad
        if group["momentum"] == 0:
            return torch.zeros_like(parameter) if gradient is None else gradient
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter) if gradient is None else gradient.clone()
        elif gradient is not None:
            buffer, here = local(state["momentum_buffer"]), local(gradient)
            if group["dampening"] == group["momentum"]:
                buffer.lerp_(here, 1 - group["momentum"])
            elif group["dampening"] == 0:
                torch.add(here, buffer, alpha=group["momentum"], out=buffer)
            else:
                buffer.mul_(group["momentum"]).add_(here, alpha=1 - group["dampening"])
        return state["momentum_buffer"]

    def _empty_where(self, is_lost: torch.Tensor, weights: list[torch.Tensor]) -> None:
        """What is not finite would stay in the momentum for ever."""
        if is_lost.device.type == "cpu" and not is_lost:
            return
        for weight in weights:
            buffer = self.state[weight].get("momentum_buffer")
            if buffer is not None:
                local(buffer).masked_fill_(is_lost.to(local(buffer).device), 0)

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer; regions are there as text."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group["constraint"] = None if group["constraint"] is None else str(group["constraint"])
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; radii that are multiples of a norm are those of the weights at the start.

        Raises:
            ValueError: if a group has another region here than there.
        """
        state_dict = {**state_dict, "param_groups": copy.copy(state_dict["param_groups"])}
        for i, (own, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            region = None if own["constraint"] is None else str(own["constraint"])
            is_same = saved.get("asked") == own["asked"] if saved.get("asked") else saved.get("constraint") == region
            if not is_same:
                raise ValueError(
                    f"group {i} was trained in {saved.get('constraint')}, and is now to be trained in {region}; "
                    "resume with the settings of the first run"
                )
            there = None if region is None else parse_constraint(saved["constraint"])
            state_dict["param_groups"][i] = {**saved, "constraint": there, "asked": own["asked"]}
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            if "step" in state:  # which torch leaves where it was saved
                state["step"] = state["step"].to(parameter.device)


def _factor(groups: list[dict[str, Any]], oracle: Any, weights: Any, radii: list[float]) -> torch.Tensor:
    """By what the learning rate is multiplied; 0-dim for a single group."""
    mode = groups[0]["rescale"]
    pairs = zip(groups, radii, strict=True)
    diameters = [radius * group["constraint"].diameter_of_unit_ball(group["params"]) for group, radius in pairs]
    if mode in ("none", "diameter"):
        return _numbers([1 if mode == "none" else 1 / diameter for diameter in diameters], weights)
    if mode == "fast_gradient":
        return oracle.norm() / (_numbers(diameters, weights) / 2)
    return oracle.norm() / oracle.squared_distance(weights).sqrt()


def _numbers(values: list[float], weights: Any) -> torch.Tensor:
    """On the device of the weights, in float64; 0-dim for a single one."""
    device = local(weights[0]).device
    if len(values) == 1:
        return torch.full((), values[0], dtype=torch.float64, device=device)
    return numbers_on(device, values)


def _check(group: dict[str, Any]) -> None:
    limits = {"lr": (0, float("inf")), "momentum": (0, 1), "dampening": (0, 1), "weight_decay": (0, float("inf"))}
    for name, (low, high) in limits.items():
        value = float(group[name])
        if not low <= value < high and not (name == "dampening" and value == 1):
            raise ValueError(f"{name} must be at least {low} and below {high}, got {value}")
    for name, allowed in (("rescale", RESCALES), ("free", FREE)):
        if group[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {group[name]!r}")
    if group["constraint"] is not None and group["rescale"] == "none" and float(group["lr"]) > 1:
        raise ValueError(f"with rescale='none', lr is a share of the way to a vertex, at most 1; got {group['lr']}")
    devices = {str(parameter.device) for parameter in group["params"]}
    if group["constraint"] is not None and len(devices) > 1:
        raise ValueError(
            f"the weights of one region lie on {', '.join(sorted(devices))}; scope='tensor' has one for each"
        )
    for parameter in group["params"]:
        if not parameter.is_floating_point():
            raise ValueError(f"a parameter has dtype {parameter.dtype}; SFW needs floating-point weights")


def _step_sgd(group: dict[str, Any], weights: list[torch.Tensor], state: Any) -> None:
    buffers = [state[p].get("momentum_buffer") for p in weights]
    sgd(
        weights,
        [p.grad for p in weights if p.grad is not None],
        buffers,
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=group["dampening"],
        nesterov=False,
        maximize=False,
        fused=len({b is None for b in buffers}) == 1  # of weights with their first gradient beside others
        and all(p.device.type in ("cpu", "cuda") and not is_sharded(p) for p in weights),
    )
    for parameter, buffer in zip(weights, buffers, strict=True):
        if group["momentum"]:
            state[parameter]["momentum_buffer"] = buffer


def _step_adamw(group: dict[str, Any], weights: list[torch.Tensor], state: Any) -> None:
    for parameter in weights:
        if not state[parameter]:
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            state[parameter] |= {"step": torch.zeros((), device=parameter.device), **zeros}
    adamw(
        weights,
        [p.grad for p in weights if p.grad is not None],
        [state[p]["exp_avg"] for p in weights],
        [state[p]["exp_avg_sq"] for p in weights],
        [],
        [state[p]["step"] for p in weights],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
        capturable=weights[0].device.type != "cpu",
    )
