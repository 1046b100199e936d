"""The code that the papers published, imported at run time, so that it can be timed and compared beside ours.

Nothing of it is part of this project. Clone what is needed into one folder, and give that to --published:

    FOLDER/CrAM                       github.com/IST-DASLab/CrAM
    FOLDER/compression-aware-SFW      github.com/ZIB-IOL/compression-aware-SFW
    FOLDER/SFW-Once-for-All-Pruning   github.com/VITA-Group/SFW-Once-for-All-Pruning
    FOLDER/TPP                        github.com/MingSun-Tse/TPP
    FOLDER/LilNetX                    github.com/Sharath-girish/LilNetX

`cram`, `sfw`, `vita`, `tpp` and `lilnetx` give the classes and functions themselves. Beside them stand ways to use
these on any model as our own code is used: `cram_optimizer` with `cram_step`, `sfw_optimizer`, `tpp_pruner` with
`tpp_penalty`, `lilnetx_net` with `lilnetx_bits`. Packages that the optimizers import and do not need are replaced.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import nn

from hf_compress.methods.sfw import parse_constraint
from hf_compress.methods.sfw.constraints.base import Constraint, count_of
from hf_compress.methods.sfw.factory import constrained_groups
from hf_compress.targets import find_targets

Closure = Callable[[], torch.Tensor]
OWNERS = {
    "CrAM": "IST-DASLab",
    "compression-aware-SFW": "ZIB-IOL",
    "SFW-Once-for-All-Pruning": "VITA-Group",
    "TPP": "MingSun-Tse",
    "LilNetX": "Sharath-girish",
}

# Of the published CIFAR runs; what stands in the first two lines turns other methods off.
_TPP_SETTINGS: dict[str, Any] = (
    {"skip_layers": [], "compare_mode": "local", "same_pruned_wg_layers": "", "align_constrained": False, "arch": ""}
    | {"inherit_pruned": "", "reinit_layers": [], "layer_chl": {}, "greg_via_loss": False, "not_apply_reg": False}
    | {"prune_schedule": "simu", "pick_pruned": "min", "prune_method": "OPP", "wg": "filter", "resume_path": None}
    | {"opp_scheme": "v5", "lw_opp": 1000, "bn_reg": True, "weight_reg": True, "reg_schedule": "linear", "verbose": ""}
    | {"lr_prune": 1e-3, "momentum": 0.9, "weight_decay": 5e-4, "reinit_interval": 10**9, "print_interval": 10**9}
    | {"reg_granularity_prune": 1e-4, "reg_upper_limit": 1.0, "update_reg_interval": 10, "reg_iters": 100_000}
    | {"stabilize_reg_interval": 10_000, "zero_out_interval": 100, "jsv_loop": 0}
)


def commits(folder: Path) -> dict[str, str]:
    """owner/name of every checkout in the folder, and its commit."""
    return {
        f"{owner}/{name}": subprocess.run(
            ["git", "-C", str(folder / name), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name, owner in OWNERS.items()
        if (folder / name).is_dir()
    }


def _load(
    folder: Path, checkout: str, names: Sequence[str], stubs: Sequence[str] = (), stay: Sequence[str] = ()
) -> list[Any]:
    """Modules of a checkout; sys.path and sys.modules are afterwards as they were.

    Args:
        folder: with the checkouts.
        checkout: name of one.
        names: of its modules.
        stubs: names of modules that are replaced by mock objects while these are imported.
        stay: packages that import parts of themselves later, and so must be found by name.
    """
    root = Path(folder).resolve() / checkout
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is missing; clone github.com/{OWNERS[checkout]}/{checkout} there")
    own = {path.stem for path in root.iterdir()}
    foreign = {name: m for name, m in sys.modules.items() if name.partition(".")[0] in own or name in stubs}
    for name in foreign:
        del sys.modules[name]
    sys.modules.update({name: MagicMock() for name in stubs})
    try:
        with patch.object(sys, "path", [str(root), *sys.path]), patch.object(torch.jit, "script", _plain), quiet():
            return [importlib.import_module(name) for name in names]
    finally:
        for name in list(sys.modules):
            if name in stubs or name.partition(".")[0] in own - set(stay):
                del sys.modules[name]
        sys.modules.update(foreign)


def _plain(function: Any) -> Any:
    """In place of torch.jit.script, which refuses some of these functions today."""
    return function


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What is printed inside is dropped."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@functools.cache
def cram(folder: Path) -> SimpleNamespace:
    """`TopkCrAM`, `NMTopkCrAM`, and `disable_running_stats` and `enable_running_stats` of batch norms."""
    optimizers, bypass = _load(folder, "CrAM", ["optimization.custom_optimizers", "utils.bypass_bn"])
    return SimpleNamespace(
        TopkCrAM=optimizers.TopkCrAM,
        NMTopkCrAM=optimizers.NMTopkCrAM,
        disable_running_stats=bypass.disable_running_stats,
        enable_running_stats=bypass.enable_running_stats,
    )


def cram_optimizer(
    folder: Path,
    model: nn.Module,
    sparsities: Sequence[float] | None = (0.5, 0.7, 0.9),
    rho: float = 0.05,
    **sgd: Any,
) -> Any:
    """The published CrAM+ with masked second gradient around torch's SGD, for all parameters of a model.

    Args:
        folder: with the checkouts.
        model: whose weights of more than one dimension are pruned by one threshold.
        sparsities: one is drawn for every step, by numpy's global generator; assign
            `optimizer.param_groups[0]["sparsities"]` to prescribe it. None: 2:4 or 4:8 instead, with equal chances.
        rho: of the ascent.
        **sgd: arguments of SGD, such as lr and momentum.
    """
    code = cram(folder)
    options = {} if sparsities is None else {"sparsities": list(sparsities)}
    kind = code.NMTopkCrAM if sparsities is None else code.TopkCrAM
    with quiet():
        return kind(model.parameters(), torch.optim.SGD, rho=rho, **options, **sgd)


def cram_step(folder: Path, optimizer: Any, model: nn.Module, loss: Closure) -> torch.Tensor:
    """One step of `cram_optimizer`: two gradients and the update; `loss` computes the loss of the batch anew.

    Returns:
        The loss at the weights themselves.
    """
    code = cram(folder)

    def closure() -> torch.Tensor:
        value = loss()
        value.backward()
        return value

    optimizer.zero_grad()
    first = closure()
    code.disable_running_stats(model)
    optimizer.step(closure)
    code.enable_running_stats(model)
    return first.detach()


@functools.cache
def sfw(folder: Path) -> SimpleNamespace:
    """`SFW` of ZIB; `constraints`, the module of its balls; `make_feasible`, which scales weights into them."""
    names = ["optimizers.optimizers", "optimizers.constraints"]
    optimizers, constraints = _load(folder, "compression-aware-SFW", names, ["torchmetrics"])
    return SimpleNamespace(SFW=optimizers.SFW, constraints=constraints, make_feasible=constraints.make_feasible)


@functools.cache
def vita(folder: Path) -> SimpleNamespace:
    """`SFW` of VITA, whose `step` takes the list of constraints; `constraints`, the module of its balls."""
    names = ["frankwolfe.pytorch.optimizers", "frankwolfe.pytorch.constraints"]
    optimizers, constraints = _load(folder, "SFW-Once-for-All-Pruning", names)
    return SimpleNamespace(SFW=optimizers.SFW, constraints=constraints)


class Together:
    """Optimizers of one model that step together."""

    def __init__(self, *optimizers: Any) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        """Of each."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Of each."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def sfw_optimizer(
    folder: Path,
    model: nn.Module,
    region: str = "k_sparse(k=0.1, radius=weights:1)",
    rescale: str = "gradient",
    scope: str = "tensor",
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
    svd: str = "partial",
) -> Together:
    """The published SFW of ZIB on the same weights and in the same balls as `create_sfw` of ours.

    The other parameters (biases, norms) are trained by torch's SGD of the same learning rate and momentum, as by ours.

    Args:
        folder: with the checkouts.
        model: whose weights are scaled into the region at once.
        region: in our words, such as "group_k_support(k=0.3, radius=weights:1)".
        rescale: "diameter", "gradient", "fast_gradient" or "none".
        scope: "tensor" or "global".
        lr: learning rate.
        momentum: heavy ball.
        svd: how spectral regions find singular vectors: "partial" (a full decomposition) or, for K-support,
            "qrpartial" (ten steps of a block power iteration from a random start).
    """
    code = sfw(folder)
    groups = constrained_groups(find_targets(model), parse_constraint(region), scope, "filters")
    balls = []
    for group in groups:
        weights = [p for _, p in group["params"]]
        balls.append((published_ball(folder, group["constraint"], weights, svd), weights))
    code.make_feasible(balls)
    inside = {id(p) for _, weights in balls for p in weights}
    rest = [p for p in model.parameters() if id(p) not in inside]
    listed = [{"constraint": ball, "params": weights} for ball, weights in balls]
    return Together(
        code.SFW(listed, lr=lr, rescale=None if rescale == "none" else rescale, momentum=momentum),
        torch.optim.SGD(rest, lr=lr, momentum=momentum),
    )


