"""Checkpoints that need us, through transformers' quantizer registry.

`HfCompressConfig`, given to `from_pretrained`, prunes while loading; nothing of it is left in the model. Checkpoints
with changed layers or coded weights say so in the `quantization_config` of their config.json, and get them back.
Importing this package registers both.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from .base import Loader
from .config import METHOD, HfCompressConfig, StoredConfig
from .prune import Pruner
from .stored import GROUPS, VERSION, Rebuilder

__all__ = ["GROUPS", "VERSION", "HfCompressConfig", "StoredConfig"]


class _Either(Loader):
    """What transformers makes for both kinds of config."""

    def __new__(cls, quantization_config: Any, **kwargs: Any) -> Any:
        kind = Rebuilder if isinstance(quantization_config, StoredConfig) else Pruner
        return kind(quantization_config, **kwargs)


for registry in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
    registry.pop(METHOD, None)  # a reload runs this file again
register_quantization_config(METHOD)(HfCompressConfig)
register_quantizer(METHOD)(_Either)
