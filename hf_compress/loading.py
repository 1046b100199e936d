"""Checkpoints that need us, through transformers' quantizer registry.

`HfCompressConfig`, given to `from_pretrained`, prunes while loading; nothing of it is left in the model. Checkpoints
with changed layers name these in the `quantization_config` of their config.json, and get them back. Importing this
file registers both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .oneshot import compress
from .patterns import Pattern, parse_pattern
from .structure import rebuild, write_description
from .targets import find_targets

_METHOD = "hf_compress"
_UPGRADE = "a newer hf_compress wrote it: pip install --upgrade hf_compress"

logger = logging.get_logger(__name__)


@dataclass
class HfCompressConfig(QuantizationConfigMixin):
    """Prunes a checkpoint while `from_pretrained` loads it, which takes this as `quantization_config`.

    Selects on the weights as they are stored, before `dtype` casts them, and gives the model that `compress` makes of
    the checkpoint loaded in its stored type. It is then a plain model: `.half()`, `Trainer` and `save_pretrained` do
    what they always do, and a saved copy needs no hf_compress. While loading, targets take the memory of their stored
    type. Weights that the checkpoint lacks are new, as transformers warns, and pruned like the others where they are
    targets; heads of transformers models are none. Batch-norm statistics stay: see `recalibrate_batch_norm`.

    `from_pretrained` raises ValueError for a glob that matches nothing, a model without targets, a NaN weight, a
    `device_map` that offloads, and a checkpoint that is quantized already.

    Args:
        pattern: such as "unstructured:0.8" or "2:4"; kept as its canonical text.
        include: globs on names of weights, see `find_targets`.
        exclude: globs on names of weights, see `find_targets`.

    Raises:
        ValueError: for a wrong pattern, as `parse_pattern`, or a glob that is no text.
    """

    # Tells transformers to leave a plain model behind, with a plain config.
    dequantize = True

    quant_method: str = field(init=False, repr=False)  # type: ignore[assignment]
    pattern: str | Pattern
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self.quant_method = _METHOD
        self.pattern = str(parse_pattern(self.pattern))
        self.include, self.exclude = _glob_list("include", self.include), _glob_list("exclude", self.exclude)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config that `to_dict` wrote.

        Raises:
            ValueError: for other fields, which a checkpoint has that a newer version stored.
        """
        fields = {name: value for name, value in config_dict.items() if name != "quant_method"}
        if fields.keys() == {"layers"}:
            return StoredLayersConfig.from_dict(fields, return_unused_kwargs, **kwargs)
        if "pattern" not in fields or not fields.keys() <= {"pattern", "include", "exclude"}:
            raise ValueError(
                f"a {cls.__name__} has the fields pattern, include and exclude, got {sorted(fields)}; if these are "
                f"the quantization_config of a checkpoint, {_UPGRADE}"
            )
        return super().from_dict(fields, return_unused_kwargs, **kwargs)


def _glob_list(option: str, globs: Any) -> list[str] | None:
    if globs is None:
        return None
    found = [globs] if isinstance(globs, str) else list(globs)
    if not all(isinstance(glob, str) for glob in found):
        raise ValueError(f"{option} is a list of globs on names of weights, got {globs!r}")
    return found


@dataclass
class StoredLayersConfig(QuantizationConfigMixin):
    """What config.json says of a checkpoint whose layers differ from those of its architecture.

    Args:
        layers: as `structure.describe` gives it; the loader checks it against the model.
    """

    dequantize = True

    quant_method: str = field(init=False, repr=False)  # type: ignore[assignment]
    layers: Any

    def __post_init__(self) -> None:
        self.quant_method = _METHOD


class _Loader(HfQuantizer):
    """What transformers makes for both kinds of config."""

    def __new__(cls, quantization_config: Any, **kwargs: Any) -> Any:
        return super().__new__(_Rebuilder if isinstance(quantization_config, StoredLayersConfig) else _Pruner)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def remove_quantization_config(self, model: Any) -> None:
        """As of every loader, but the names that the checkpoint gave to weights are still those of a save."""
        names_on_disk = vars(model).get("_weight_conversions")
        super().remove_quantization_config(model)
        if names_on_disk is not None:  # transformers 5.24 forgets them
            model._weight_conversions = names_on_disk


