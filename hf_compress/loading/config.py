"""What `from_pretrained` is told: to prune a checkpoint, or how a stored one differs from its architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..patterns import Pattern, parse_pattern

METHOD = "hf_compress"
UPGRADE = "a newer hf_compress wrote it: pip install --upgrade hf_compress"


@dataclass
class HfCompressConfig(QuantizationConfigMixin):
    """Prunes a checkpoint while `from_pretrained` loads it, which takes this as `quantization_config`.

    Selects on the weights as they are stored, before `dtype` casts them, and gives the model that `compress` makes of
    the checkpoint loaded in its stored type. It is then a plain model: `.half()`, `Trainer` and `save_pretrained` do
    what they always do, and a saved copy needs no hf_compress. While loading, targets take the memory of their stored
    type. Weights that the checkpoint lacks are new, as transformers warns, and pruned like the others where they are
    targets; heads of transformers models are none. Batch norms get the statistics that a family stores for the
    pattern; where there are none they stay, with a warning: see `recalibrate_batch_norm`.

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
        self.quant_method = METHOD
        self.pattern = str(parse_pattern(self.pattern))
        self.include, self.exclude = _glob_list("include", self.include), _glob_list("exclude", self.exclude)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config that `to_dict` wrote.

        Raises:
            ValueError: for other fields, which a checkpoint has that a newer version stored.
        """
        fields = {name: value for name, value in config_dict.items() if name != "quant_method"}
        if fields and fields.keys() <= {"layers", "coded"}:
            return StoredConfig.from_dict(fields, return_unused_kwargs, **kwargs)
        if "pattern" not in fields or not fields.keys() <= {"pattern", "include", "exclude"}:
            raise ValueError(
                f"a {cls.__name__} has the fields pattern, include and exclude, got {sorted(fields)}; if these are "
                f"the quantization_config of a checkpoint, {UPGRADE}"
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
class StoredConfig(QuantizationConfigMixin):
    """What config.json says of a checkpoint that only we can load; the loader checks all of it against the model.

    Args:
        layers: that differ from those of the architecture, as `structure.describe` gives them.
        coded: {"version": 1, "weights": [...]}, the names of weights that are stored as entropy-coded whole numbers.
    """

    dequantize = True

    quant_method: str = field(init=False, repr=False)  # type: ignore[assignment]
    layers: Any = None
    coded: Any = None

    def __post_init__(self) -> None:
        self.quant_method = METHOD
