"""How a checkpoint's bytes are written: dense as it is, in factors, as integers of 8 bits, or entropy-coded.

Layers in two factors and coded weights are named in config.json, and loaded where hf_compress is imported. Integers of
8 bits are written in the format `int-quantized` of compressed-tensors, which transformers reads by itself: for each
weight of a Linear layer int8 codes under its own name, and a column of scales under `weight_scale`.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..patterns import Coded, Grouped, LowRank, Pattern, Quantized
from ..patterns.quantized import quantize
from ..structure import factored_layers
from ..targets import Target, find_targets
from .coded import has_latents, last_part, save_coded

STORAGES = ("dense", "coded")  # that can be asked for; factors and integers of 8 bits are taken where they fit
_FORMAT = "int-quantized"


def save_model(
    model: Any,
    folder: Path,
    pattern: Pattern | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    storage: str | None = None,
    example_inputs: Any = None,
) -> str:
    """Save a model, in integers if it has been compressed to them and if transformers reads them back exactly.

    Args:
        model: with `save_pretrained` and `from_pretrained`.
        folder: a new or empty one.
        pattern: to which the model has been compressed, None for none.
        include: globs that it was compressed with.
        exclude: globs that it was compressed with.
        storage: "coded", which a model with latents always is, "dense" for plain tensors, None for what fits.
        example_inputs: see `save_coded`.

    Returns:
        The storage: "factored", "int8", "coded" or "dense".

    Raises:
        ValueError: as `save_coded`.
    """
    if storage == "coded" or has_latents(model):
        save_coded(model, folder, pattern, include, exclude, example_inputs)
        return "coded"
    if any(factored_layers(model)):
        if storage == "dense":
            raise ValueError(
                "layers in two factors have no plain form; compress the dense model with low_rank and storage dense"
            )
        model.save_pretrained(folder)
        return "factored"
    weights = integer_weights(model, pattern, include, exclude) if storage is None else {}
    if weights:
        _save_int8(model, weights, folder)
        if _reads_back(model, folder):
            return "int8"
        _say_dense(model)
        shutil.rmtree(folder)
    model.save_pretrained(folder)
    return "dense"


def changes_shapes(pattern: Pattern, remove: bool = False, storage: str | None = None) -> bool:
    """Whether a variant of this pattern is stored in smaller shapes: whether `compress` is to `remove`.

    Args:
        pattern: of the variant.
        remove: whether filters, neurons and heads are to be cut out; ranks are unless the storage is "dense".
        storage: see `save_model`.
    """
    return (isinstance(pattern, LowRank) and storage != "dense") or (remove and isinstance(pattern, Grouped))


def check_storage(storage: str | None, patterns: Sequence[Pattern]) -> None:
    """ValueError for a storage that is none, or that one of the patterns does not have."""
    if storage is not None and storage not in STORAGES:
        raise ValueError(f"storage is one of {', '.join(STORAGES)}, got {storage!r}")
    for pattern in patterns if storage == "coded" else ():
        if not isinstance(pattern, Coded) and not isinstance(last_part(pattern), Quantized):
            raise ValueError(
                f"storage coded is for whole numbers, which {pattern} does not give; add int8, as in {pattern}+int8"
            )


def integer_weights(
    model: nn.Module,
    pattern: Pattern | None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> dict[str, Target]:
    """The targets of a compressed model that can be written as integers: none, or all its linear ones.

    None, unless the pattern is int8 or ends with it, and the targets are weights of Linear layers, none tied to
    another. One convolution beside them, the patch embedding of a vision transformer, is no obstacle; it stays dense
    with its rounded values.
    """
    if last_part(pattern) != Quantized(8):
        return {}
    targets = find_targets(model, include, exclude)
    kinds = Counter(t.kind for t in targets.values())
    linear = {n: t for n, t in targets.items() if t.kind == "linear"}
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    is_tied = any(uses[id(t.parameter)] > 1 for t in linear.values())  # the format would store it twice
    return {} if kinds["conv1d"] or kinds["conv"] > 1 or is_tied else linear


def load_model(model_class: Any, folder: Path) -> Any:
    """`from_pretrained` in the dtype of the checkpoint, with integers decoded.

    Left alone, transformers decodes at the first forward pass of the whole model; until then the parts of the model
    cannot be called, and its parameters are codes.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config", {}).get("quant_method") != "compressed-tensors":
        return model_class.from_pretrained(folder, dtype="auto")
    from compressed_tensors.offload import as_single_threaded  # not inside: it opens stderr for its log

    with _without_progress_bars(), as_single_threaded():  # rank 0 may be the only one here
        model = model_class.from_pretrained(folder, dtype="auto")
        model.hf_quantizer.compressor.decompress_model(model)
    return model


