"""Whole training steps of every method on an accelerator: time beside a plain one, memory, and what they wait for.

Every form has a net of its own, which trains on one batch of random data in bfloat16 (autocast), and is timed in turns
with the plain one. "two passes" is the floor of CrAM. Memory is the peak of the allocator less what other nets hold.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import timm
import torch
from sfw_cost import FORMS as REGIONS
from shapes import SHORT_STEP
from transformers import BertConfig, BertForSequenceClassification
from turns import beside, in_turns

import hf_compress  # noqa: F401  # registers the nets of the papers
from hf_compress.methods.cram import CrAM
from hf_compress.methods.lilnetx import LilNetXConfig, reparametrize
from hf_compress.methods.lilnetx.regularization import Regularization
from hf_compress.methods.sfw import create_sfw
from hf_compress.methods.tpp import TrainabilityPenalty, select

CRAM = {f"CrAM+ {pattern}": pattern for pattern in ("unstructured:0.9", "unstructured:0.9:layer", "2:4", "4:8")}


@dataclass(frozen=True)
class Net:
    """A net with a batch, and what TPP takes away from it."""

    make: Callable[[], Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    rules: list[str]
    gram: dict[str, Any]

    def placed(self, device: torch.device) -> tuple[Any, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model, inputs = self.make().to(device), {name: put.to(device) for name, put in self.inputs().items()}
        if "x" in inputs:
            model, inputs["x"] = (each.to(memory_format=torch.channels_last) for each in (model, inputs["x"]))
        return model, inputs


def images(name: str, batch: int, size: int, rules: list[str]) -> Net:
    return Net(lambda: timm.create_model(name), lambda: {"x": torch.randn(batch, 3, size, size)}, rules, {})


def texts(batch: int, length: int, **sizes: int) -> Net:
    model = lambda: BertForSequenceClassification(BertConfig(**sizes))  # noqa: E731
    ids = lambda: {"input_ids": torch.randint(1, 1000, (batch, length))}  # noqa: E731
    return Net(model, ids, ["neurons:0.5"], {"gram_scale": "n", "gram_weight": 16.0})


def nets(is_small: bool) -> dict[str, Net]:
    """As large as fills an accelerator, or small enough for any machine."""
    if is_small:
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        return {
            "resnet20, 4 images": images("resnet20_cifar", 4, 32, ["layer*.conv1=filters:0.5"]),
            "bert, 4 texts of 16 tokens": texts(4, 16, vocab_size=1000, **small),
        }
    rules = ["layer[1-3].*.conv[12]=filters:0.6", "layer4.*.conv[12]=filters:0.21"]
    return {
        "resnet50, 256 images": images("resnet50", 256, 224, rules),
        "bert-base, 64 texts of 128 tokens": texts(64, 128),
    }


def measured(net: Net, device: torch.device, rounds: int) -> dict[str, Any]:
    """Every form beside plain training, one after the other, so that two nets at most are there at once."""
    plain = stepper("plain", net, device)
    found: dict[str, Any] = {}
    for name in ("plain", "two passes", *CRAM, *(f"SFW {region}" for region in REGIONS), "TPP", "LilNetX"):
        before = allocated(device)
        step = stepper(name, net, device)
        for _ in range(2):
            step()
        peak = peak_of(step, device)
        found[name] = beside(in_turns({"base": plain, name: step}, rounds, clock=clock_of(device)), "base")[name]
        found[name] |= {"peak_bytes": peak - before} if device.type != "cpu" else {}
        found[name] |= {"waits": waits(step)} if device.type == "cuda" else {}
        print(f"  {name}: {found[name]['ratio_of_minima']:.3f}", flush=True)
    return found


def stepper(name: str, net: Net, device: torch.device) -> Callable[[], None]:
    """One step of a form on a net of its own."""
    model, inputs = net.placed(device)
    parts = parts_of(name, net, model, inputs)

    def step() -> None:
        for _ in range(2 if name == "two passes" else 1):
            loss_of(model, inputs, device).backward()
        if isinstance(parts.optimizer, CrAM):
            with parts.optimizer.compressed():
                loss_of(model, inputs, device).backward()
        parts.before()
        parts.optimizer.step()
        parts.optimizer.zero_grad()

    return step


def parts_of(name: str, net: Net, model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """The optimizer of a form, and what it does with gradients before a step."""
    before: Callable[[], None] = lambda: None  # noqa: E731
    if name == "TPP":
        sample = {k: v[:1] for k, v in inputs.items()}
        sample = sample.get("x", sample)
        penalty = TrainabilityPenalty(model, select(model, net.rules, sample).pruned, sample, **net.gram)
        before = functools.partial(penalty.add_gradients, 0.5)
    if name == "LilNetX":
        reparametrize(model)
        args = LilNetXConfig("out", rate_weight=0.1, l2_weight=1e-3, slice_weight=1e-3, entropy_fit_steps=20)
        terms, state = Regularization(model, args), SimpleNamespace(global_step=5, max_steps=10, num_train_epochs=1)
        terms.on_train_begin(args, state, None)
        before = functools.partial(terms.on_pre_optimizer_step, args, state, None)
    if name.startswith("SFW "):
        region, rescale, scope = REGIONS[name.removeprefix("SFW ")]
        optimizer: Any = create_sfw(model, region, rescale=rescale, scope=scope, **SHORT_STEP)
    else:
        optimizer = torch.optim.SGD(model.parameters(), fused=True, **SHORT_STEP)
    if name in CRAM:
        optimizer = CrAM(optimizer, model, [CRAM[name]])
    return SimpleNamespace(optimizer=optimizer, before=before)


def loss_of(model: Any, inputs: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    with torch.autocast(device.type, torch.bfloat16):
        output = model(**inputs)
    return (output if isinstance(output, torch.Tensor) else output.logits).float().square().mean()


def clock_of(device: torch.device) -> Callable[[], float]:
    """Of the processor, or of the wall when the device has done all that it was given."""
    if device.type == "cpu":
        return time.process_time

    def now() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return now


def allocated(device: torch.device) -> int:
    return 0 if device.type == "cpu" else torch.accelerator.memory_allocated()


def peak_of(step: Callable[[], None], device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    torch.accelerator.reset_peak_memory_stats()
    step()
    return torch.accelerator.max_memory_allocated()


def waits(step: Callable[[], None]) -> str:
    """What torch says of the first operation of a step that waits for the device; nothing where none does."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error)[:200]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""
