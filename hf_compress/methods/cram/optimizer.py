"""The compression-aware minimizer: two gradients a step, the second one at compressed weights.

With g1 the gradient at the weights w, C a pattern and M its mask on w + rho * g1, the wrapped optimizer steps with

    u = g1 + M * g2,    g2 = gradient at C(w + rho * g1)        (CrAM+, masked gradient)

`plus=False` leaves g1 out, `mask_gradient=False` leaves M out. The ascent is not normalised unless asked for. C is
drawn anew in every step from `patterns`. Source: Peste et al., CrAM: A Compression-Aware Minimizer, ICLR 2023,
arXiv:2207.14200.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ...distributed import is_distributed, is_sharded, local, reshard, total_norm
from ...patterns import Pattern, parse_patterns
from ...patterns.masking import add_masked_, masked
from ...structure import find_coupled_targets
from ...targets import Target, refuse_adapters, unwrap
from .excursion import ascended, come_back, leave
from .settings import check_options, check_rho

_HALF = (torch.bfloat16, torch.float16)
DEFAULT_PATTERNS = ("unstructured:0.5", "unstructured:0.7", "unstructured:0.9")


class CrAM(torch.optim.Optimizer):
    """A wrapper around any torch optimizer, whose parameter groups and state it shares.

    ```python
    opt = CrAM(torch.optim.SGD(model.parameters(), lr=0.1), model, patterns=["unstructured:0.9"], rho=0.1)
    loss(batch).backward()
    with opt.compressed():            # the weights are C(w + rho * grad) inside
        loss(batch).backward()
    opt.step()
    opt.zero_grad()
    ```

    Args:
        optimizer: the optimizer that takes the steps.
        model: the model that it trains; patterns apply to its `find_targets`.
        patterns: one is drawn for every step, the same on all ranks and after a resume: it depends on `seed` and the
            number of steps alone. Empty: no compression, the second gradient is taken at w + rho * g1.
        rho: step of the ascent, at least 0. With `rho=0` and no patterns there is nothing to be aware of, and the
            step is the wrapped optimizer's.
        plus: add the gradient at the weights themselves (CrAM+).
        mask_gradient: keep the second gradient only where weights were kept.
        include: globs on names, see `find_targets`.
        exclude: globs on names, see `find_targets`.
        seed: of the draws.
        plus_reduction: "sum" as published, or "mean" of the two gradients.
        normalize: ascend by rho * g1 / (|g1| + 1e-12), with the norm over all parameters. With `plus=False` and without
            patterns this is SAM (Foret et al., ICLR 2021, arXiv:2010.01412).
        every: take a second gradient in every so many steps, and plain steps between them.

    Attributes:
        num_steps: steps taken so far; the next draw depends on it.

    Raises:
        ValueError: for a wrong pattern, glob or rho, a pattern that leaves the model dense, or a model in which no
            target is trained.

    Source: Peste et al., ICLR 2023, arXiv:2207.14200. Defaults are those of the published ImageNet runs.
    """

    _step_supports_amp_scaling = False  # a GradScaler would hand the scale to this object, not to the wrapped one

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        patterns: Sequence[str | Pattern] = DEFAULT_PATTERNS,
        rho: float = 0.05,
        plus: bool = True,
        mask_gradient: bool = True,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        seed: int = 0,
        plus_reduction: str = "sum",
        normalize: bool = False,
        every: int = 1,
    ) -> None:
        self.optimizer = optimizer
        self.model = unwrap(model)
        self.patterns = tuple(parse_patterns(patterns))
        self.rho = check_rho(rho)
        check_options(plus_reduction, every)
        self.plus, self.plus_reduction, self.normalize, self.every = plus, plus_reduction, normalize, every
        self.mask_gradient, self.seed = mask_gradient, seed
        refuse_adapters(self.model, "CrAM")
        targets = find_coupled_targets(self.model, include, exclude)
        if self.patterns and not any(t.parameter.requires_grad for t in targets.values()):
            raise ValueError(
                f"no weight of {type(self.model).__name__} that a pattern may touch is trained "
                f"({len(targets)} are frozen); unfreeze some, or choose others with include and exclude"
            )
        for pattern in self.patterns:
            pattern.check(targets, "patterns")
        # Sharding replaces parameters after this, so that only names are kept.
        nothing = torch.empty(0)
        self._targets = {name: replace(t, parameter=nothing, bias=None) for name, t in targets.items()}
        self._biases = {name: f"{name.removesuffix('weight')}bias" for name, t in targets.items() if t.bias is not None}
        self.num_steps = 0
        self._is_compressed = False
        self._memory: list[torch.Tensor] = []

    @property
    def pattern(self) -> Pattern | None:
        """The pattern of the coming step, None without patterns."""
        if not self.patterns:
            return None
        return self.patterns[random.Random(f"{self.seed}/{self.num_steps}").randrange(len(self.patterns))]

    @property
    def needs_second_gradient(self) -> bool:
        """False in steps between those of `every`, and where nothing is perturbed or compressed."""
        return bool(self.rho or self.patterns) and self.num_steps % self.every == 0

    @contextmanager
    def compressed(self, grad_scale: float = 1.0) -> Iterator[Pattern | None]:
        """Weights are C(w + rho * grad) inside, and bit for bit w again outside, also after an exception.

        Enter it once a step, when the gradients of the whole accumulation window are there (and reduced over ranks),
        and run forward and backward of every batch of the window inside. When the block ends, `.grad` holds the
        combined gradient. Normalisation layers count no statistics inside. In a step without second gradient
        (`needs_second_gradient`) weights and gradients are afterwards what they were.

        Args:
            grad_scale: the factor in the gradients, under a GradScaler its scale.

        Yields:
            The pattern of this step.

        Raises:
            RuntimeError: without gradients, or inside another such block.
        """
        reshard(self.model)  # so that the model shows the parameters that the optimizer steps
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self._is_compressed:
            raise RuntimeError("compressed() was entered twice; leave the first block, then call step()")
        if not parameters:
            raise RuntimeError("compressed() needs gradients: call backward() on the loss of this step first")
        pattern = self.pattern if self.needs_second_gradient else None
        step = _Ascent(self, parameters, self._live_targets() if pattern else {})
        self._is_compressed = True
        try:
            step.enter(pattern, grad_scale)
            yield pattern
            step.combine()
        finally:
            step.restore()
            self._is_compressed = False

    def memory_like(self, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
        """Room for the parts of parameters on this rank, kept from step to step."""
        parts = [local(p).detach() for p in parameters]
        alike = [(c.shape, c.dtype, c.device) for c in self._memory] == [(p.shape, p.dtype, p.device) for p in parts]
        if not alike:
            self._memory = [torch.empty_like(p) for p in parts]
        return self._memory

    def _live_targets(self) -> dict[str, Target]:
        # Activation checkpointing wraps modules after the names were taken.
        live = {
            n.replace("_checkpoint_wrapped_module.", ""): p
            for n, p in self.model.named_parameters(remove_duplicate=False)
        }
        biases = {n: live.get(bias) for n, bias in self._biases.items()}
        return {n: replace(t, parameter=live[n], bias=biases.get(n)) for n, t in self._targets.items()}

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step of the wrapped optimizer with the gradients that are there."""
        if self._is_compressed:
            raise RuntimeError("step() inside compressed() would step from compressed weights; leave the block first")
        loss = self.optimizer.step(closure)
        self.num_steps += 1
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the wrapped optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, and the number of steps under "step"."""
        return {**self.optimizer.state_dict(), "step": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, or the state of a bare optimizer, from which draws start at step 0."""
        state_dict = dict(state_dict)
        self.num_steps = int(state_dict.pop("step", 0))
        self.optimizer.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        """Everything else, the registration of hooks for instance, is the wrapped optimizer's."""
        if name == "optimizer":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.defaults


