"""Weights that are decoded from whole numbers: W = gain * S applied to round(latent / gain), slice by slice.

Girish et al., LilNetX: Lightweight Networks with EXtreme Model Compression and Structured Sparsification, ICLR 2023
(arXiv 2204.02965), after Oktay et al. 2020. A weight is cut into slices: the kernel of one input and output channel of
a convolution, or some consecutive inputs of a Linear layer. One small matrix, the decoder, turns the whole numbers of
every slice into weights; it has no bias, so that a slice of zeros stays one. The gradient of rounding is the identity.
Where pretrained weights are kept and a decoder would outnumber them, as for a small net's stem, slices have one entry.

A latent is kept in units of the weight, which is what the gain is for: learning rates mean for it what they mean for
the weight itself. With a gain of 1 this is the published form.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from ...codec import Latents, weights_of
from ...distributed import is_sharded
from ...targets import Target, find_targets, refuse_adapters, unwrap

INITS = ("pretrained", "uniform", "normal")
SHARING = ("kind", "layer")
_MAX_KERNEL = 49  # the decoder of a larger one would be larger than what it saves
_SMALL_KERNEL = 9  # whose decoder is a third of a kilobyte
_LARGEST = 32767  # that a file can hold


class Decoder(nn.Module):
    """The matrix that all layers of one group share.

    Args:
        name: of the group, such as "conv3x3".
        row: entries of a slice.

    Attributes:
        matrix: (row, row); a slice of whole numbers is multiplied from the left.
        entropy: the model of probabilities of this group, once there is one; no submodule, because its parameters
            belong to an optimizer of their own.
    """

    def __init__(self, name: str, row: int, **options: Any) -> None:
        super().__init__()
        self.name, self.row = name, row
        self.matrix = nn.Parameter(torch.eye(row, **options))
        self.entropy: list[Any] = []


class Decoded(nn.Module):
    """The parametrization of one weight; its `original` is the latent, in the shape and the units of the weight.

    Args:
        decoder: of its group.
        gain: how far whole numbers lie apart, before the decoder.
        is_transposed: whether the inputs of the layer come first (Hugging Face Conv1D).
        block: the slices of so many outputs are one to the prior on slices; 0 where it takes none.
    """

    gain: torch.Tensor

    def __init__(self, decoder: Decoder, gain: torch.Tensor, is_transposed: bool, block: int) -> None:
        super().__init__()
        self.decoder, self.is_transposed, self.block = decoder, is_transposed, block
        self.register_buffer("gain", gain)
        self._cached: tuple[Any, torch.Tensor] | None = None

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """The weight, in the type of the latent; made once in eval mode, as long as nothing changes."""
        if self.training or torch.is_grad_enabled():
            return self.decode(latent)
        parts = (latent, self.decoder.matrix, self.gain)
        state = [(part.data_ptr(), part._version) for part in parts]
        if self._cached is None or self._cached[0] != state:
            self._cached = state, self.decode(latent)
        return self._cached[1]

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """See `forward`; mixed precision never rounds a latent."""
        weight: torch.Tensor = _Decode.apply(latent, self.decoder.matrix, self)
        return weight

    def scaled(self, latent: torch.Tensor) -> torch.Tensor:
        """The latent in units of the gain, before it is rounded: (slices, row)."""
        return self.cut(latent).reshape(-1, self.decoder.row) / self.gain

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor shaped as the weight as (slices, row); if inputs come first as a view, (outputs, slices, row)."""
        row = self.decoder.row
        return tensor.T.unflatten(1, (-1, row)) if self.is_transposed else tensor.reshape(-1, row)

    def joined(self, rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Slices as a tensor of the shape of the weight."""
        return rows.reshape(shape[::-1]).T if self.is_transposed else rows.reshape(shape)

    def train(self, mode: bool = True) -> Decoded:
        """As of every module; a weight that was decoded for evaluation is forgotten."""
        self._cached = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}


class _Decode(torch.autograd.Function):
    """gain * S applied to round(latent / gain), for which the gain is in the matrix; the gradient needs none."""

    @staticmethod
    def forward(ctx: Any, latent: torch.Tensor, matrix: torch.Tensor, decoded: Decoded) -> torch.Tensor:
        whole = decoded.scaled(latent).round_()
        ctx.save_for_backward(whole, matrix, decoded.gain)
        ctx.decoded = decoded
        return decoded.joined(_times(whole, matrix * decoded.gain), latent.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        whole, matrix, gain = ctx.saved_tensors
        rows = ctx.decoded.cut(upstream).reshape(whole.shape)
        latent = (
            ctx.decoded.joined(_times(rows, matrix.T.contiguous()), upstream.shape) if ctx.needs_input_grad[0] else None
        )
        return latent, _times(whole.T, rows) * gain if ctx.needs_input_grad[1] else None, None


def _times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.autocast(a.device.type, enabled=False):
        return a * b if b.numel() == 1 else a @ b


@dataclass(frozen=True)
class Layer:
    """A layer whose weight is decoded.

    Attributes:
        path: of the module in its model.
        module: itself; its `weight` is the decoded one.
        decoded: the parametrization.
        latent: its parameter.
    """

    path: str
    module: Any
    decoded: Decoded
    latent: nn.Parameter

    @property
    def scaled(self) -> torch.Tensor:
        """See `Decoded.scaled`."""
        return self.decoded.scaled(self.latent)

    @property
    def slices(self) -> int:
        """How many it has."""
        return self.latent.numel() // self.decoded.decoder.row


def latent_layers(model: nn.Module) -> list[Layer]:
    """The layers of a model that `reparametrize` has changed, in its order; empty for any other model."""
    found = []
    for path, module in unwrap(model).named_modules():
        chain: Any = getattr(module, "parametrizations", {})
        if "weight" in chain and isinstance(decoded := chain["weight"][0], Decoded):
            found.append(Layer(path, module, decoded, chain["weight"].original))
    return found


def decoders_of(model: nn.Module) -> list[Decoder]:
    """The decoders of a model, in the order in which its layers use them first."""
    return list(dict.fromkeys(layer.decoded.decoder for layer in latent_layers(model)))


@torch.no_grad()
def reparametrize(
    model: nn.Module,
    *,
    init: str = "pretrained",
    steps_per_std: float = 3.0,
    boundary: float = 3.0,
    linear_slice: int = 8,
    decoders: str = "kind",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Layer]:
    """Replace the weights of a model, in place, by latents and decoders; `bake` makes it a plain model again.

    Args:
        model: any module with weights in float32 or float64; wrappers are looked through.
        init: "pretrained" keeps the weights, as near as whole numbers come: the decoder is the identity. "uniform" and
            "normal" draw latents and decoders as published for nets on CIFAR and on ImageNet (spread of the decoders
            from the widest layer; where a slice has one entry its decoder is not drawn, but has the spread).
        steps_per_std: of "pretrained": a standard deviation of a weight is so many steps of its whole numbers.
        boundary: of "uniform", up to which the latents of the widest layer go, and of "normal", their deviation.
        linear_slice: so many consecutive inputs of a Linear layer are a slice, where they divide its inputs; the prior
            on slices takes the slices of as many outputs as one. 1 is published.
        decoders: "kind" for one decoder for all layers of a kind, such as "conv3x3", or "layer".
        include: globs on names, see `find_targets`.
        exclude: globs on names, see `find_targets`. Weights that are frozen or shared by layers stay what they are.
        seed: of what is drawn.

    Returns:
        The layers that were changed.

    Raises:
        ValueError: for a wrong option, a model without targets, one that has latents already, or weights that are in
            half precision, not finite, dealt to several processes, or on several devices with shared decoders.
    """
    _check_options(init, decoders, steps_per_std, boundary, linear_slice)
    model = unwrap(model)
    refuse_adapters(model, "LilNetX")
    if latent_layers(model):
        raise ValueError("this model has latents already; bake it first")
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found = find_targets(model, include, exclude)
    targets = {n: t for n, t in found.items() if uses[id(t.parameter)] == 1 and t.parameter.requires_grad}
    _check(targets, decoders)
    made: dict[str, Decoder] = {}
    for name, (group, row) in _groups_of(targets, linear_slice, decoders, init).items():
        path, target, weight = name.rpartition(".")[0], targets[name], targets[name].parameter
        if group not in made:
            made[group] = Decoder(group, row, device=weight.device, dtype=weight.dtype)
        std = weight.std(correction=0)
        gain = torch.where(std > 0, std / steps_per_std, 1.0) if init == "pretrained" else torch.ones_like(std)
        is_transposed = target.reduction_dim == 0 and weight.ndim > 1
        decoded = Decoded(made[group], gain, is_transposed, _block(target, row))
        module = model.get_submodule(path)
        if parametrize.is_parametrized(module):
            raise ValueError(f"{path} has parametrizations already; remove them, or leave it out by exclude")
        decoded.train(module.training)
        parametrize.register_parametrization(module, "weight", decoded)
    layers = latent_layers(model)
    if init != "pretrained":
        _draw(layers, init, boundary, torch.Generator().manual_seed(seed))
    return layers


def _check_options(init: str, decoders: str, steps_per_std: float, boundary: float, linear_slice: int) -> None:
    for name, value, allowed in (("init", init, INITS), ("decoders", decoders, SHARING)):
        if value not in allowed:
            raise ValueError(f"{name} is one of {', '.join(allowed)}, got {value!r}")
    for name, number in (("steps_per_std", steps_per_std), ("boundary", boundary)):
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"{name} must be a number above 0, got {number!r}")
    if type(linear_slice) is not int or not 1 <= linear_slice <= 64:
        raise ValueError(f"linear_slice must be a whole number from 1 to 64, got {linear_slice!r}")


def _check(targets: dict[str, Target], decoders: str) -> None:
    if not targets:
        raise ValueError(
            "the model has no weights to code (Linear, ConvNd, Conv1D); name some by globs, as in include=['*head*']"
        )
    devices = sorted({str(target.parameter.device) for target in targets.values()})
    if len(devices) > 1 and decoders == "kind":
        raise ValueError(f"layers on {', '.join(devices)} cannot share a decoder; decoders='layer' gives each its own")
    for name, target in targets.items():
        weight = target.parameter
        if weight.dtype.itemsize < 4:
            how = "load the model with dtype=torch.float32, and use mixed precision"
            raise ValueError(f"{name} is {weight.dtype}, in which latents would not move; {how}")
        if is_sharded(weight):
            raise ValueError(f"{name} is dealt to several processes, which cuts its slices; train with DDP")
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name} has a NaN or infinite entry; load weights that are finite")


def _groups_of(targets: dict[str, Target], linear_slice: int, decoders: str, init: str) -> dict[str, tuple[str, int]]:
    """The group of each weight, and how many entries its slices have: 1 where a decoder would outnumber its weights."""
    found, weights = {}, Counter[str]()
    for name, target in targets.items():
        row, kind = _slice_of(target, linear_slice)
        group = kind if decoders == "kind" else name.rpartition(".")[0]
        found[name] = group, row
        weights[group] += target.parameter.numel()
    if init != "pretrained":  # as published
        return found
    return {n: (g, 1 if row > _SMALL_KERNEL and row**2 >= weights[g] else row) for n, (g, row) in found.items()}


def _slice_of(target: Target, linear_slice: int) -> tuple[int, str]:
    """How many entries a slice has, and the kind of layer."""
    shape = target.parameter.shape
    if target.kind == "conv":
        kernel = math.prod(shape[2:])
        kind = "depthwise" if _is_depthwise(target) else "conv"
        return kernel if kernel <= _MAX_KERNEL else 1, kind + "x".join(map(str, shape[2:]))
    inputs = shape[target.reduction_dim]
    return (1, "linear") if linear_slice == 1 or inputs % linear_slice else (linear_slice, f"linear{linear_slice}")


def _block(target: Target, row: int) -> int:
    if row == 1 or _is_depthwise(target):  # to lose a slice is to lose a channel there
        return 0
    return row if target.kind != "conv" and target.parameter.shape[target.output_dim] % row == 0 else 1


def _is_depthwise(target: Target) -> bool:
    return target.conv_groups > 1 and target.parameter.shape[1] == 1


def _draw(layers: list[Layer], init: str, boundary: float, generator: torch.Generator) -> None:
    """The published initialisations: spreads of latents and decoders whose product is that of He et al. 2015."""
    kernels = [layer.latent.shape[2:] for layer in layers]
    outputs = [layer.latent.shape[1 if layer.decoded.is_transposed else 0] for layer in layers]
    fans = [count * math.prod(kernel) for count, kernel in zip(outputs, kernels, strict=True)]
    if init == "uniform":  # of the widest layer, whose kernel does not count here
        variance = 24 / max(outputs) / ((2 * boundary + 1) ** 2 - 1)
    else:
        variance = 24 / max(fans) / (2 * boundary) ** 2
    for decoder in dict.fromkeys(layer.decoded.decoder for layer in layers):
        side = math.sqrt(decoder.row) if init == "normal" else 1.0
        std = math.sqrt(variance / side)
        if decoder.name.startswith("linear") or decoder.row == 1:
            decoder.matrix.copy_(torch.eye(decoder.row) * math.sqrt(variance))
        else:
            decoder.matrix.copy_(torch.randn(decoder.row, decoder.row, generator=generator) * std)
    for layer, fan in zip(layers, fans, strict=True):
        if init == "uniform":
            bound = (math.sqrt(24 / (variance * fan) + 1) - 1) / 2
            values = (2 * torch.rand(layer.latent.shape, generator=generator) - 1) * bound
        else:
            values = torch.randn(layer.latent.shape, generator=generator) * boundary
        layer.latent.copy_(values)


@torch.no_grad()
def integers(model: nn.Module) -> tuple[dict[str, Latents], list[np.ndarray]]:
    """The whole numbers of a model as the codec takes them, and the decoders that their `group` counts.

    Returns:
        Name of a weight to its latents, and (row, row) matrices in float32.

    Raises:
        ValueError: for a latent that is not finite or that no 16 bits hold.
    """
    decoders = decoders_of(model)
    found = {}
    for layer in latent_layers(model):
        ordered = layer.latent.T if layer.decoded.is_transposed else layer.latent
        values = (ordered / layer.decoded.gain).round()
        peak = float(values.abs().max()) if values.numel() else 0.0
        if not peak <= _LARGEST:
            raise ValueError(
                f"{layer.path}: the largest latent is {peak}, files hold up to {_LARGEST}; a smaller steps_per_std or "
                "learning rate keeps them small"
            )
        whole = values.to(torch.int8 if peak <= 127 else torch.int16).cpu().numpy()
        row, group = layer.decoded.decoder.row, decoders.index(layer.decoded.decoder)
        gain, is_transposed = float(layer.decoded.gain.float()), layer.decoded.is_transposed
        name = f"{layer.path}.weight" if layer.path else "weight"
        found[name] = Latents(whole, row, group, gain, is_transposed=is_transposed)
    return found, [decoder.matrix.detach().float().cpu().numpy() for decoder in decoders]


@torch.no_grad()
def bake(model: nn.Module) -> tuple[dict[str, Latents], list[np.ndarray]]:
    """Make a model with latents a plain one, in place: its weights are those that a file of its latents gives.

    These are decoded in float64 in a fixed order, the same on every machine; they differ from those of the training by
    rounding alone.

    Returns:
        See `integers`: what a file needs.

    Raises:
        ValueError: as `integers`; the model is unchanged then.
    """
    found, matrices = integers(model)
    for layer in latent_layers(model):
        name = f"{layer.path}.weight" if layer.path else "weight"
        weight = torch.from_numpy(weights_of(found[name], matrices[found[name].group])).to(layer.latent)
        _unparametrize(layer.module, nn.Parameter(weight, layer.latent.requires_grad))
    return found, matrices


def _unparametrize(module: Any, weight: nn.Parameter) -> None:
    """As torch does it, but for this module alone: copies of it are of the same class, which torch would change."""
    del module.parametrizations
    module.__class__ = type(module).__mro__[1]
    others = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({"weight": weight, **others})  # in the order of a plain layer


def named_state(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What `reparametrize` has added, under names that no other parameter has; changing these changes the model."""
    for layer in latent_layers(model):
        yield f"latent.{layer.path}", layer.latent
        yield f"gain.{layer.path}", layer.decoded.gain
    for decoder in decoders_of(model):
        yield f"decoder.{decoder.name}", decoder.matrix
