"""LilNetX: weights decoded from whole numbers whose entropy, and so whose file, is part of the loss.

Girish et al., ICLR 2023 (arXiv 2204.02965). `reparametrize`, `rate_bits`, the priors and `bake` need nothing but torch:

```python
reparametrize(model)
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
rate_optimizer = torch.optim.Adam([p for each in entropy_models(model) for p in each.parameters()], 1e-3)
(loss(model) + 0.1 * rate_bits(model) / latent_count(model)).backward()
bake(model)  # after the training
```

`LilNetXTrainer` and `LilNetXConfig` stand for transformers' `Trainer` and `TrainingArguments`; `LilNetXMixin` joins a
Trainer of your own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .entropy_model import EntropyModel, entropy_models, fit_entropy_models, latent_count, rate_bits
from .parametrization import Decoded, Decoder, bake, decoders_of, integers, latent_layers, reparametrize
from .priors import l2_prior, slice_prior, slice_sparsity

__all__ = [
    "Decoded",
    "Decoder",
    "EntropyModel",
    "LilNetXConfig",
    "LilNetXMixin",
    "LilNetXTrainer",
    "bake",
    "decoders_of",
    "entropy_models",
    "fit_entropy_models",
    "integers",
    "l2_prior",
    "latent_count",
    "latent_layers",
    "rate_bits",
    "reparametrize",
    "slice_prior",
    "slice_sparsity",
]

if TYPE_CHECKING:
    from .config import LilNetXConfig as LilNetXConfig
    from .trainer import LilNetXMixin as LilNetXMixin
    from .trainer import LilNetXTrainer as LilNetXTrainer

_ROOM_OF = {"LilNetXConfig": "config", "LilNetXMixin": "trainer", "LilNetXTrainer": "trainer"}


def __getattr__(name: str) -> Any:  # a bare PyTorch loop never loads transformers
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ROOM_OF[name]}", __name__), name)
