"""Batch-norm statistics of compressed weights, stored beside the dense checkpoint: pruning on load needs no data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file

from ..calibration import batch_norm_statistics
from ..patterns import Chain, Pattern, Quantized, Unstructured
from .base import IF_THERE

STATISTICS = "batch_norm.safetensors"
AS_TRAINED = Unstructured(0.0)  # the name under which the statistics of the dense weights stand
_AS_TRAINED = "batch norms keep the statistics of the dense weights"
_SCHEMA = "1"
_UNLIKE = 0.02  # relative; half precision rounds by 0.004


@dataclass(frozen=True)
class StatisticsPack:
    """Running means and variances for patterns.

    Attributes:
        tensors: canonical text of a pattern to name of a buffer to its value; `AS_TRAINED` is among them.
        include: the globs that targets were chosen with.
        exclude: the globs that targets were chosen with.
    """

    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None

    def save(self, folder: Path) -> None:
        """Write `batch_norm.safetensors`; float32, some kilobytes a pattern.

        Raises:
            OSError: if the disk is full.
        """
        flat = {
            f"{pattern} {name}": tensor.detach().float().cpu().contiguous()
            for pattern, named in self.tensors.items()
            for name, tensor in named.items()
        }
        globs = {key: json.dumps(getattr(self, key)) for key in ("include", "exclude")}
        try:
            save_file(flat, folder / STATISTICS, metadata={"format": "pt", "schema": _SCHEMA, **globs})
        except SafetensorError as error:  # which is no OSError, whatever the system said
            raise OSError(f"cannot write {folder}: {error}") from error

    @classmethod
    def read(cls, path: Path) -> StatisticsPack:
        """What `save` wrote.

        Raises:
            ValueError: for a file that is damaged, or no such pack.
        """
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        try:
            with safe_open(path, framework="pt") as content:
                facts = content.metadata() or {}
                if facts.get("schema") != _SCHEMA:
                    raise ValueError(f"its schema is not {_SCHEMA}")
                for key in content.keys():  # noqa: SIM118, it is no mapping
                    pattern, _, name = key.partition(" ")
                    tensors.setdefault(pattern, {})[name] = content.get_tensor(key)
            globs = [json.loads(facts.get(key, "null")) for key in ("include", "exclude")]
        except (SafetensorError, ValueError, OSError, RecursionError) as error:
            raise ValueError(f"{path.name} of this checkpoint cannot be read ({error}): download it again") from error
        return cls(tensors, *globs)

    def of(self, pattern: Pattern) -> dict[str, torch.Tensor] | None:
        """The statistics of a pattern; None where they are not known.

        Rounding at the end of a chain hardly moves them: without their own they are those of what comes before it.
        Between two shares that are stored, of unstructured patterns, both are mixed linearly, and those of the dense
        weights count as a share of 0. Above the largest share there are none. The mix can cost points of accuracy
        at high shares: see recipes/benchmarks/slider_statistics.py.
        """
        exact = self.tensors.get(str(pattern))
        if exact is not None:
            return dict(exact)
        if isinstance(pattern, Chain) and isinstance(pattern.parts[-1], Quantized):
            rest = pattern.parts[:-1]
            return self.of(rest[0] if len(rest) == 1 else Chain(rest))
        if not isinstance(pattern, Unstructured):
            return None
        known = {share: named for text, named in self.tensors.items() if (share := _share(text, pattern)) is not None}
        known.setdefault(0.0, self.tensors.get(str(AS_TRAINED), {}))
        below = max((share for share in known if share < pattern.share), default=None)
        above = min((share for share in known if share > pattern.share), default=None)
        if below is None or above is None:
            return None
        weight = (pattern.share - below) / (above - below)
        low, high = known[below], known[above]
        return {name: torch.lerp(low[name], high[name], weight) for name in low.keys() & high.keys()}


def _share(text: str, like: Unstructured) -> float | None:
    """The share of an unstructured pattern with the scope of another one."""
    try:
        pattern = Unstructured.parse(text)
    except ValueError:
        return None
    return pattern.share if pattern is not None and pattern.scope == like.scope else None


def find_pack(model: Any, checkpoint_files: Sequence[str] | None) -> StatisticsPack | None:
    """The pack beside the files that a model is loaded from, downloaded if need be; None if there is none.

    Raises:
        ValueError: as `StatisticsPack.read`.
    """
    if not checkpoint_files:
        return None
    folder = Path(checkpoint_files[0]).parent
    for place in (folder, folder.parent, folder / "_family"):  # beside dense/, and where a Trainer leaves its family
        if (place / STATISTICS).is_file():
            return StatisticsPack.read(place / STATISTICS)
    if "snapshots" not in folder.parts:  # of a folder, not of the cache of the Hub
        return None
    at = len(folder.parts) - 1 - folder.parts[::-1].index("snapshots")
    found = cached_file(
        model.config._name_or_path,
        STATISTICS,
        revision=folder.parts[at + 1],
        cache_dir=Path(*folder.parts[: at - 1]),
        subfolder="/".join(folder.parts[at + 2 :]),
        **IF_THERE,
    )
    return StatisticsPack.read(Path(found)) if found else None


def explained(problem: str) -> str:
    """What `renew_` says, with what to do."""
    return f"{problem}; that can cost accuracy, and hf_compress.recalibrate_batch_norm(model, training_batches) helps"


@torch.no_grad()
def renew_(model: Any, pattern: Pattern, pack: StatisticsPack | None, globs: tuple[Any, Any]) -> str | None:
    """Give the batch norms of a compressed model the statistics of its pattern.

    Args:
        model: with the statistics of its dense checkpoint.
        pattern: to which it was compressed.
        pack: of that checkpoint.
        globs: include and exclude that it was compressed with.

    Returns:
        What is wrong with them now: None where they are those of the pattern.

    Raises:
        ValueError: for a pack that does not fit the model; nothing has changed then.
    """
    buffers = batch_norm_statistics(model)
    if not buffers or getattr(pattern, "share", None) == 0:
        return None
    if pack is None:
        return f"{_AS_TRAINED}: the checkpoint has no {STATISTICS}"
    if (pack.include, pack.exclude) != tuple(None if g is None else list(g) for g in globs):
        return f"{_AS_TRAINED}: the checkpoint's {STATISTICS} is for include={pack.include} and exclude={pack.exclude}"
    trained = pack.tensors.get(str(AS_TRAINED), {})
    found = pack.of(pattern)
    if found is None:
        known = ", ".join(text for text in pack.tensors if text != str(AS_TRAINED))
        return f"{_AS_TRAINED}: the checkpoint's {STATISTICS} is for {known or 'no pattern'}"
    own, new = _fitting(model, buffers, trained), _fitting(model, buffers, found)
    if not all(torch.allclose(buffers[n].float().cpu(), own[n], rtol=_UNLIKE, atol=1e-3) for n in buffers):
        return f"{_AS_TRAINED}: the checkpoint's {STATISTICS} was made for other weights"
    for name, buffer in buffers.items():
        buffer.copy_(new[name])
    return None if str(pattern) in pack.tensors else f"batch norms have the statistics of patterns near {pattern}"


def _fitting(
    model: Any, buffers: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Statistics under the names of this model, whether it has the head of the one they were taken from or not."""
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    fitting = {}
    for name, buffer in buffers.items():
        value = next((found[n] for n in (name, prefix + name, name.removeprefix(prefix)) if n in found), None)
        if value is None or value.shape != buffer.shape or value.dtype != torch.float32:
            what = "is missing" if value is None else f"is {tuple(value.shape)} of {value.dtype}"
            raise ValueError(f"{STATISTICS} does not fit this model: {name} {what}; download the checkpoint again")
        if not value.isfinite().all() or (name.endswith("var") and (value < 0).any()):
            raise ValueError(f"{STATISTICS} is wrong: {name} is not finite, or negative; download the checkpoint again")
        fitting[name] = value
    return fitting