class _Ascent:
    """One excursion to the compressed weights, and back with the combined gradient.

    Memory beyond the plain step: one copy of the weights, kept from step to step, and inside the block a byte for each
    weight of a target.
    """

    def __init__(self, cram: CrAM, parameters: list[torch.Tensor], targets: dict[str, Target]) -> None:
        self.cram, self.parameters, self.targets = cram, parameters, targets
        written = [p for t in targets.values() for p in (t.parameter, t.bias) if p is not None]
        self.touched = {id(p): p for p in [*parameters, *written]}
        self.saved: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.unchanged = [] if cram.needs_second_gradient else [_gradient(p).clone() for p in parameters]
        self.aside: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self.removed: dict[str, torch.Tensor] = {}
        self.first: dict[str, torch.Tensor] = {}
        self.norms = [m for m in cram.model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        # These would update their statistics also where they do not track them.
        self.momenta = [(m, m.momentum) for m in cram.model.modules() if isinstance(m, _InstanceNorm)]
        self.handles: list[Any] = []
        self.scratch: torch.Tensor | None = None

    @torch.no_grad()
    def enter(self, pattern: Pattern | None, grad_scale: float) -> None:
        """Write C(w + rho * grad), and prepare gradients for what the second backward adds to them."""
        for norm in self.norms:
            norm.track_running_stats = False
        for module, _ in self.momenta:
            module.momentum = 0.0
        if self.unchanged:
            return
        in_float = {n: t for n, t in self.targets.items() if t.parameter.dtype not in _HALF}
        # Half a step of rho * g is lost in 8 bits of mantissa, so that targets are perturbed and selected in float32.
        in_half = {n: t for n, t in self.targets.items() if t.parameter.dtype in _HALF}
        wide = {n: replace(t, parameter=t.parameter.float()) for n, t in in_half.items()}
        rho = self._coefficient(grad_scale)
        for name, target in in_half.items():
            if target.parameter.grad is not None:
                weight = local(wide[name].parameter)
                ascended(weight, _gradient(target.parameter).float(), rho, weight)
        touched = list(self.touched.values())
        leave(touched, self.cram.memory_like(touched), rho, self.saved)
        if not self.cram.plus:
            torch._foreach_zero_([_gradient(p) for p in self.parameters])
        if pattern is not None:
            try:
                masks = pattern.compress_({n: wide[n] if n in wide else in_float[n] for n in self.targets})
            except ValueError as error:
                if all(bool(_gradient(p).isfinite().all()) for p in self.parameters):
                    raise
                raise ValueError(f"{error} (at w + rho * gradient, and the gradient of this step is not)") from error
            for name, target in in_half.items():
                target.parameter.copy_(wide[name].parameter)
            if self.cram.mask_gradient:
                self._mask_gradients(masks)
        reshard(self.cram.model)
        torch.clear_autocast_cache()  # of copies in half precision, where one autocast stands around both passes

    @torch.no_grad()
    def combine(self) -> None:
        """What the block leaves in the gradients when it ends without an exception."""
        for parameter, total in self.aside:
            parameter.grad = total
        self.aside = []
        for name, removed in self.removed.items():
            gradient = _gradient(self.targets[name].parameter)
            gradient.masked_fill_(removed, 0)
            if name in self.first:
                gradient.add_(self.first[name])
        if self.cram.plus and self.cram.plus_reduction == "mean" and not self.unchanged:
            for parameter in (p for group in self.cram.param_groups for p in group["params"]):
                if parameter.grad is not None:  # also one whose first gradient is the second
                    _gradient(parameter).mul_(0.5)

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back; safe at any moment of the block."""
        for norm in self.norms:
            norm.track_running_stats = True
        for module, momentum in self.momenta:
            module.momentum = momentum
        for handle in self.handles:
            handle.remove()
        for parameter, gradient in self.aside:
            parameter.grad = gradient
        self.aside = []
        come_back(self.saved)
        reshard(self.cram.model)
        torch.clear_autocast_cache()
        for parameter, gradient in zip(self.parameters, self.unchanged, strict=False):
            _gradient(parameter).copy_(gradient)

    def _coefficient(self, grad_scale: float) -> float | torch.Tensor:
        """The factor of the (scaled) gradient in the ascent."""
        if not self.cram.normalize:
            return self.cram.rho / grad_scale
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return (self.cram.rho / (total_norm(gradients) + 1e-12)).float()

    def _mask_gradients(self, masks: dict[str, torch.Tensor]) -> None:
        for name, mask in masks.items():
            parameter = self.targets[name].parameter
            if is_sharded(parameter):
                self._recombine(name, mask)
            elif parameter.requires_grad and is_distributed():
                self.handles.append(parameter.register_hook(self._masking(mask)))
            elif parameter.requires_grad:
                self._merge(parameter, mask)

    def _recombine(self, name: str, mask: torch.Tensor) -> None:
        """Gradients of sharded parameters come by another way than hooks, so that they are masked afterwards."""
        parameter = self.targets[name].parameter
        if parameter.grad is not None:
            self.removed[name] = local(mask).logical_not()
            if self.cram.plus:
                self.first[name] = _gradient(parameter).clone()
                _gradient(parameter).zero_()

    def _masking(self, mask: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """A hook for DistributedDataParallel: it masks what is added to `.grad`, before that is reduced."""

        def mask_gradient(gradient: torch.Tensor) -> torch.Tensor:
            if self.scratch is None:  # one for all: what a hook returns is added before the next hook runs
                largest = max(t.parameter.numel() for t in self.targets.values())
                self.scratch = torch.empty(largest, dtype=gradient.dtype, device=gradient.device)
            return masked(gradient, mask, self.scratch)

        return mask_gradient

    def _merge(self, parameter: torch.Tensor, mask: torch.Tensor) -> None:
        """One process: the first gradient stands aside, and takes in each second one as soon as it is there."""
        self.aside.append((parameter, parameter.grad))
        parameter.grad = None
        position = len(self.aside) - 1

        def merge(_: torch.Tensor) -> None:
            second, total = parameter.grad, self.aside[position][1]
            assert second is not None
            if total is None:
                self.aside[position] = (parameter, masked(second, mask, second.clone().flatten()))
            else:
                add_masked_(total, second, mask)
            parameter.grad = None

        self.handles.append(parameter.register_post_accumulate_grad_hook(merge))


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return local(parameter.grad)
