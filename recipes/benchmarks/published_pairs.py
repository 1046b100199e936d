"""Two nets, ours and one for the published code, for every method of published_parity.py, and how each is trained."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import published
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

import hf_compress
from hf_compress.methods import lilnetx
from hf_compress.methods.cram import CrAM
from hf_compress.methods.sfw import create_sfw
from hf_compress.methods.tpp import GrowingSchedule, TrainabilityPenalty, select
from hf_compress.structure import remove

Settings = dict[str, Any]
State = dict[str, torch.Tensor]
Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
SGD: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4}
LILNETX = {"rate": 0.1, "l2": 1e-6, "slices": 1e-5, "lr": 0.01, "entropy_lr": 1e-3}
HEADS, TAILS = 0, 1  # seeds whose first uniform number is above a half, and below


@dataclass
class Pair:
    """Two nets that are trained in turns.

    Attributes:
        ours: our net.
        theirs: the published one.
        step: a step of ours; returns the loss.
        consume: the published loop over batches.
        losses: of the published loop, as it goes on.
        states: comparable parameters of both, by the same names.
        extra: further results, computed at the end.
    """

    ours: Any
    theirs: Any
    step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    consume: Callable[[Batches], Any]
    losses: list[float]
    states: Callable[[], tuple[State, State]] = field(init=False)
    extra: Callable[[], Settings] = dict

    def __post_init__(self) -> None:
        self.states = lambda: (dict(self.ours.named_parameters()), dict(self.theirs.named_parameters()))


def nets(options: Any, dtype: torch.dtype, nudge: float) -> tuple[Any, Any]:
    """Two equal nets, with the trained weights."""
    net: Any = timm.create_model("resnet20_cifar")
    net.load_state_dict(load_file(options.weights), strict=False)  # lacks num_batches_tracked
    nudge_(net, nudge)
    net.to(dtype)
    return net, copy.deepcopy(net)


@torch.no_grad()
def nudge_(net: nn.Module, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.mul_(1 + size * torch.randn(p.shape, generator=generator))


def plain_pair(ours: Any, theirs: Any, own: Any, other: Any) -> Pair:
    """Two optimizers in the plainest loop."""

    def step(net: Any, optimizer: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses: list[float] = []

    def consume(batches: Batches) -> None:
        for x, y in batches:
            losses.append(step(theirs, other, x, y).item())

    return Pair(ours, theirs, functools.partial(step, ours, own), consume, losses)


def noting(losses: list[float]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The cross-entropy, which appends its values."""

    def loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        value = cross_entropy(logits, y)
        losses.append(value.item())
        return value

    return loss


def sfw_pair(s: Settings, options: Any, dtype: torch.dtype, is_aligned: bool = False, nudge: float = 0.0) -> Pair:
    ours, theirs = nets(options, dtype, nudge)
    scope = s.get("scope", "tensor")
    numbers: dict[str, Any] = {"lr": 0.03, "momentum": 0.9}
    own = create_sfw(ours, s["region"], scope=scope, **numbers)
    svd = s.get("svd", "partial")
    other = published.sfw_optimizer(options.published, theirs, s["region"], scope=scope, svd=svd, **numbers)
    for group in own.param_groups if is_aligned else ():
        if group["constraint"] is not None:  # an oracle without memory is exact
            oracle = group["constraint"].oracle
            group["constraint"].oracle = lambda directions, _, oracle=oracle: oracle(directions)
    return plain_pair(ours, theirs, own, other)


def vita_pair(s: Settings, options: Any, dtype: torch.dtype, is_aligned: bool = False, nudge: float = 0.0) -> Pair:
    ours, _ = nets(options, dtype, nudge)
    numbers: dict[str, Any] = {"momentum": 0.9, "dampening": 0.9}
    own = create_sfw(ours, s["region"], lr=0.3, **numbers)
    theirs = copy.deepcopy(ours)  # inside the region; their way to scale into it is another one
    balls = published.vita(options.published).constraints
    targets = hf_compress.find_targets(theirs)
    regions = [group["constraint"] for group in own.param_groups if group["constraint"] is not None]
    weights = [target.parameter for target in targets.values()]
    listed = [
        balls.KSparsePolytope(w.numel(), K=int(r.k * w.numel()), radius=r.radius_of([w]))
        for r, w in zip(regions, weights, strict=True)
    ]
    inside = {id(w) for w in weights}
    optimizer = published.vita(options.published).SFW(weights, learning_rate=0.3, rescale="gradient", momentum=0.9)
    constrained = SimpleNamespace(step=lambda: optimizer.step(listed), zero_grad=optimizer.zero_grad)
    free = torch.optim.SGD([p for p in theirs.parameters() if id(p) not in inside], lr=0.3, **numbers)
    return plain_pair(ours, theirs, own, published.Together(constrained, free))