def published_ball(folder: Path, region: Constraint, weights: Sequence[torch.Tensor], svd: str = "partial") -> Any:
    """The published ball of the same K and radius as one of ours for these weights."""
    balls, radius = sfw(folder).constraints, region.radius_of(list(weights))
    options: Any = region.options
    entries = sum(w.numel() for w in weights)
    filters = sum(w.shape[0] for w in weights)
    rank = min(weights[0].flatten(1).shape) if weights[0].ndim > 1 else 0
    makers: dict[str, tuple[Any, int, tuple[str, ...]]] = {
        "k_sparse": (balls.KSparsePolytope, entries, ()),
        "k_support": (balls.KSupportNormBall, entries, ()),
        "group_k_support": (balls.GroupKSupportNormBall, filters, ()),
        "spectral_k_sparse": (balls.SpectralKSparsePolytope, rank, (svd,)),
        "spectral_k_support": (balls.SpectralKSupportNormBall, rank, (svd,)),
    }
    if region.name in makers:
        kind, total, more = makers[region.name]
        return kind(total, count_of(options["k"], total), *more, norm_radius=radius)
    if region.name == "nuclear":
        return balls.NuclearNormBall(rank, "power_it", norm_radius=radius)
    return balls.LpBall(entries, p=options["p"], norm_radius=radius)