def as_plain(model: Any) -> Any:
    """A loaded model whose parameters are plain weights: itself, or one without the integers of compressed-tensors."""
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is None:
        return model
    from compressed_tensors.offload import as_single_threaded

    with _without_progress_bars(), as_single_threaded():
        compressor.decompress_model(model)
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    plain, state = type(model)(config), model.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()}, assign=True)  # types may differ
    plain.tie_weights()
    if model.can_generate():
        plain.generation_config = model.generation_config
    return plain.train(model.training)


def count_scales(model: nn.Module) -> int:
    """Scales among the parameters of a loaded model: they are how weights are stored, no weights, and never zero."""
    quantized = [m for m in model.modules() if hasattr(m, "quantization_scheme")]
    return sum(p.numel() for m in quantized for n, p in m.named_parameters(recurse=False) if n == "weight_scale")


def _save_int8(model: Any, weights: dict[str, Target], folder: Path) -> None:
    # compressed-tensors would divide half-precision weights in their own type, and miss some codes by one.
    state = model.state_dict()
    for name, target in weights.items():
        codes, scales = quantize(target, 8)
        state[name] = codes.to(torch.int8)
        state[f"{name}_scale"] = scales.to(target.parameter.dtype)
    model.save_pretrained(folder, state_dict=state)
    _write_config(folder, _dense_layers(model, weights))


def _write_config(folder: Path, ignore: list[str]) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    grid = QuantizationArgs.model_validate({"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"})
    # Without a format of its own the group would be read as pack-quantized, the default for weights alone.
    group = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": grid, "format": _FORMAT})
    config = {"config_groups": {"group_0": group}, "format": _FORMAT, "quantization_status": "compressed"}
    compressor = ModelCompressor(QuantizationConfig.model_validate({**config, "ignore": ignore}))
    compressor.update_config(str(folder))


def _dense_layers(model: Any, weights: dict[str, Target]) -> list[str]:
    """Linear layers that stay dense, under their names in the model and, for loaders of it, in its backbone."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and f"{n}.weight" not in weights]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return list(dict.fromkeys([*names, *(n.removeprefix(prefix) for n in names)]))


@torch.no_grad()
def _reads_back(model: Any, folder: Path) -> bool:
    """Whether every Linear layer has the weights of `model` when transformers loads the folder."""
    try:
        loaded = load_model(type(model), folder)
    except (RuntimeError, ValueError, KeyError):
        return False
    layers = dict(loaded.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and isinstance(weight := module._parameters.get("weight"), torch.Tensor):
            found = layers[name].weight.to(weight.device)
            if not found.is_floating_point() or not torch.equal(found, weight.to(found.dtype)):
                return False
    return True


def _say_dense(model: Any) -> None:
    from transformers.utils import logging

    logging.get_logger(__name__).warning(
        f"transformers does not read {type(model).__name__} back from {_FORMAT} as it was (known for mixtures of "
        "experts and for float64): its rounded values are saved dense"
    )


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """compressed-tensors draws four for every checkpoint; whatever else is written comes through at the end."""
    written = io.StringIO()
    try:
        with redirect_stderr(written):
            yield
    finally:
        for line in written.getvalue().split("\n"):
            if line and "\r" not in line:
                print(line, file=sys.stderr)
