"""Train transformers and timm models so that they can be pruned afterwards in one shot.

Importing this package is cheap: public names are loaded when they are first used. Hooks register what timm and
transformers lack when those are imported (at once if they are loaded already): models, an optimizer, and the loader of
checkpoints that are compressed, or to be compressed while they are read.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

__version__ = "0.1.0"

_PUBLIC = {
    "patterns": (
        *("NM", "Chain", "Filters", "Heads", "LowRank", "Neurons", "Pattern", "Quantized", "Unstructured"),
        "parse_pattern",
    ),
    "targets": ("Target", "find_targets"),
    "calibration": ("recalibrate_batch_norm",),
    "oneshot": ("CompressionReport", "LayerReport", "compress"),
    "loading": ("HfCompressConfig",),
    "family": ("Family", "Variant", "build_family", "load_family", "save_coded"),
    "training": ("CompressionArguments", "CompressionMixin"),
    "callbacks": ("GradualPruning", "SparsityLock", "merge_lora"),
    "methods.cram": ("CrAM", "CrAMConfig", "CrAMMixin", "CrAMTrainer"),
    "tasks.spans": ("Answer", "answer"),
    "methods.sfw": ("SFW", "SFWConfig", "SFWMixin", "SFWTrainer", "create_sfw"),
    "methods.lilnetx": ("LilNetXConfig", "LilNetXMixin", "LilNetXTrainer", "bake", "rate_bits", "reparametrize"),
    "methods.tpp": ("TPPConfig", "TPPMixin", "TPPTrainer", "TrainabilityPenalty", "mean_jacobian_singular_value"),
}
_ROOM_OF = {name: room for room, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *sorted(_ROOM_OF)]

if TYPE_CHECKING:
    from .calibration import recalibrate_batch_norm as recalibrate_batch_norm
    from .callbacks import GradualPruning as GradualPruning
    from .callbacks import SparsityLock as SparsityLock
    from .callbacks import merge_lora as merge_lora
    from .family import Family as Family
    from .family import Variant as Variant
    from .family import build_family as build_family
    from .family import load_family as load_family
    from .family import save_coded as save_coded
    from .loading import HfCompressConfig as HfCompressConfig
    from .methods.cram import CrAM as CrAM
    from .methods.cram import CrAMConfig as CrAMConfig
    from .methods.cram import CrAMMixin as CrAMMixin
    from .methods.cram import CrAMTrainer as CrAMTrainer
    from .methods.lilnetx import LilNetXConfig as LilNetXConfig
    from .methods.lilnetx import LilNetXMixin as LilNetXMixin
    from .methods.lilnetx import LilNetXTrainer as LilNetXTrainer
    from .methods.lilnetx import bake as bake
    from .methods.lilnetx import rate_bits as rate_bits
    from .methods.lilnetx import reparametrize as reparametrize
    from .methods.sfw import SFW as SFW
    from .methods.sfw import SFWConfig as SFWConfig
    from .methods.sfw import SFWMixin as SFWMixin
    from .methods.sfw import SFWTrainer as SFWTrainer
    from .methods.sfw import create_sfw as create_sfw
    from .methods.tpp import TPPConfig as TPPConfig
    from .methods.tpp import TPPMixin as TPPMixin
    from .methods.tpp import TPPTrainer as TPPTrainer
    from .methods.tpp import TrainabilityPenalty as TrainabilityPenalty
    from .methods.tpp import mean_jacobian_singular_value as mean_jacobian_singular_value
    from .oneshot import CompressionReport as CompressionReport
    from .oneshot import LayerReport as LayerReport
    from .oneshot import compress as compress
    from .patterns import NM as NM
    from .patterns import Chain as Chain
    from .patterns import Filters as Filters
    from .patterns import Heads as Heads
    from .patterns import LowRank as LowRank
    from .patterns import Neurons as Neurons
    from .patterns import Pattern as Pattern
    from .patterns import Quantized as Quantized
    from .patterns import Unstructured as Unstructured
    from .patterns import parse_pattern as parse_pattern
    from .targets import Target as Target
    from .targets import find_targets as find_targets
    from .tasks.spans import Answer as Answer
    from .tasks.spans import answer as answer
    from .training import CompressionArguments as CompressionArguments
    from .training import CompressionMixin as CompressionMixin


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'hf_compress' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_ROOM_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


@wrapt.when_imported("timm.optim")
def _register_optimizers(_: Any) -> None:
    importlib.import_module(".methods.sfw.registered", __name__)


@wrapt.when_imported("timm.models")
def _register_models(_: Any) -> None:
    importlib.import_module(".models", __name__)


@wrapt.when_imported("transformers.quantizers")
def _register_loader(_: Any) -> None:
    importlib.import_module(".loading", __name__)