@functools.cache
def tpp(folder: Path) -> SimpleNamespace:
    """`Pruner`, which runs the regularization; `gram`, its penalty of one layer (v5); `score` and `pick` by L1."""
    stubs = ["smilelogging", "smilelogging.utils", "matplotlib", "matplotlib.pyplot"]
    names = ["pruner.opp_pruner", "pruner.reinit_model", "pruner.prune_utils", "pruner.meta_pruner"]
    pruner, reinit, utils, _ = _load(folder, "TPP", names, stubs, stay=["pruner"])
    return SimpleNamespace(
        Pruner=pruner.Pruner,
        gram=reinit.orth_regularization_v5,
        score=utils.get_score_layer,
        pick=utils.pick_pruned_layer,
    )


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """`.cuda()` leaves tensors and modules where they are, for code that calls it on every machine."""
    if torch.cuda.is_available():
        yield
        return
    with (
        patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor),
        patch.object(nn.Module, "cuda", lambda module, *_, **__: module),
    ):
        yield


def tpp_pruner(
    folder: Path,
    model: nn.Module,
    shares: Mapping[str, float],
    example_input: torch.Tensor,
    batches: Any = (),
    loss: Any = None,
    **settings: Any,
) -> Any:
    """The published TPP on a model, its filters selected by L1: `pruned_wg` maps names of layers to indices.

    `pruner.prune()` inside `without_cuda()` runs the regularization over `batches` and returns the small net.

    Args:
        folder: with the checkouts.
        model: any convolutional net whose batch norms follow their convolutions.
        shares: glob on names of layers to the share of its filters that goes.
        example_input: a batch of images.
        batches: iterated over in `prune`: (images, labels).
        loss: of logits and labels, for `prune`.
        **settings: instead of those of the published CIFAR runs.
    """
    args = {**_TPP_SETTINGS, "stage_pr": dict(shares), **settings}
    passer = SimpleNamespace(dummy_input=example_input, test=lambda *_, **__: (0.0, 0.0), test_loader=None, args=None)
    passer.criterion, passer.save = loss, lambda *_, **__: None
    loader = SimpleNamespace(train_loader=batches, test_loader=None)
    with quiet(), without_cuda():
        pruner = tpp(folder).Pruner(model, loader, SimpleNamespace(ExpID=""), SimpleNamespace(**args), passer)
    pruner.accprint = lambda *_: None  # it prints by a print of its own
    return pruner


