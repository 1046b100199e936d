"""What a training step of LilNetX costs beside a plain one, and its rate beside autograd and beside a floor.

"plain" is forward, backward and a fused optimizer step of the model as it is; "lilnetx" is the same of a model with
latents, and what `LilNetXTrainer` adds in every step: bits and their gradients, priors (squares and norms of slices),
and the optimizer of the entropy models. "rate" is the bits alone, with the gradients for latents and entropy models;
"rate_autograd" is the same as plain torch writes it, layer by layer in chunks of 131,072 latents; both leave the same
gradients (checked here to 1e-4 of the largest). "noise" is the random numbers alone. "floor" is one sigmoid and one log
of as many numbers in chunks that fit the cache, "needed" is what the formula has of them: 8 sigmoids, an expm1, a log.
The forms run in turns on the processor clock of one thread; ratios are medians over rounds.

    OMP_NUM_THREADS=1 python recipes/benchmarks/lilnetx_cost.py --output recipes/benchmarks/results/lilnetx_cost.json
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
from machine import facts
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification
from turns import in_turns, ratios

import hf_compress  # noqa: F401  # registers the nets of the papers
from hf_compress.methods.lilnetx import (
    LilNetXConfig,
    entropy_models,
    latent_count,
    latent_layers,
    rate_bits,
    reparametrize,
)
from hf_compress.methods.lilnetx.regularization import Regularization

ROUNDS = 9
NUMBERS, ROOM = torch.rand(1 << 15) + 0.1, torch.empty(1 << 15)
ONCE: dict[str, list[Any]] = {
    "floor": [torch.sigmoid, torch.log],
    "needed": [*8 * [torch.sigmoid], torch.expm1, torch.log],
    "noise": [lambda _, out: out.uniform_(-0.5, 0.5)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = {"what": __doc__, "command": "OMP_NUM_THREADS=1 python " + " ".join(sys.argv), **facts(), "rounds": ROUNDS}
    text = json.dumps({**about, "cases": {name: measured(*make()) for name, make in CASES.items()}}, indent=2)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)


def resnet20(batch: int) -> tuple[Any, Any, Any]:
    sgd = lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9, fused=True)  # noqa: E731
    return timm.create_model("resnet20_cifar"), {"x": torch.randn(batch, 3, 32, 32)}, sgd


def bert_mini() -> tuple[Any, Any, Any]:
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    inputs = {"input_ids": torch.randint(1, 30_000, (32, 128))}
    adam = lambda parameters: torch.optim.AdamW(parameters, 1e-4, fused=True)  # noqa: E731
    return BertForSequenceClassification(BertConfig(**sizes)), inputs, adam


CASES: dict[str, Callable[[], Any]] = {
    "resnet20, 64 images of 32 px": lambda: resnet20(64),
    "resnet20, 128 images of 32 px": lambda: resnet20(128),
    "bert-mini, 4,096 tokens": bert_mini,
}


def measured(model: Any, inputs: Any, optimizer_of: Any) -> dict[str, Any]:
    """Milliseconds of all forms, nanoseconds for a latent, and ratios."""
    plain, state = copy.deepcopy(model), SimpleNamespace(global_step=5, max_steps=10, num_train_epochs=1)
    reparametrize(model)
    weights = {"rate_weight": 0.1, "l2_weight": 1e-3, "slice_weight": 1e-3, "entropy_fit_steps": 20}
    args = LilNetXConfig("out", use_cpu=True, rate_latents=10**9, **weights)
    terms, count = Regularization(model, args), latent_count(model)
    terms.on_train_begin(args, state, None)
    optimizers = {id(m): optimizer_of(m.parameters()) for m in (plain, model)}

    def step(net: Any) -> None:
        output = net(**inputs)
        (output if isinstance(output, torch.Tensor) else output.logits).square().mean().backward()
        if net is model:
            terms.on_pre_optimizer_step(args, state, None)
        optimizers[id(net)].step()
        optimizers[id(net)].zero_grad()

    rates = {"rate": closed_rate, "rate_autograd": autograd_rate}
    check(model, rates)
    forms: dict[str, Callable[[], Any]] = {"plain": lambda: step(plain), "lilnetx": lambda: step(model)}
    forms |= {name: functools.partial(form, model) for name, form in rates.items()}
    forms |= {name: functools.partial(passes, calls, count) for name, calls in ONCE.items()}
    seconds = in_turns(forms, ROUNDS)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    pairs = [("lilnetx", "plain"), ("rate", "plain"), ("rate_autograd", "rate"), ("rate", "floor"), ("rate", "needed")]
    return {
        "latents": count,
        "milliseconds": {name: round(1e3 * s, 2) for name, s in medians.items()},
        "least_milliseconds": {name: round(1e3 * min(s), 2) for name, s in seconds.items()},
        "nanoseconds_per_latent": {name: round(1e9 * min(seconds[name]) / count, 2) for name in (*rates, *ONCE)},
        **{f"{a}_over_{b}": round(statistics.median(ratios(seconds, a, b)), 3) for a, b in pairs},
    }


def passes(calls: list[Any], count: int) -> None:
    for _ in range(math.ceil(count / len(ROOM))):
        for call in calls:
            call(NUMBERS, out=ROOM)


def closed_rate(model: Any) -> None:
    (rate_bits(model, generator=torch.Generator().manual_seed(0)) / latent_count(model)).backward()


def autograd_rate(model: Any) -> None:
    """The plain formula in a numerically safe form, for autograd to derive."""
    generator, count = torch.Generator().manual_seed(0), latent_count(model)
    for layer in latent_layers(model):
        row, entropy = layer.decoded.decoder.row, layer.decoded.decoder.entropy[0]
        for start in range(0, layer.slices, (1 << 17) // row):
            x = layer.latent.reshape(-1, row)[start : start + (1 << 17) // row] / layer.decoded.gain
            x = x + torch.rand(x.shape, generator=generator) - 0.5
            lower, upper = logits(entropy, x - 0.5), logits(entropy, x + 0.5)
            is_right = (lower + upper > 0).detach()
            low = functional.logsigmoid(torch.where(is_right, -upper, lower))
            high = functional.logsigmoid(torch.where(is_right, -lower, upper))
            share = -torch.expm1(low - high)
            (-(high + torch.log(share.clamp_min(1e-30))).sum() / math.log(2) / count).backward()


def logits(entropy: Any, x: torch.Tensor) -> torch.Tensor:
    slopes, bends = functional.softplus(entropy.slopes), torch.tanh(entropy.bends)
    for i in range(3):
        x = torch.addcmul(entropy.offsets[i], x, slopes[i])
        x = torch.addcmul(x, torch.tanh(x), bends[i])
    return torch.addcmul(entropy.offsets[3], x, slopes[3])


def check(model: Any, rates: dict[str, Callable[[Any], None]]) -> None:
    leaves = [layer.latent for layer in latent_layers(model)]
    leaves += [p for each in entropy_models(model) for p in each.parameters()]
    found: list[list[Any]] = []
    for form in rates.values():
        for p in leaves:
            p.grad = None
        form(model)
        found.append([p.grad for p in leaves])
    if not all((a - b).abs().max() <= 1e-4 * b.abs().max() for a, b in zip(*found, strict=True)):
        raise RuntimeError("the gradients of the two forms differ")


if __name__ == "__main__":
    main()
