"""Weights as entropy-coded whole numbers: those that LilNetX has learned, or codes of a few bits.

Each coded weight keeps its name in the file, with bytes in one dimension for it, which no model takes without us.
config.json names these weights; one more tensor holds decoders and tables that they share.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..codec import Latents, encode
from ..loading import GROUPS, VERSION
from ..methods.lilnetx.parametrization import bake, latent_layers
from ..oneshot import merged_on_disk
from ..patterns import Chain, Pattern, Quantized, parse_pattern
from ..patterns.quantized import quantize
from ..structure import Belonging, describe, needless_outputs, remove, write_description
from ..structure.removal import merged
from ..targets import Target, find_targets


def save_coded(
    model: Any,
    folder: str | Path,
    pattern: str | Pattern | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    example_inputs: Any = None,
    **options: Any,
) -> None:
    """Save a model with entropy-coded weights; `from_pretrained` reads it after `import hf_compress`.

    Loaded, it has exactly the weights that it has now: of a model with latents those that `bake` gives. Other tensors
    take 16 bits where these hold every entry, see `round_rest_`.

    Args:
        model: a transformers model with latents (see `methods.lilnetx.reparametrize`), or one that has been compressed
            to a pattern that ends with intB, such as int8 or 2:4+int8. It is not changed.
        folder: a new or empty one.
        pattern: the one that it was compressed to; None for a model with latents.
        include: globs that it was compressed with.
        exclude: globs that it was compressed with.
        example_inputs: of a model with latents: when given, filters and neurons that change nothing are left out, see
            `structure.needless_outputs`.
        **options: of `save_pretrained`, such as `max_shard_size`.

    Raises:
        ValueError: for a model that has neither, weights that are not what the pattern makes of them, or a layer in
            factors, whose codes nobody reads.
    """
    plain = model
    if latent_layers(model):
        plain = copy.deepcopy(model)
        latents, decoders = bake(plain)
        if example_inputs is not None:
            latents = cut_needless(plain, latents, example_inputs)
    else:
        latents, decoders = integer_latents(model, pattern, include, exclude)
    # What the file joins with others is a plain part of them.
    joined = merged_on_disk(plain, find_targets(plain, include=["*"]))
    blobs, groups = encode({name: each for name, each in latents.items() if name not in joined}, decoders)
    halves: dict[Any, torch.Tensor] = {}
    state = {name: t if name in blobs else _narrowed(t, halves) for name, t in plain.state_dict().items()}
    for name, blob in {**blobs, GROUPS: groups}.items():
        state[name] = torch.from_numpy(np.frombuffer(blob, np.uint8).copy())
    plain.save_pretrained(folder, state_dict=state, **options)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    stored = config.get("quantization_config") or {"quant_method": "hf_compress"}
    config["quantization_config"] = {**stored, "coded": {"version": VERSION, "weights": list(blobs)}}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def cut_needless(model: Any, latents: dict[str, Latents], example_inputs: Any) -> dict[str, Latents]:
    """Remove filters and neurons that change nothing from a model, in place, and from its latents.

    Outputs stay where their readers would lose parts of slices.

    Args:
        model: that `bake` has made plain.
        latents: that it gave.
        example_inputs: see `structure.needless_outputs`.

    Returns:
        The latents of the smaller model.
    """
    belonging = Belonging(model, example_inputs)
    plan, _ = needless_outputs(model, example_inputs, belonging)
    plan = {
        path: rows
        for path, rows in plan.items()
        if all(_is_whole(latents, *key, gone) for key, gone in merged(model, {path: rows}, belonging).items())
    }
    if not plan:
        return latents
    lines = merged(model, plan, belonging)
    remove(model, plan, example_inputs, belonging)
    write_description(model)
    smaller = dict(latents)
    for (path, part), gone in lines.items():
        if (name := f"{path}.weight") in smaller and part != "norm":
            old = smaller[name]
            smaller[name] = replace(old, values=np.delete(old.values, gone, axis=0 if part == "outputs" else 1))
    return smaller


def _is_whole(latents: dict[str, Latents], path: str, part: str, gone: Sequence[int]) -> bool:
    """Whether inputs that go are whole slices of a Linear layer, if it has any."""
    own = latents.get(f"{path}.weight")
    if own is None or part != "inputs" or own.values.ndim > 2 or own.row == 1:
        return True
    return len(gone) == own.row * len({index // own.row for index in gone})


@torch.no_grad()
def round_rest_(model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None) -> int:
    """Round every tensor that is not coded to 16 bits, in place: norms, biases, embeddings, heads.

    Args:
        model: with latents, or one that is to be compressed.
        include: globs of weights that are coded, for a model without latents.
        exclude: globs of weights that are not.

    Returns:
        How many tensors were rounded; those with entries beyond the range of float16 are not.
    """
    if latent_layers(model):
        coded = {part for layer in latent_layers(model) for part in _parts_of(layer)}
    else:
        coded = {id(target.parameter) for target in find_targets(model, include, exclude).values()}
    count = 0
    for tensor in (*model.parameters(), *model.buffers()):
        half = tensor.half() if tensor.dtype == torch.float32 and id(tensor) not in coded else None
        if half is not None and torch.isfinite(half).all():
            tensor.copy_(half)
            count += 1
    return count


def _parts_of(layer: Any) -> tuple[int, ...]:
    return id(layer.latent), id(layer.decoded.gain), id(layer.decoded.decoder.matrix)


def _narrowed(tensor: torch.Tensor, halves: dict[Any, torch.Tensor]) -> torch.Tensor:
    """In 16 bits, if every entry stays what it is; `from_pretrained` widens it again."""
    if tensor.dtype != torch.float32:
        return tensor
    place = tensor.data_ptr(), tensor.shape, tensor.stride()
    if place not in halves:  # tied weights stay one tensor, of which a file has one copy
        half = tensor.half()
        halves[place] = half if torch.equal(half.float(), tensor) else tensor
    return halves[place]


def integer_latents(
    model: nn.Module,
    pattern: str | Pattern | None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> tuple[dict[str, Latents], list[np.ndarray]]:
    """The codes of a model that has been compressed to a few bits, with a scale for each output.

    Raises:
        ValueError: unless the pattern ends with intB and the weights are what it makes of them, and for a model
            without targets.
    """
    last = last_part(parse_pattern(pattern)) if pattern is not None else None
    if not isinstance(last, Quantized):
        raise ValueError(
            f"storage coded is for whole numbers, and {pattern or 'a model without latents'} has none; use a pattern "
            "that ends with intB, such as int8 or unstructured:0.8+int8, or train with LilNetXTrainer"
        )
    if any(fields["kind"] == "factored" for fields in describe(model).values()):
        raise ValueError("a layer in two factors cannot be coded; leave storage out, which stores the factors")
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    targets = {n: t for n, t in find_targets(model, include, exclude).items() if uses[id(t.parameter)] == 1}
    if not targets:
        raise ValueError("the model has no weights to code; name some by globs, as in include=['*head*']")
    return {name: _codes(name, target, last.bits) for name, target in targets.items()}, [np.ones((1, 1), np.float32)]


def _codes(name: str, target: Target, bits: int) -> Latents:
    codes, scales = quantize(target, bits)
    if not torch.equal((codes * scales).to(target.parameter.dtype), target.parameter):  # exact after `compress`
        raise ValueError(
            f"{name} has other values than int{bits} gives it; compress the model in the type that it has now, with "
            "the same include and exclude, and save it then"
        )
    is_transposed = target.output_dim == 1
    whole = (codes.T if is_transposed else codes).to(torch.int8).cpu().numpy()
    return Latents(whole, scales=scales.flatten().cpu().numpy(), is_transposed=is_transposed)


def last_part(pattern: Pattern | None) -> Pattern | None:
    """Of a chain, which decides how values are stored."""
    return pattern.parts[-1] if isinstance(pattern, Chain) else pattern


def has_latents(model: nn.Module) -> bool:
    """Whether a model is one that LilNetX trains."""
    return bool(latent_layers(model))