def cram_pair(s: Settings, options: Any, dtype: torch.dtype, is_aligned: bool = False, nudge: float = 0.0) -> Pair:
    ours, theirs = nets(options, dtype, nudge)
    folder, rho = options.published, 0.1
    own = CrAM(torch.optim.SGD(ours.parameters(), **SGD), ours, s["patterns"], rho=rho)
    drawn = draws(own, s["steps"])
    is_n_m = drawn[0] in ("2:4", "4:8")
    if is_aligned and not is_n_m:
        total = sum(t.parameter.numel() for t in hf_compress.find_targets(ours).values())
        own = CrAM(torch.optim.SGD(ours.parameters(), **SGD), ours, [as_many(p, total) for p in s["patterns"]], rho=rho)
    sparsities = None if is_n_m else [float(p.partition(":")[2]) for p in s["patterns"]]
    other = published.cram_optimizer(folder, theirs, sparsities, rho, **SGD)
    if is_aligned and is_n_m:
        leave_first(other)
    losses: list[float] = []

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        own.zero_grad()
        loss = cross_entropy(ours(x), y)
        loss.backward()
        with own.compressed():
            cross_entropy(ours(x), y).backward()
        own.step()
        return loss.detach()

    def consume(batches: Batches) -> None:
        for x, y in batches:
            pattern = drawn[len(losses)]
            loss: Any = functools.partial(loss_of, theirs, x, y)
            if is_n_m:
                np.random.seed(HEADS if pattern == "2:4" else TAILS)
            else:
                other.param_groups[0]["sparsities"] = [float(pattern.partition(":")[2])]
            losses.append(published.cram_step(folder, other, theirs, loss).item())

    return Pair(ours, theirs, step, consume, losses)


