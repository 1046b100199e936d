"""Pruning while a checkpoint is loaded, which then leaves no trace."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import logging

from ..calibration import batch_norm_statistics
from ..oneshot import compress
from ..patterns import parse_pattern
from ..targets import find_targets
from .base import Loader, refuse_offload
from .config import METHOD, UPGRADE, HfCompressConfig
from .statistics import StatisticsPack, explained, find_pack, renew_

logger = logging.get_logger(__name__)


class Pruner(Loader):
    """Keeps targets in their stored type while they are loaded, compresses them, and casts them then."""

    def __init__(self, quantization_config: HfCompressConfig, pre_quantized: bool = True, **kwargs: Any) -> None:
        if pre_quantized:
            raise ValueError(f"this checkpoint is stored with quant_method {METHOD!r}, and {UPGRADE}")
        # The checkpoint is not, but transformers asks `get_new_dtype` of those that are.
        super().__init__(quantization_config, pre_quantized=True, **kwargs)
        self._pattern = quantization_config.pattern
        self._globs = (quantization_config.include, quantization_config.exclude)
        self._targets: set[str] = set()
        self._dtypes: dict[str, torch.dtype] = {}  # name of a parameter to the type that it ends in
        self._is_lent = False
        self._pack: StatisticsPack | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        refuse_offload(device_map, "pruned", " and this quantization_config")

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                "weights that are dealt to several processes cannot be pruned while they are loaded; load with this "
                "quantization_config on one process, save_pretrained(folder), and load that folder on all"
            )
        self._targets = set(find_targets(model, *self._globs))
        self._dtypes = {name: p.dtype for name, p in model.named_parameters(remove_duplicate=False)}
        if batch_norm_statistics(model):
            self._pack = find_pack(model, checkpoint_files)

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
        if problem := renew_(model, parse_pattern(self._pattern), self._pack, self._globs):
            logger.warning(explained(problem))
        return model
