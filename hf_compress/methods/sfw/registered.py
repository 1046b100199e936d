"""`sfw` in timm's registry of optimizers; imported by a hook when timm.optim is."""

from __future__ import annotations

from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry

from .factory import TimmSFW

default_registry.register(
    OptimInfo(
        "sfw",
        TimmSFW,
        "Stochastic Frank-Wolfe in regions with sparse, filter-sparse or low-rank vertices",
        has_momentum=True,
        has_eps=False,
    )
)
