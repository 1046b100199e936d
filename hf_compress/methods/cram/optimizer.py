"""The compression-aware minimizer: two gradients a step, the second one at compressed weights.

With g1 the gradient at the weights w, C a pattern and M its mask on w + rho * g1, the wrapped optimizer steps with

    u = g1 + M * g2,    g2 = gradient at C(w + rho * g1)        (CrAM+, masked gradient)

`plus=False` leaves g1 out, `mask_gradient=False` leaves M out. The ascent is not normalised. C is drawn anew in every
step from `patterns`. Peste et al., CrAM: A Compression-Aware Minimizer, ICLR 2023, arXiv:2207.14200.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...patterns import Pattern, parse_pattern
from ...targets import Target, find_targets, unwrap

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

    Raises:
        ValueError: for a wrong pattern, glob or rho, or a model in which no target is trained.

    Source: Peste et al., ICLR 2023, arXiv:2207.14200. Defaults are those of the published ImageNet runs.
    """

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
    ) -> None:
        self.optimizer = optimizer
        self.model = unwrap(model)
        self.patterns = tuple(parse_pattern(p) for p in ([patterns] if isinstance(patterns, str) else patterns))
        self.rho = check_rho(rho)
        self.plus, self.mask_gradient, self.seed = plus, mask_gradient, seed
        targets = find_targets(self.model, include, exclude)
        if self.patterns and not any(t.parameter.requires_grad for t in targets.values()):
            raise ValueError(
                f"no weight of {type(self.model).__name__} that a pattern may touch is trained "
                f"({len(targets)} are frozen); unfreeze some, or choose others with include and exclude"
            )
        # Sharding replaces parameters after this, so that only names are kept.
        self._targets = {name: (t.reduction_dim, t.kind) for name, t in targets.items()}
        self._num_steps = 0
        self._is_compressed = False

    @property
    def pattern(self) -> Pattern | None:
        """The pattern of the coming step, None without patterns."""
        if not self.patterns:
            return None
        return self.patterns[random.Random(f"{self.seed}/{self._num_steps}").randrange(len(self.patterns))]

    @property
    def is_identity(self) -> bool:
        """True if nothing is perturbed or compressed, so that a second gradient would be the first."""
        return self.rho == 0 and not self.patterns

    @contextmanager
    def compressed(self, grad_scale: float = 1.0) -> Iterator[Pattern | None]:
        """Weights are C(w + rho * grad) inside, and bit for bit w again outside, also after an exception.

        Enter it once a step, when the gradients of the whole accumulation window are there (and reduced over ranks),
        and run forward and backward of every batch of the window inside. When the block ends, `.grad` holds the
        combined gradient. Batch norms count no statistics inside.

        Args:
            grad_scale: the factor in the gradients, under a GradScaler its scale.

        Yields:
            The pattern of this step.

        Raises:
            RuntimeError: without gradients, or inside another such block.
        """
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self._is_compressed:
            raise RuntimeError("compressed() was entered twice; leave the first block, then call step()")
        if not parameters:
            raise RuntimeError("compressed() needs gradients: call backward() on the loss of this step first")
        targets = {n: Target(self.model.get_parameter(n), dim, kind) for n, (dim, kind) in self._targets.items()}
        pattern = self.pattern
        touched = {id(p): p for p in parameters}
        if pattern:
            touched |= {id(t.parameter): t.parameter for t in targets.values()}
        with torch.no_grad():
            saved = [(p, p.detach().clone()) for p in touched.values()]
            first = [p.grad.clone() for p in parameters] if self.is_identity else None
        handles: list[Any] = []
        norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self._is_compressed = True
        try:
            with torch.no_grad():
                self._perturb_(parameters, self.rho / grad_scale)
                handles = self._compress_(pattern, targets) if pattern else []
            for norm in norms:
                norm.track_running_stats = False
            yield pattern
        finally:
            for norm in norms:
                norm.track_running_stats = True
            for handle in handles:
                handle.remove()
            with torch.no_grad():
                for parameter, value in saved:
                    parameter.copy_(value)
                for parameter, gradient in zip(parameters, first or [], strict=False):
                    parameter.grad.copy_(gradient)
            self._is_compressed = False

    def _perturb_(self, parameters: list[torch.Tensor], alpha: float) -> None:
        """w + alpha * grad for every parameter; what stays in .grad is what the second gradient is added to."""
        for parameter in parameters:
            assert parameter.grad is not None
            if alpha:
                parameter.add_(parameter.grad, alpha=alpha)
            if not self.plus:
                parameter.grad.zero_()

    def _compress_(self, pattern: Pattern, targets: dict[str, Target]) -> list[Any]:
        """Write the pattern's zeros, and hook its mask to the gradients that are to come."""
        handles = []
        for name, mask in pattern.select(targets).items():
            parameter, removed = targets[name].parameter, mask.logical_not_()
            parameter.masked_fill_(removed, 0)
            if self.mask_gradient and parameter.requires_grad:
                handles.append(parameter.register_hook(_masking(removed)))
        return handles

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step of the wrapped optimizer with the gradients that are there."""
        if self._is_compressed:
            raise RuntimeError("step() inside compressed() would step from compressed weights; leave the block first")
        loss = self.optimizer.step(closure)
        self._num_steps += 1
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the wrapped optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, and the number of steps under "step"."""
        return {**self.optimizer.state_dict(), "step": self._num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, or the state of a bare optimizer, from which draws start at step 0."""
        state_dict = dict(state_dict)
        self._num_steps = int(state_dict.pop("step", 0))
        self.optimizer.load_state_dict(state_dict)

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


def check_rho(rho: float) -> float:
    """`rho` if it is finite and not negative; ValueError otherwise."""
    if not 0 <= rho < float("inf"):
        raise ValueError(f"rho must be a finite number of at least 0, got {rho!r}")
    return rho


def _masking(removed: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda gradient: gradient.masked_fill(removed, 0)
