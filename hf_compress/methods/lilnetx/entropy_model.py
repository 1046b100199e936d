"""How many bits latents take: a learned, monotone distribution function for every entry of a slice.

Factorized prior after Ballé et al. 2018 (arXiv 1802.01436, section 6.1), as LilNetX uses it for weights: with noise
from [-1/2, 1/2) in place of rounding, bits are differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

from .parametrization import Layer, decoders_of, latent_layers

_CHUNK = 1 << 17  # latents whose graph is in memory at once
_SMALLEST = 1e-30  # so that the log of a probability that underflows is finite


class EntropyModel(nn.Module):
    """A distribution function for each entry of a slice, with 11 parameters: F(x) = sigmoid(f(x)).

    f is three times t = x * softplus(h) + b, x = t + tanh(t) * tanh(a), and once more t; it rises everywhere.

    Args:
        channels: entries of a slice.
        generator: of the initial parameters, whose deviation is 0.01 as published.
    """

    def __init__(self, channels: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        counts = (4, 4, 3)
        values = [nn.Parameter(0.01 * torch.randn(count, channels, generator=generator)) for count in counts]
        self.slopes, self.offsets, self.bends = values

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """f of (slices, channels)."""
        slopes, bends = functional.softplus(self.slopes), torch.tanh(self.bends)
        for i in range(3):
            x = torch.addcmul(self.offsets[i], x, slopes[i])
            x = torch.addcmul(x, torch.tanh(x), bends[i])
        return torch.addcmul(self.offsets[3], x, slopes[3])

    def bits(self, x: torch.Tensor) -> torch.Tensor:
        """-log2(F(x + 1/2) - F(x - 1/2)) of (slices, channels), without cancellation and with gradients in the tails.

        The published form adds 1e-10 to the probability: whatever is less likely has no gradient there, and never
        comes back.
        """
        lower, upper = self.logits(x - 0.5), self.logits(x + 0.5)
        is_right = (lower + upper > 0).detach()  # the sigmoid is exact where it is small
        low = functional.logsigmoid(torch.where(is_right, -upper, lower))
        high = functional.logsigmoid(torch.where(is_right, -lower, upper))
        share = -torch.expm1(low - high)  # of the probability below the upper end that lies in the interval
        return -(high + torch.log(share.clamp_min(_SMALLEST))) / math.log(2)


def entropy_models(model: nn.Module, seed: int = 0) -> list[EntropyModel]:
    """The entropy model of every decoder of a model, on the device and in the type of its latents; made when needed.

    They are no part of `model.parameters()`: give them an optimizer or a group of their own.

    Args:
        model: that `reparametrize` has changed.
        seed: of their initial parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    for decoder in decoders_of(model):
        if not decoder.entropy:
            decoder.entropy.append(EntropyModel(decoder.row, generator))
        decoder.entropy[0].to(decoder.matrix)
    return [decoder.entropy[0] for decoder in decoders_of(model)]


def latent_count(model: nn.Module) -> int:
    """How many latents a model has: the parameters of bits per parameter."""
    return sum(layer.latent.numel() for layer in latent_layers(model))


def rate_bits(
    model: nn.Module,
    *,
    generator: torch.Generator | None = None,
    max_latents: int | None = None,
    is_noisy: bool = True,
) -> torch.Tensor:
    """Bits that the latents of a model take under its entropy models, differentiable in both.

    Args:
        model: that `reparametrize` has changed; wrappers are looked through.
        generator: of noise and chosen slices, on the device of the model.
        max_latents: about so many latents, in slices drawn at random, stand for all; the expectation is the same.
        is_noisy: False rounds instead, and the gradient does not reach the latents.

    Returns:
        A scalar; divide it by `latent_count` for bits per parameter.

    Raises:
        ValueError: for a model without latents.
    """
    terms = list(rate_terms(model, generator, max_latents, is_noisy))
    if not terms:
        raise ValueError("the model has no latents; call reparametrize(model) first")
    return torch.stack(terms).sum()


def rate_terms(
    model: nn.Module,
    generator: torch.Generator | None = None,
    max_latents: int | None = None,
    is_noisy: bool = True,
) -> Iterator[torch.Tensor]:
    """The summands of `rate_bits`, each with a graph of its own, so that memory stays bounded; see there."""
    entropy_models(model)
    layers, total = latent_layers(model), latent_count(model)
    share = 1.0 if max_latents is None else min(1.0, max_latents / max(total, 1))
    for layer in layers:
        yield from _layer_terms(layer, generator, share, is_noisy)


def _layer_terms(
    layer: Layer, generator: torch.Generator | None, share: float, is_noisy: bool
) -> Iterator[torch.Tensor]:
    decoded = layer.decoded
    row, entropy = decoded.decoder.row, decoded.decoder.entropy[0]
    ordered = layer.latent.T if decoded.is_transposed else layer.latent
    slices, chunk = layer.slices, max(1, _CHUNK // row)
    drawn = slices if share == 1 else max(1, round(share * slices))
    device = layer.latent.device
    for start in range(0, drawn, chunk):
        count = min(chunk, drawn - start)
        rows = ordered.reshape(-1, row)
        if drawn == slices:
            rows = rows[start : start + count]
        else:  # with repetition: to draw without it would cost a pass over all of them
            rows = rows[torch.randint(slices, (count,), generator=generator, device=device)]
        x = rows / decoded.gain
        if is_noisy:
            x = x + torch.rand(x.shape, generator=generator, device=device, dtype=x.dtype) - 0.5
        else:
            x = x.detach().round()
        yield entropy.bits(x).sum() * (slices / drawn)


def fit_entropy_models(
    model: nn.Module, steps: int = 200, lr: float = 0.05, max_latents: int = 1 << 16, seed: int = 0
) -> None:
    """Bring the entropy models near the latents as they are now, which takes a training with small steps very long.

    Args:
        model: that `reparametrize` has changed; latents stay what they are.
        steps: of Adam.
        lr: its learning rate.
        max_latents: drawn in each step.
        seed: of the draws.
    """
    parameters = [p for each in entropy_models(model) for p in each.parameters()]
    if not parameters or not steps:
        return
    optimizer = torch.optim.Adam(parameters, lr)
    device = parameters[0].device
    generator = torch.Generator(device).manual_seed(seed)
    count, latents = latent_count(model), [layer.latent for layer in latent_layers(model)]
    needed = [latent.requires_grad for latent in latents]
    try:
        for latent in latents:
            latent.requires_grad_(False)
        for _ in range(steps):
            for term in rate_terms(model, generator, max_latents):
                (term / count).backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        for latent, need in zip(latents, needed, strict=True):
            latent.requires_grad_(need)
