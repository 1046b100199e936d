"""Checkpoints with changed layers or coded weights: the model gets its layers before the weights come, and is plain
afterwards."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from ..codec import Groups, Latents, decode_all, read_groups, weights_of
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

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if self._coded is not None:
            refuse_offload(device_map, "decoded", "")

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                "layers of a checkpoint with changed shapes cannot be dealt to processes by from_pretrained"
            )
        architectures = model.config.architectures or [type(model).__name__]
        prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
        is_whole = type(model).__name__ in architectures
        try:
            if self._layers is not None:
                rebuild(model, self._layers, prefix, is_whole=is_whole)
            if self._coded is not None:
                self._names = coded_names(model, self._coded, prefix, is_whole)
                self._groups = _groups_in(checkpoint_files or [])
        except ValueError as error:
            raise ValueError(f"the quantization_config of this checkpoint is wrong ({error}), or {UPGRADE}") from error
        if self._names:
            known = model._keys_to_ignore_on_load_unexpected or ()
            model._keys_to_ignore_on_load_unexpected = {*known, rf"(^|\.){re.escape(GROUPS)}$"}

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
        """Adds one conversion for every coded weight, under its name in the model."""
        own = []
        prefix = f"{model.base_model_prefix}." if model is not None and model.base_model_prefix else ""
        for name in self._names:
            inner = name.removeprefix(prefix)  # the same pattern fits with and without it
            own.append(
                WeightConverter([re.escape(inner)], [inner], [_Collect(self._blobs, self._found)], force_cpu=True)
            )
        return [*weight_conversions, *own]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._names:
            conversions = vars(model).get("_weight_conversions") or []
            model._weight_conversions = [c for c in conversions if not _is_ours(c)]
            self._decode(model)
        write_description(model)
        return model

    @torch.no_grad()
    def _decode(self, model: Any) -> None:
        """Write the weights of all blobs."""
        if lacking := [name for name in self._names if name not in self._found]:
            raise ValueError(
                f"this checkpoint lacks {len(lacking)} of its coded weights, first {lacking[0]}; download it again"
            )
        parameters = dict(model.named_parameters())
        shapes = {name: tuple(parameters[name].shape) for name in self._blobs}
        count = sum(parameters[name].numel() for name in self._blobs)
        processes = min(os.cpu_count() or 1, len(self._blobs)) if count >= _MANY else 1
        try:
            if self._groups is None:
                raise ValueError(f"its file has no {GROUPS}")
            groups = read_groups(self._groups)
            for name, latents in decode_all(self._blobs, self._groups, shapes, processes):
                parameters[name].copy_(_weight(latents, groups))
        except ValueError as error:
            raise ValueError(f"this checkpoint cannot be decoded: {error}; download it again, or {UPGRADE}") from error
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
        if tensor.dtype != torch.uint8 or tensor.ndim != 1:  # of a plain checkpoint that keeps this config
            return {target_patterns[0]: tensor.to(parameter.dtype)}
        self._blobs[name] = tensor.cpu().numpy().tobytes()
        return {target_patterns[0]: torch.empty(parameter.shape, dtype=parameter.dtype)}


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
    there, found = find_targets(model, include=["*"]), []
    for name in weights:
        known = [n for n in (name, name.removeprefix(prefix), prefix + name) if n in there]
        if known and known[0] not in found:
            found.append(known[0])
        elif known or is_whole:
            raise ValueError(f"{name!r} is {'named twice' if known else 'no weight of this model'}")
    return found


def _groups_in(files: list[str]) -> bytes | None:
    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="np") as content:
                if GROUPS in content.keys():  # noqa: SIM118, it is no mapping
                    return bytes(content.get_tensor(GROUPS).astype(np.uint8, copy=False).tobytes())
    return None


def _weight(latents: Latents, groups: Groups) -> torch.Tensor:
    return torch.from_numpy(weights_of(latents, groups.decoders[latents.group]))


def _is_ours(conversion: Any) -> bool:
    return any(isinstance(operation, _Collect) for operation in getattr(conversion, "operations", ()))