def tpp_penalty(folder: Path, pruner: Any) -> Callable[[float], None]:
    """A function of the strength that adds the gradient of the published penalty to `.grad`, by its own code.

    Args:
        folder: with the checkouts.
        pruner: see `tpp_pruner`; gradients of all parameters of its model must be there.
    """
    layers = [(name, layer) for name, layer in pruner.model.named_modules() if pruner.pr.get(name, 0) > 0]
    gram = tpp(folder).gram

    def add(strength: float) -> None:
        total: Any = sum(gram(layer.weight, pruned_wg=pruner.pruned_wg[name]) for name, layer in layers)
        (pruner.args.lw_opp * strength * total).backward()
        for name, _ in layers:
            pruner.reg[name][pruner.pruned_wg[name], :] = strength
        with torch.no_grad():
            pruner._apply_reg()

    return add


@functools.cache
def lilnetx(folder: Path) -> SimpleNamespace:
    """`net`, which builds a ResNet of `Block`s with latents; `BitEstimator`; `self_information` (bits); `trainer`."""
    stubs = ["config", "dist_utils", "utils", "vgg"]
    layers, net, bits, trainer = _load(folder, "LilNetX", ["layers", "resnet_cifar", "bitEstimator", "trainer"], stubs)
    return SimpleNamespace(
        layers=layers,
        net=net._resnet_cifar,
        Block=net.BasicBlockCifar,
        BitEstimator=bits.BitEstimator,
        self_information=trainer.self_information,
        trainer=trainer,
    )


def lilnetx_net(folder: Path, width: int = 1, boundary: float = 3.0, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """The published ResNet-20 for CIFAR with latents as drawn by its own code, and its entropy models.

    Returns:
        The net, which rounds latents from now on, and "conv3x3" and "dense" to their `BitEstimator`.
    """
    code = lilnetx(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = code.net(code.Block, [3, 3, 3], width=width, boundary=boundary, no_shift=True)
        models = {"conv3x3": code.BitEstimator(9), "dense": code.BitEstimator(1)}
    net.apply_straight_through(True)
    return net, models


def lilnetx_bits(
    folder: Path, net: Any, models: Mapping[str, Any], generator: torch.Generator | None = None, is_noisy: bool = True
) -> torch.Tensor:
    """Bits of all latents of a net of `lilnetx_net`, differentiable; with noise, or rounded."""
    count = lilnetx(folder).self_information
    weights = net.get_weights()
    return sum(count(weights[name], models[name], is_val=not is_noisy, g=generator)[0] for name in weights)
