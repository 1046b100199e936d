"""Bits and priors at work in a Trainer: a callback, so that clipping concerns the gradients of the task alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .config import LilNetXConfig
from .entropy_model import count_of, entropy_models, fit_entropy_models, rate_terms
from .parametrization import Layer, latent_layers
from .priors import layer_slice_prior

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of Adam


class Regularization(TrainerCallback):
    """Adds the gradients of bits and priors in every optimizer step, after clipping, and trains the entropy models.

    Noise and drawn slices come from the seed and the step: alike on all ranks, and on resume.

    Args:
        model: that `reparametrize` has changed.
        args: of the run.
    """

    def __init__(self, model: nn.Module, args: LilNetXConfig) -> None:
        self.model, self.args = model, args
        self._is_ready = self._is_fitted = False
        self._numbers: dict[str, torch.Tensor] = {}
        self._epoch_steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make entropy models and their optimizer on the device of the model, unless `load` has brought them."""
        self._epoch_steps = math.ceil(state.max_steps / max(state.num_train_epochs, 1))
        if not self._is_ready:
            self._make_optimizer()
        if not self._is_fitted:
            fit_entropy_models(self.model, self.args.entropy_fit_steps, seed=self.args.seed)
        self._is_fitted = True

    def _make_optimizer(self) -> None:
        parameters = [p for each in entropy_models(self.model, self.args.seed) for p in each.parameters()]
        self.optimizer = torch.optim.Adam(parameters, self.args.entropy_learning_rate)
        device, start = parameters[0].device, self.args.rate_weight or 0.0
        names = ("rate_weight", "task_norm", "rate_norm", "bits")
        self._numbers = {name: torch.tensor(start if name == "rate_weight" else 0.0, device=device) for name in names}
        self._is_ready = True

    @property
    def rate_weight(self) -> torch.Tensor:
        """A scalar on the device of the model."""
        return self._numbers["rate_weight"]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer has unscaled and clipped the gradients, which are alike on all ranks."""
        every = latent_layers(self.model)
        layers = [layer for layer in every if layer.latent.requires_grad]
        task = [layer.latent.grad for layer in layers]
        count = count_of(every)
        for layer in layers:
            layer.latent.grad = None
        self._add_rate_gradients(every, count, state.global_step)
        rate = [layer.latent.grad for layer in layers]
        self._weigh(state.global_step, _norm(task), _norm(rate))
        for layer, own, added in zip(layers, task, rate, strict=True):
            weight = self.rate_weight.to(layer.latent.dtype)
            if own is None:
                own = torch.zeros_like(layer.latent)
            layer.latent.grad = own if added is None else own.addcmul_(added, weight)
            self._add_priors(layer, count)
        self.optimizer.step()

    def _add_rate_gradients(self, layers: list[Layer], count: int, step: int) -> None:
        """Of the bits per parameter, for latents and entropy models."""
        device = self.rate_weight.device
        generator = torch.Generator(device).manual_seed((self.args.seed << 32) + step)
        self.optimizer.zero_grad()
        bits = torch.zeros((), device=device)
        for term in rate_terms(layers, generator, self.args.rate_latents):
            (term / count).backward()
            bits += term.detach() / count
        self._numbers["bits"] = bits

    def _weigh(self, step: int, task: torch.Tensor, rate: torch.Tensor) -> None:
        """Averages of both norms over the first epoch, and the weight that follows from them, where none is given.

        A step that overflows in half precision counts for neither, so that their ratio is that of the others.
        """
        seen, is_counted = min(step, max(self._epoch_steps, 1)), task.isfinite() & rate.isfinite()
        for name, value in (("task_norm", task), ("rate_norm", rate)):
            ahead = torch.where(is_counted, value - self._numbers[name], 0)
            self._numbers[name] = self._numbers[name] + ahead / (seen + 1)
        if self.args.rate_weight is None and step <= self._epoch_steps:
            ratio = self._numbers["task_norm"] / self._numbers["rate_norm"].clamp_min(1e-30)
            is_due = (self.rate_weight == 0) | (step == self._epoch_steps)
            self._numbers["rate_weight"] = torch.where(is_due, self.args.rate_ratio * ratio, self.rate_weight)

    def _add_priors(self, layer: Layer, count: int) -> None:
        latent: Any = layer.latent
        if self.args.l2_weight:
            latent.grad.addcmul_(latent.detach(), 2 * self.args.l2_weight / count / layer.decoded.gain.square())
        if self.args.slice_weight and layer.decoded.block:
            (layer_slice_prior(layer, self.args.slice_order) * (self.args.slice_weight / count)).backward()

    def logs(self) -> dict[str, float]:
        """Bits per parameter as the entropy models estimate them, and how long their gradient is beside the task's."""
        if not self._is_ready:
            return {}
        n = {name: value.item() for name, value in self._numbers.items()}
        ratio = n["rate_weight"] * n["rate_norm"] / n["task_norm"] if n["task_norm"] else 0.0
        return {"bits_per_parameter": n["bits"], "rate_weight": n["rate_weight"], "rate_ratio": ratio}

    def named_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What a checkpoint must hold beside latents and decoders."""
        if not self._is_ready:
            self._make_optimizer()
        yield from ((f"rate.{name}", value) for name, value in self._numbers.items())
        for i, each in enumerate(entropy_models(self.model)):
            for name, parameter in each.named_parameters():
                yield f"entropy.{i}.{name}", parameter
                moments = self.optimizer.state[parameter]
                for moment in _MOMENTS:
                    value = moments.get(moment, torch.zeros(()) if moment == "step" else torch.zeros_like(parameter))
                    yield f"entropy.{i}.{name}.{moment}", value

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `named_state` gave."""
        if not self._is_ready:
            self._make_optimizer()
        for parameter in self.optimizer.param_groups[0]["params"]:
            zeros = {m: torch.zeros_like(parameter) for m in _MOMENTS[:2]}
            self.optimizer.state[parameter] = {**zeros, "step": torch.zeros(())}
        for name, value in list(self.named_state()):
            value.copy_(state[name])
        self._is_fitted = True


def _norm(gradients: list[Any]) -> torch.Tensor:
    found = [g for g in gradients if g is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(found))) if found else torch.zeros(())
