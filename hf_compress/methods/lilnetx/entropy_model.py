"""How many bits latents take: a learned, monotone distribution function for every entry of a slice.

Factorized prior after Ballé et al. 2018 (arXiv 1802.01436, section 6.1), as LilNetX uses it for weights: with noise
from [-1/2, 1/2) in place of rounding, bits are differentiable. Their derivatives are made in closed form beside them,
while a few thousand latents are in the cache: a step costs little more than its sigmoids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .parametrization import Decoder, Layer, latent_layers

_CHUNK = 1 << 19  # latents whose graph is in memory at once
_CACHED = 1 << 15  # latents whose intermediate values are in the cache at once
_TILE = 512  # latents side by side in a row, as long as vector instructions want it
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

    def coefficients(self) -> torch.Tensor:
        """(11, channels), rows A, K, B, of f in sigmoids: w = x * A[0] + B[0], then w = w * A + sigmoid(w) * K + B.

        It is the same f, since tanh(t) = 2 sigmoid(2 t) - 1; a sigmoid takes a third of the time of a tanh.
        """
        slopes = functional.softplus(self.slopes)
        a = torch.cat([2 * slopes[:1], slopes[1:3], slopes[3:] / 2])
        k = 4 * torch.tanh(self.bends) * a[1:]
        b = torch.cat([2 * self.offsets[:3], self.offsets[3:]]) - functional.pad(k / 2, (0, 0, 1, 0))
        return torch.cat([a, k, b])

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """f of (slices, channels)."""
        a, k, b = self.coefficients().split((4, 3, 4))
        w = torch.addcmul(b[0], x, a[0])
        for i in range(3):
            w = torch.addcmul(torch.addcmul(b[i + 1], w, a[i + 1]), torch.sigmoid(w), k[i])
        return w

    def bits(self, x: torch.Tensor) -> torch.Tensor:
        """-log2(F(x + 1/2) - F(x - 1/2)) of (slices, channels), without cancellation and with gradients in the tails.

        The published form adds 1e-10 to the probability: whatever is less likely has no gradient there, and never
        comes back.
        """
        return _Bits.apply(x, self.coefficients())


def entropy_models(model: nn.Module, seed: int = 0) -> list[EntropyModel]:
    """The entropy model of every decoder of a model, on the device and in the type of its latents; made when needed.

    They are no part of `model.parameters()`: give them an optimizer or a group of their own.

    Args:
        model: that `reparametrize` has changed.
        seed: of their initial parameters.
    """
    return _entropy_models(latent_layers(model), seed)


def _entropy_models(layers: list[Layer], seed: int = 0) -> list[EntropyModel]:
    generator = torch.Generator().manual_seed(seed)
    decoders = dict.fromkeys(layer.decoded.decoder for layer in layers)
    for decoder in decoders:
        if not decoder.entropy:
            decoder.entropy.append(EntropyModel(decoder.row, generator))
        decoder.entropy[0].to(decoder.matrix)
    return [decoder.entropy[0] for decoder in decoders]


def latent_count(model: nn.Module) -> int:
    """How many latents a model has: the parameters of bits per parameter."""
    return count_of(latent_layers(model))


def count_of(layers: list[Layer]) -> int:
    """See `latent_count`."""
    return sum(layer.latent.numel() for layer in layers)


def rate_bits(
    model: nn.Module,
    *,
    generator: torch.Generator | None = None,
    max_latents: int | None = None,
    is_noisy: bool = True,
) -> torch.Tensor:
    """Bits that the latents of a model take under its entropy models, differentiable once in both.

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
    terms = list(rate_terms(latent_layers(model), generator, max_latents, is_noisy))
    if not terms:
        raise ValueError("the model has no latents; call reparametrize(model) first")
    return torch.stack(terms).sum()


def rate_terms(
    layers: list[Layer],
    generator: torch.Generator | None = None,
    max_latents: int | None = None,
    is_noisy: bool = True,
) -> Iterator[torch.Tensor]:
    """The summands of `rate_bits`, each with a graph of its own, so that memory stays bounded; see there."""
    _entropy_models(layers)
    share = 1.0 if max_latents is None else min(1.0, max_latents / max(count_of(layers), 1))
    for pieces in _batches(layers, share):
        x = _Noisy.apply(pieces, generator, is_noisy, *(piece.layer.latent for piece in pieces))
        entropy = pieces[0].decoder.entropy[0]
        yield entropy.bits(x if is_noisy else x.detach().round()).sum() * pieces[0].weight