def loss_of(net: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy(net(x), y)


def draws(optimizer: CrAM, steps: int) -> list[str]:
    """The patterns that it draws."""
    found = []
    for optimizer.num_steps in range(steps):
        found.append(str(optimizer.pattern))
    optimizer.num_steps = 0
    return found


def as_many(pattern: str, total: int) -> str:
    """A pattern that removes as many of all weights as the published comparison does with the share of this one."""
    kept = math.ceil(total * (1 - float(pattern.partition(":")[2]))) - 1
    return f"unstructured:{(total - kept + 0.5) / total}"


def leave_first(optimizer: Any) -> None:
    """Layers of fewer than 8 input channels are not sparsified."""
    sparsify, group = optimizer._sparsify_weights, optimizer.param_groups[0]

    def without_them(n: int, m: int) -> None:
        every = group["params"]
        group["params"] = [p for p in every if p.ndim == 1 or p.shape[1] >= 8]
        sparsify(n, m)
        group["params"] = every

    optimizer._sparsify_weights = without_them


def tpp_pair(s: Settings, options: Any, dtype: torch.dtype, is_aligned: bool = False, nudge: float = 0.0) -> Pair:
    ours, theirs = nets(options, dtype, nudge)
    sample = torch.zeros(1, 3, 32, 32, dtype=dtype)
    grow, every, stable, zero = (4, 1, 30, 1) if is_aligned else (112, 7, 87, 4)  # published: one step more than these
    layers = list(hf_compress.find_targets(ours))
    schedule = GrowingSchedule(grow, stable, every, zero_every=zero, num_layers=len(layers))
    chosen = select(ours, ["layer*.conv1=filters:0.5"], sample).pruned
    penalty = TrainabilityPenalty(ours, chosen, sample)
    sgd = torch.optim.SGD(ours.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    losses: list[float] = []
    taken = itertools.count()

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        i = next(taken)
        sgd.zero_grad()
        loss = cross_entropy(ours(x), y)
        loss.backward()
        penalty.add_gradients(schedule.strength(i))
        sgd.step()
        zeroed = [path for path in chosen if schedule.is_zeroed(layers.index(f"{path}.weight"), i)]
        if zeroed:
            penalty.zero_(zeroed)
        return loss.detach()

    pruner: Any = published.tpp_pruner(
        *(options.published, theirs, {"layer*.conv1": 0.5}, sample, None, noting(losses)),
        reg_granularity_prune=every / grow,
        update_reg_interval=every,
        reg_iters=grow,
        stabilize_reg_interval=stable,
        zero_out_interval=zero,
    )
    small: list[Any] = []

    def consume(batches: Batches) -> None:
        pruner.train_loader = ended(batches)
        with contextlib.suppress(EOFError):
            small.append(pruner.prune())

    pair = Pair(ours, theirs, step, consume, losses)
    pair.extra = lambda: removed(theirs, small[0], chosen, pruner)
    return pair


def ended(batches: Batches) -> Iterator[Any]:
    """An end that no loop over epochs survives."""
    yield from batches
    raise EOFError


def removed(net: Any, small: Any, chosen: dict[str, list[int]], pruner: Any) -> Settings:
    """Whether both select the same filters, and how far logits are apart after our and their removal from their net."""
    same = all(sorted(rows) == sorted(pruner.pruned_wg[path]) for path, rows in chosen.items())
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    own = copy.deepcopy(net).eval()
    remove(own, chosen, x[:1])
    with torch.no_grad():
        ours, theirs = own(x), small.eval()(x)
    counts = [sum(p.numel() for p in n.parameters()) for n in (own, small)]
    apart = float((ours - theirs).abs().max())
    return {"same_filters": same, "removal": {"largest_difference_of_logits": apart, "parameters": counts}}


def uniform_in_float(noise: torch.Tensor, low: float, high: float, generator: Any = None) -> torch.Tensor:
    """What the published code draws, which is in float32, in any type."""
    drawn = torch.rand(noise.shape, generator=generator).to(noise.dtype)
    return noise.copy_(drawn * (high - low) + low)


def lilnetx_pair(s: Settings, options: Any, dtype: torch.dtype, is_aligned: bool = False, nudge: float = 0.0) -> Pair:
    theirs, models = published.lilnetx_net(options.published)
    nudge_(theirs.to(dtype), nudge)
    for each in models.values():
        each.to(dtype)
    for module in theirs.modules():
        if module is not theirs.fc and getattr(module, "bias_decoder", None) is not None:
            module.bias.requires_grad_(False).zero_()  # their convolutions have biases before batch norms
    ours: Any = timm.create_model("resnet20_cifar").to(dtype)
    lilnetx.reparametrize(ours, init="uniform", linear_slice=1)
    entropies = lilnetx.entropy_models(ours)
    with torch.no_grad():
        for (_, a), (_, b) in zip(*(named.items() for named in states(ours, theirs, entropies, models)), strict=True):
            a.copy_(b)
    generator = torch.Generator().manual_seed(0)
    rows = sum(layer.slices for layer in lilnetx.latent_layers(ours))
    adam = torch.optim.Adam(ours.parameters(), LILNETX["lr"])
    of_entropies = torch.optim.Adam([p for each in entropies for p in each.parameters()], LILNETX["entropy_lr"])
    losses: list[float] = []

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        adam.zero_grad()
        of_entropies.zero_grad()
        loss = cross_entropy(ours.train()(x), y)
        with patch.object(torch.Tensor, "uniform_", uniform_in_float):
            bits = lilnetx.rate_bits(ours, generator=generator)
        priors = LILNETX["l2"] * lilnetx.l2_prior(ours) + LILNETX["slices"] * lilnetx.slice_prior(ours)
        (loss + LILNETX["rate"] * bits / rows + priors).backward()
        adam.step()
        of_entropies.step()
        return loss.detach()

    consume = functools.partial(lilnetx_loop, options.published, nn.DataParallel(theirs), models, losses)
    pair = Pair(ours, theirs, step, consume, losses)
    pair.states = lambda: states(ours, theirs, entropies, models)
    at_start = bits_of(options.published, ours, theirs, models)
    pair.extra = lambda: {"bits": {"at_start": at_start, "at_end": bits_of(options.published, ours, theirs, models)}}
    return pair


def states(ours: Any, theirs: Any, entropies: list[Any], models: dict[str, Any]) -> tuple[State, State]:
    """Latents, decoders, entropy models and the other parameters of both, by the published names."""
    layers = {layer.path: layer for layer in lilnetx.latent_layers(ours)}
    plain = dict(ours.named_parameters())
    a, b = {}, {}
    for name, value in theirs.named_parameters():
        path = name.removesuffix(".weight").replace("fc", "linear")
        if value.requires_grad and "decoder" not in name:
            a[name] = layers[path].latent if path in layers else plain[name.replace("fc", "linear")]
            b[name] = value
    pairs = zip(lilnetx.decoders_of(ours), entropies, ("conv3x3", "dense"), strict=True)
    for decoder, entropy, group in pairs:
        a[f"decoder {group}"] = decoder.matrix
        b[f"decoder {group}"] = theirs.weight_decoders[group].scale.view_as(decoder.matrix)
        for i, part in enumerate((models[group].f1, models[group].f2, models[group].f3, models[group].f4)):
            own = {"h": entropy.slopes, "b": entropy.offsets, "a": entropy.bends}
            for letter in "hba" if part.a is not None else "hb":
                a[f"entropy {group} {letter}{i}"] = own[letter][i : i + 1]
                b[f"entropy {group} {letter}{i}"] = getattr(part, letter)
    return a, b


def lilnetx_loop(folder: Path, net: Any, models: dict[str, Any], losses: list[float], batches: Any) -> None:
    """The published epoch, with settings for it."""
    code = published.lilnetx(folder).trainer
    sections: dict[str, Settings] = {
        "losses": {"reg_weight": LILNETX["rate"], "reg_weight_warmup": 0},
        "sched": {"type": ""},
        "network": {"vanilla": False, "single_prob_model": False},
        "ffcv": {"enabled": False},
        "wd": {"weights": LILNETX["l2"], "modules": ["conv3x3", "dense"]},
        "gd": {"weights": LILNETX["slices"], "modules": ["conv3x3"], "enable_l1": False},
        "optimizer": {"grad_clip": 0.0},
        "logger": {"print_freq": 10**9},
        "wandb": {"enabled": False},
        "train": {"max_batches": 0},
    }
    code.config = SimpleNamespace(**{f"get_conf_{name}": lambda _, s=s: s for name, s in sections.items()})

    entropy_parameters = [p for each in models.values() for p in each.parameters()]
    trainer = SimpleNamespace(
        conf=None,
        model=net,
        prob_models=models,
        train_loader=batches,
        criterion=noting(losses),
        order=2,
        optimizer=torch.optim.Adam(net.parameters(), LILNETX["lr"]),
        prob_optimizer=torch.optim.Adam(entropy_parameters, LILNETX["entropy_lr"]),
        calc_lr=lambda *_: LILNETX["lr"],
        dist=SimpleNamespace(is_master=lambda: True),
    )
    code.Trainer.train_epoch(trainer, 0, torch.Generator().manual_seed(0))


@torch.no_grad()
def bits_of(folder: Path, ours: Any, theirs: Any, models: dict[str, Any]) -> Settings:
    """Bits per latent of rounded latents, and the share of empty slices."""
    count = lilnetx.latent_count(ours)
    empty = [
        (layer.weight.round().flatten(2) == 0).all(2)
        for layer in theirs.modules()
        if hasattr(layer, "stride") and hasattr(layer, "weight_decoder")
    ]
    return {
        "ours": float(lilnetx.rate_bits(ours, is_noisy=False)) / count,
        "theirs": float(published.lilnetx_bits(folder, theirs, models, is_noisy=False)) / count,
        "empty_slices": {
            "ours": lilnetx.slice_sparsity(ours),
            "theirs": sum(int(e.sum()) for e in empty) / sum(e.numel() for e in empty),
        },
    }


Maker = Callable[..., Pair]
FAMILIES: dict[str, Maker] = {"cram": cram_pair, "sfw": sfw_pair, "vita": vita_pair, "tpp": tpp_pair}
FAMILIES["lilnetx"] = lilnetx_pair
