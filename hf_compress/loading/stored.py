"""Checkpoints with changed layers or coded weights: the model gets its layers before the weights come, and is plain
afterwards."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from ..codec import CodecError, Groups, Latents, decode_all, read_groups, weights_of
from ..codec.container import MAGIC
from ..codec.container import VERSION as BLOB_VERSION
from ..codec.fields import Reader
from ..structure import rebuild, write_description
from ..targets import find_targets
from .base import Loader, refuse_offload
from .config import UPGRADE, StoredConfig

GROUPS = "hf_compress.groups"  # the tensor that holds decoders and tables of all coded weights
VERSION = 1
_MANY = 1 << 25  # latents that are worth the start of other processes


class Rebuilder(Loader):
    """See the module."""

    def __init__(self, quantization_config: StoredConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "layers and coded describe a stored checkpoint, which this is not; to prune it give a pattern"
            )
        self._layers, self._coded = quantization_config.layers, quantization_config.coded
        self._names: list[str] = []  # of coded weights of this model
        self._blobs: dict[str, bytes] = {}
        self._found: set[str] = set()  # those that the file has, also as plain tensors
        self._groups: bytes | None = None
        self._ignored: Any = None  # keys that the model ignored before

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if self._coded is not None:
            refuse_offload(device_map, "decoded", "")

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            what = "coded weights" if self._layers is None else "layers of a checkpoint with changed shapes"
            raise ValueError(f"{what} cannot be dealt to processes by from_pretrained")
        architectures = model.config.architectures or [type(model).__name__]
        prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
        is_whole = type(model).__name__ in architectures
        try:
            if self._layers is not None:
                rebuild(model, self._layers, prefix, is_whole=is_whole)
            if self._coded is not None:
                self._names = coded_names(model, self._coded, prefix, is_whole)
        except ValueError as error:
            raise ValueError(f"the quantization_config of this checkpoint is wrong ({error}), or {UPGRADE}") from error
        if self._coded is not None:
            with _explained():
                self._groups = _groups_in(checkpoint_files or [])
            self._ignored = model._keys_to_ignore_on_load_unexpected
            model._keys_to_ignore_on_load_unexpected = {*(self._ignored or ()), rf"(^|\.){re.escape(GROUPS)}$"}

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
        """Adds one conversion for every coded weight, under its name in the model."""
        own = []
        prefix = f"{model.base_model_prefix}." if model is not None and model.base_model_prefix else ""
        for name in self._names:
            inner = name.removeprefix(prefix)  # the same pattern fits with and without it
            own.append(WeightConverter([re.escape(inner)], [inner], [_Collect(self._blobs, self._found)]))
        return [*weight_conversions, *own]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._coded is not None:
            model._keys_to_ignore_on_load_unexpected = self._ignored
            conversions = vars(model).get("_weight_conversions") or []
            model._weight_conversions = [c for c in conversions if not _is_ours(c)]
            with _explained():
                self._decode(model)
        write_description(model)
        return model

    @torch.no_grad()
    def _decode(self, model: Any) -> None:
        """Write the weights of all blobs."""
        if lacking := [name for name in self._names if name not in self._found]:
            raise ValueError(f"it lacks {len(lacking)} of its coded weights, first {lacking[0]}")
        if not self._blobs:
            return
        parameters = {name: model.get_parameter(name) for name in self._blobs}
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        count = sum(parameter.numel() for parameter in parameters.values())
        processes = min(os.cpu_count() or 1, len(self._blobs)) if count >= _MANY else 1
        if self._groups is None:
            raise ValueError(f"there are coded weights, and no file with {GROUPS}")
        groups = read_groups(self._groups)
        for name, latents in decode_all(self._blobs, self._groups, shapes, processes):
            parameters[name].copy_(_weight(latents, groups))
        self._blobs.clear()


class _Collect(ConversionOps):
    """Keeps the bytes of a weight, and gives it room; all are decoded when all are there."""

    hf_quantizer = True  # tells transformers to leave the type that the bytes have

    def __init__(self, blobs: dict[str, bytes], found: set[str]) -> None:
        self._blobs, self._found = blobs, found

    def __deepcopy__(self, memo: Any) -> _Collect:
        return self

    @property
    def reverse_op(self) -> ConversionOps:
        raise RuntimeError("a coded weight is plain once it is loaded")

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers calls it: {name: tensor of the file} to {name: tensor of the model}."""
        found = next(iter(input_dict.values()))
        tensor: torch.Tensor = found[0] if isinstance(found, list) else found
        name: str = kwargs["full_layer_name"]
        parameter = kwargs["model"].get_parameter(name)
        self._found.add(name)
        if tensor.device.type == "meta":
            return {target_patterns[0]: torch.empty_like(parameter)}
        if tensor.dtype != torch.uint8 or tensor.ndim != 1:  # of a plain checkpoint that keeps this config
            return {target_patterns[0]: tensor.to(parameter.dtype)}
        blob = tensor.cpu().numpy().tobytes()
        shape = _stored_shape(blob) or parameter.shape
        if shape != parameter.shape:  # transformers says so, or makes a new weight where the user allows it
            return {target_patterns[0]: torch.empty(shape, device="meta")}
        self._blobs[name] = blob
        return {target_patterns[0]: torch.empty(shape, dtype=parameter.dtype, device=tensor.device)}


