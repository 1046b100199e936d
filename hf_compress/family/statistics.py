"""Batch-norm statistics of many patterns, measured for the dense checkpoint of a family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..calibration import batch_norm_statistics, recalibrate_batch_norm
from ..loading.statistics import AS_TRAINED, StatisticsPack
from ..oneshot import compress
from ..patterns import Coded, LowRank, Pattern, Unstructured

SLIDER_SHARES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def measure_statistics(
    load: Callable[[], Any],
    patterns: Sequence[Pattern],
    slider_shares: Sequence[float],
    data: Iterable[Any],
    num_samples: int,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> StatisticsPack | None:
    """The statistics that batch norms have after each pattern, of the same samples as those of its variant.

    Args:
        load: gives the dense model, on its device, as often as it is asked.
        patterns: those of the variants; the ones that may change shapes are left out.
        slider_shares: of unstructured patterns, beside them.
        data: see `recalibrate_batch_norm`.
        num_samples: see `recalibrate_batch_norm`.
        include: globs on names, see `find_targets`.
        exclude: globs on names, see `find_targets`.

    Returns:
        None for a model without batch norms.
    """
    dense = load()
    if not batch_norm_statistics(dense):
        return None
    found = {str(AS_TRAINED): _copied(dense)}
    keeping = [p for p in patterns if not isinstance(p, (Coded, LowRank))]
    for pattern in dict.fromkeys([*(Unstructured(share) for share in slider_shares), *keeping]):
        model = load()
        compress(model, pattern, include, exclude)
        recalibrate_batch_norm(model, data, num_samples)
        found[str(pattern)] = _copied(model)
    return StatisticsPack(found, *(None if globs is None else list(globs) for globs in (include, exclude)))


def _copied(model: Any) -> dict[str, Any]:
    return {name: buffer.detach().float().cpu().clone() for name, buffer in batch_norm_statistics(model).items()}