class _Pruner(_Loader):
    """Keeps targets in their stored type while they are loaded, compresses them, and casts them then."""

    def __init__(self, quantization_config: HfCompressConfig, pre_quantized: bool = True, **kwargs: Any) -> None:
        if pre_quantized:
            raise ValueError(f"this checkpoint is stored with quant_method {_METHOD!r}, and {_UPGRADE}")
        # The checkpoint is not, but transformers asks `get_new_dtype` of those that are.
        super().__init__(quantization_config, pre_quantized=True, **kwargs)
        self._pattern = quantization_config.pattern
        self._globs = (quantization_config.include, quantization_config.exclude)
        self._targets: set[str] = set()
        self._dtypes: dict[str, torch.dtype] = {}  # name of a parameter to the type that it ends in
        self._is_lent = False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in devices or (len(devices) > 1 and "cpu" in devices):
            raise ValueError(
                f"device_map puts weights on {', '.join(sorted(devices))}; offloaded weights cannot be pruned. "
                "Load with device_map='cpu' and this quantization_config, save_pretrained(folder), and load that "
                "folder with the device_map"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                "weights that are dealt to several processes cannot be pruned while they are loaded; load with this "
                "quantization_config on one process, save_pretrained(folder), and load that folder on all"
            )
        self._targets = set(find_targets(model, *self._globs))
        self._dtypes = {name: p.dtype for name, p in model.named_parameters(remove_duplicate=False)}

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        dtype = super().get_new_dtype(converter, param, dtype)
        if dtype is None:
            return None
        self._is_lent |= isinstance(param, torch.Tensor)
        if getattr(converter, "operations", None):  # it makes several weights of one, or one of several
            return None
        name = converter.target_patterns[0]
        self._dtypes[name] = dtype
        return None if name in self._targets else dtype

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in model.modules():  # some have a copy of the config
            config: Any = getattr(module, "config", None)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
        parameters = dict(model.named_parameters())
        homes = {name: parameter.device for name, parameter in parameters.items()}
        if len(set(homes.values())) > 1:  # weights of all devices are compared with each other
            for parameter in parameters.values():
                parameter.data = parameter.data.cpu()
        elif self._is_lent:  # by the caller's state_dict
            for parameter in parameters.values():
                parameter.data = parameter.data.clone()
        report = compress(model, self._pattern, *self._globs)
        for name, parameter in parameters.items():
            dtype = self._dtypes.get(name) if parameter.is_floating_point() else None
            parameter.data = parameter.data.to(homes[name], dtype)
        if report.skipped:
            name, reason = next(iter(report.skipped.items()))
            logger.warning(
                f"{report.pattern} left {len(report.skipped)} of {len(report.layers)} weights dense, "
                f"{name} for one: {reason}"
            )
        return model

    # Loaded models keep no quantizer that could be asked.


class _Rebuilder(_Loader):
    """Gives the model the layers of its checkpoint before the weights come; it is a plain model then."""

    def __init__(self, quantization_config: StoredLayersConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError("layers describe a stored checkpoint, which this is not; to prune it give a pattern")
        self._layers = quantization_config.layers

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                "layers of a checkpoint with changed shapes cannot be dealt to processes by from_pretrained"
            )
        architectures = model.config.architectures or [type(model).__name__]
        prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
        try:
            rebuild(model, self._layers, prefix, is_whole=type(model).__name__ in architectures)
        except ValueError as error:
            raise ValueError(f"the quantization_config of this checkpoint is wrong ({error}), or {_UPGRADE}") from error

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        write_description(model)
        return model


for registry in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
    registry.pop(_METHOD, None)  # a reload runs this file again
register_quantization_config(_METHOD)(HfCompressConfig)
register_quantizer(_METHOD)(_Loader)