def coded_names(model: nn.Module, coded: Any, prefix: str = "", is_whole: bool = True) -> list[str]:
    """The weights of a model that config.json calls coded; nothing of it is trusted.

    Args:
        model: as its config makes it.
        coded: see `StoredConfig`.
        prefix: see `structure.rebuild`.
        is_whole: see `structure.rebuild`.

    Raises:
        ValueError: for anything that we do not write.
    """
    if not isinstance(coded, dict) or coded.keys() != {"version", "weights"} or coded["version"] != VERSION:
        raise ValueError(f'coded is {{"version": {VERSION}, "weights": [...]}}, got {coded!r:.80}')
    weights = coded["weights"]
    if not isinstance(weights, list) or not all(isinstance(name, str) for name in weights):
        raise ValueError("the names of coded weights are no list of texts")
    there = find_targets(model, include=["*"])
    found: dict[str, None] = {}
    for name in weights:
        known = [n for n in (name, name.removeprefix(prefix), prefix + name) if n in there]
        if known and known[0] not in found:
            found[known[0]] = None
        elif known or is_whole:
            raise ValueError(f"{name!r} is {'named twice' if known else 'no weight of this model'}")
    return list(found)


@contextmanager
def _explained() -> Iterator[None]:
    """Tells a user what a file is wrong for, and what to do."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"this checkpoint cannot be decoded: {error}; download it again, or {UPGRADE}") from error


def _groups_in(files: list[str]) -> bytes | None:
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        try:
            with safe_open(file, framework="pt") as content:
                if GROUPS in content.keys():  # noqa: SIM118, it is no mapping
                    tensor = content.get_tensor(GROUPS)
                    if tensor.dtype != torch.uint8 or tensor.ndim != 1:
                        raise ValueError(f"{GROUPS} is {tensor.dtype} of shape {tuple(tensor.shape)}, not bytes")
                    return bytes(tensor.numpy().tobytes())
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error})") from error
    return None


def _stored_shape(blob: bytes) -> tuple[int, ...] | None:
    """Of the weight that a blob is of; None for damaged bytes, which the decoder refuses."""
    try:
        reader = Reader(blob, MAGIC, BLOB_VERSION)
        ndim = reader.unpack("BBB", "the header")[1]
        return reader.unpack(f"{ndim}I", "the dimensions")
    except CodecError:
        return None


def _weight(latents: Latents, groups: Groups) -> torch.Tensor:
    return torch.from_numpy(weights_of(latents, groups.decoders[latents.group]))


def _is_ours(conversion: Any) -> bool:
    return any(isinstance(operation, _Collect) for operation in getattr(conversion, "operations", ()))