@dataclass(frozen=True)
class _Piece:
    """So many slices of a layer: all of them, those from `start` on, or drawn ones that stand for `weight` each."""

    layer: Layer
    count: int
    start: int
    weight: float

    @property
    def decoder(self) -> Decoder:
        return self.layer.decoded.decoder

    def index(self, generator: torch.Generator | None) -> tuple[torch.Tensor, ...] | None:
        """Where they are in what `Decoded.cut` gives; None for all."""
        device = self.layer.latent.device
        if self.count == self.layer.slices:
            return None
        if self.weight == 1:
            found = torch.arange(self.start, self.start + self.count, device=device)
        else:  # with repetition: to draw without it would cost a pass over all of them
            found = torch.randint(self.layer.slices, (self.count,), generator=generator, device=device)
        if not self.layer.decoded.is_transposed:
            return (found,)
        columns = self.layer.latent.shape[0] // self.decoder.row
        return found // columns, found % columns


def _batches(layers: list[Layer], share: float) -> Iterator[list[_Piece]]:
    """Pieces that follow each other and have an entropy model and a weight in common, up to a chunk."""
    batch: list[_Piece] = []
    for layer in layers:
        slices, chunk = layer.slices, max(1, _CHUNK // layer.decoded.decoder.row)
        drawn = slices if share == 1 else max(1, round(share * slices))
        for start in range(0, drawn, chunk):
            piece = _Piece(layer, min(chunk, drawn - start), start, slices / drawn)
            is_alike = batch and (batch[0].decoder, batch[0].weight) == (piece.decoder, piece.weight)
            if batch and not (is_alike and sum(p.count for p in batch) + piece.count <= chunk):
                yield batch
                batch = []
            batch.append(piece)
    if batch:
        yield batch


class _Noisy(torch.autograd.Function):
    """Slices of latents in units of their gains, one below the other, with noise: (slices, row)."""

    @staticmethod
    def forward(
        ctx: Any, pieces: list[_Piece], generator: torch.Generator | None, is_noisy: bool, *latents: torch.Tensor
    ) -> torch.Tensor:
        counts = [piece.count for piece in pieces]
        x = latents[0].new_empty(sum(counts), pieces[0].decoder.row)
        ctx.pieces, ctx.counts, ctx.found = pieces, counts, []
        for piece, latent, part in zip(pieces, latents, x.split(counts), strict=True):
            index, cut = piece.index(generator), piece.layer.decoded.cut(latent)
            ctx.found.append(index)
            part.uniform_(-0.5, 0.5, generator=generator) if is_noisy else part.zero_()
            if index is not None:
                cut = cut[index] if len(index) > 1 else cut.index_select(0, *index)
            part.view(cut.shape).addcdiv_(cut, piece.layer.decoded.gain)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        found: list[torch.Tensor | None] = []
        for i, (piece, index, part) in enumerate(zip(ctx.pieces, ctx.found, gradient.split(ctx.counts), strict=True)):
            if not ctx.needs_input_grad[3 + i]:
                found.append(None)
                continue
            latent, gain = piece.layer.latent, piece.layer.decoded.gain
            whole = (gradient.new_empty if index is None else gradient.new_zeros)(latent.shape)
            cut = piece.layer.decoded.cut(whole)
            if index is None:
                torch.div(part.view(cut.shape), gain, out=cut)
            else:
                cut.index_put_(index, part / gain, accumulate=True)
            found.append(whole)
        return None, None, None, *found


class _Bits(torch.autograd.Function):
    """`EntropyModel.bits` of (slices, channels) and coefficients; gradients of their sum are there when it is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        bits, *gradients = _derived(x, coefficients, None)
        ctx.save_for_backward(x, coefficients, *gradients)
        return bits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        x, coefficients, *gradients = ctx.saved_tensors
        if any(upstream.stride()):  # not the same for all bits, as it is for a sum
            return tuple(_derived(x, coefficients, upstream)[1:])
        return tuple(gradient * upstream[0, 0] for gradient in gradients)


def _derived(x: torch.Tensor, coefficients: torch.Tensor, upstream: torch.Tensor | None) -> list[torch.Tensor]:
    """Bits, and the derivatives of their sum, weighed by `upstream`, for x and for the coefficients."""
    slices, row = x.shape
    x = x.contiguous()
    bits, slope, sums = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(coefficients)
    most = max(_CACHED * torch.get_num_threads() // row, 1) if x.device.type == "cpu" else slices
    scratch = x.new_empty(22 * min(max(most, _TILE // row), slices) * row)
    start, part = 0, None
    while start < slices:
        tile = min(max(_TILE // row, 1), slices - start)
        count = max(min(most, slices - start) // tile, 1) * tile
        if part is None or part.shape != (count // tile, tile * row):
            part = _Part(scratch[: 22 * count * row], coefficients, tile)
        weights = None if upstream is None else upstream[start : start + count].reshape(part.shape)
        own, nats, rise = (each[start : start + count].view(part.shape) for each in (x, bits, slope))
        sums += part.derive(own, nats, rise, weights).view(11, 2 * tile, row).sum(1)
        start += count
    return [each.mul_(1 / math.log(2)) for each in (bits, slope, sums)]


class _Part:
    """Slices that are side by side, `tile` in a row, with x - 1/2 left of x + 1/2: values in one piece of memory.

    In this order: 4 values w, the first of them x; 3 sigmoids of w; 4 derivatives for what follows from a value.
    """

    def __init__(self, scratch: torch.Tensor, coefficients: torch.Tensor, tile: int) -> None:
        lines = coefficients.repeat(1, 2 * tile)
        self.all = scratch.view(11, -1, lines.shape[1])
        self.a, self.k, self.b = lines[:4].unbind(), lines[4:7].unbind(), lines[7:].unbind()
        self.values, self.sigmoids, self.derivatives = self.all[:4], self.all[4:7], self.all[7:]
        self.shape = self.all.shape[1], self.all.shape[2] // 2
        self.v, self.s, self.d = self.values.unbind(), self.sigmoids.unbind(), self.derivatives.unbind()
        self.halves = [(each[:, : self.shape[1]], each[:, self.shape[1] :]) for each in self.all]

    def derive(self, x: torch.Tensor, nats: torch.Tensor, slope: torch.Tensor, upstream: Any) -> torch.Tensor:
        """Writes nats and their slope, and gives the sums of derivatives for all lines."""
        v, s, d, a, k = self.v, self.s, self.d, self.a, self.k
        torch.sub(x, 0.5, out=self.halves[0][0])
        torch.add(x, 0.5, out=self.halves[0][1])
        for i in range(4):  # the last derivative but one has room for f
            w = torch.addcmul(self.b[i], v[i], a[i], out=v[i + 1] if i < 3 else d[2])
            if i:
                w.addcmul_(s[i - 1], k[i - 1])
            if i < 3:
                torch.sigmoid(w, out=s[i])
        self._nats(nats, upstream)
        for i in (3, 2, 1):
            torch.mul(d[i], k[i - 1], out=d[i - 1])
            torch.ops.aten.sigmoid_backward.grad_input(d[i - 1], s[i - 1], grad_input=d[i - 1])
            d[i - 1].addcmul_(d[i], a[i])
        torch.add(*self.halves[7], out=slope).mul_(a[0][: x.shape[1]])
        self.values.mul_(self.derivatives)
        self.sigmoids.mul_(self.derivatives[1:])
        return self.all.sum(1)

    def _nats(self, nats: torch.Tensor, upstream: torch.Tensor | None) -> None:
        """With l and u for f at both ends: -log(sigmoid(u) - sigmoid(l)), as terms of one sign, and its derivatives.

        It is softplus(l) + softplus(-u) - log(1 - exp(l - u)), which neither cancels nor underflows in the tails. The
        derivative is sigmoid(l) + c for l and -sigmoid(-u) - c for u, with c = 1 / (exp(u - l) - 1).
        """
        (_, rest, ends, derivative), (low, high) = self.d, self.halves[9]
        share, c = self.d[0].view(2, *self.shape)
        high.neg_()
        torch.sigmoid(ends, out=derivative)
        torch.add(low, high, out=share).expm1_().neg_()
        torch.ops.aten.threshold.out(share, _SMALLEST, 1.0, out=c)  # what underflows has no gradient here
        c.reciprocal_().sub_(1)
        torch.sub(1, derivative, out=rest)
        torch.maximum(rest, derivative, out=rest)
        share.clamp_min_(_SMALLEST).mul_(self.halves[8][0]).mul_(self.halves[8][1]).log_()
        ends.clamp_min_(0)
        torch.add(low, high, out=nats).sub_(share)
        both = derivative.view(self.shape[0], 2, self.shape[1])
        both.add_(c[:, None])
        if upstream is not None:
            both.mul_(upstream[:, None])
        self.halves[10][1].neg_()


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
    layers = latent_layers(model)
    count, latents = count_of(layers), [layer.latent for layer in layers]
    needed = [latent.requires_grad for latent in latents]
    try:
        for latent in latents:
            latent.requires_grad_(False)
        for _ in range(steps):
            for term in rate_terms(layers, generator, max_latents):
                (term / count).backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        for latent, need in zip(latents, needed, strict=True):
            latent.requires_grad_(need)
