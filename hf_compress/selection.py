"""Which weights are the smallest: exact selection by magnitude over many tensors.

Exact means that precisely the asked number is pruned. Of equal magnitudes the lower position goes first: order of the
tensors, then row-major index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

CHUNK = 1 << 17  # elements: half a MiB of float32, so that all work on a chunk stays in the cache
_SAMPLES = 1 << 16
_CONFIDENCE = 4.0  # standard deviations of the sample quantile; a miss costs one more pass, never exactness


def keep_largest(weights: Sequence[torch.Tensor], num_pruned: int) -> list[torch.Tensor]:
    """Masks that prune the `num_pruned` entries of smallest magnitude of all tensors together.

    Args:
        weights: floating-point tensors of any shape on one device.
        num_pruned: between 0 and the number of all entries.

    Returns:
        One bool tensor a weight, of its shape: True is kept.

    Raises:
        ValueError: if `num_pruned` is out of range, or (on a CPU, where looking costs nothing) a weight is NaN.
    """
    total = sum(w.numel() for w in weights)
    if not 0 <= num_pruned <= total:
        raise ValueError(f"cannot prune {num_pruned} of {total} weights")
    if num_pruned in (0, total):
        return [torch.full_like(w, num_pruned == 0, dtype=torch.bool) for w in weights]
    threshold = kth_smallest_magnitude(weights, num_pruned)
    masks = [_magnitude(w, threshold) > threshold for w in weights]
    if all(w.device.type == "cpu" for w in weights):
        _keep_last_ties_cpu(weights, masks, threshold, total - num_pruned)
    else:
        _keep_last_ties(weights, masks, threshold, total - num_pruned)
    return masks


def kth_smallest_magnitude(weights: Sequence[torch.Tensor], k: int) -> torch.Tensor:
    """The k-th smallest magnitude (k counts from 1) of all entries, as a 0-dim tensor; no wait for the device."""
    if all(w.device.type == "cpu" for w in weights):
        return _banded_kth(weights, k)
    return torch.cat([w.detach().abs().flatten() for w in weights]).kthvalue(k).values


def _banded_kth(weights: Sequence[torch.Tensor], k: int) -> torch.Tensor:
    """A strided sample gives a narrow band around the answer, one pass over the weights makes it exact."""
    low, high = _confidence_band(weights, k)
    while True:
        below, inside = 0, []
        for chunk in _magnitudes(weights):
            if np.isnan(chunk.max()):
                raise ValueError(
                    "a weight is NaN, so magnitudes have no order; look for a diverged run or a broken checkpoint"
                )
            below += int(np.count_nonzero(chunk < low))
            inside.append(chunk[(chunk >= low) & (chunk <= high)])
        candidates = np.concatenate(inside)
        if below < k <= below + candidates.size:
            candidates.partition(k - below - 1)
            return torch.tensor(candidates[k - below - 1])
        low, high = (0.0, low) if k <= below else (high, np.inf)


def _confidence_band(weights: Sequence[torch.Tensor], k: int) -> tuple[float, float]:
    """Magnitudes between which the k-th smallest lies, as far as a sample of every tensor can tell."""
    total = sum(w.numel() for w in weights)
    stride = max(1, total // _SAMPLES)
    sample = np.concatenate(list(_magnitudes([_flat(w)[::stride] for w in weights])))
    sample.sort()
    share = k / total
    spread = _CONFIDENCE * (sample.size * share * (1 - share)) ** 0.5 + 2 + len(weights)
    first, last = int(share * sample.size - spread), int(share * sample.size + spread)
    return (
        float(sample[first]) if first >= 0 else 0.0,
        float(sample[last]) if last < sample.size else np.inf,
    )


def _magnitudes(weights: Sequence[torch.Tensor]) -> Iterator[np.ndarray]:
    """|w| of all weights in chunks that fit the cache, float32 (float64 if a weight is)."""
    dtype = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32
    for weight in weights:
        for chunk in _flat(weight).split(CHUNK):
            if chunk.numel():
                yield chunk.to(dtype).abs().numpy()


def _magnitude(weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    # A comparison of bfloat16 with a float32 number would round the number.
    return weight.detach().abs().to(like.dtype)


def _flat(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().reshape(-1)


def _keep_last_ties_cpu(
    weights: Sequence[torch.Tensor], masks: list[torch.Tensor], threshold: torch.Tensor, num_kept: int
) -> None:
    """Weights that tie with the threshold are pruned in order of position, so the last of them are kept."""
    missing = num_kept - sum(np.count_nonzero(m.numpy()) for m in masks)
    for i in reversed(range(len(weights))):
        if missing == 0:
            return
        ties = (_magnitude(weights[i], threshold).flatten() == threshold).nonzero().flatten()[-missing:]
        kept = masks[i].flatten()
        kept[ties] = True
        masks[i] = kept.view(masks[i].shape)
        missing -= ties.numel()


def _keep_last_ties(
    weights: Sequence[torch.Tensor], masks: list[torch.Tensor], threshold: torch.Tensor, num_kept: int
) -> None:
    """The same without looking at a number: a tie is kept if fewer than `missing` ties come after it."""
    missing = num_kept - sum(m.sum() for m in masks)
    for i in reversed(range(len(weights))):
        tied = _magnitude(weights[i], threshold).flatten() == threshold
        rank_from_the_end = tied.flip(0).cumsum(0).flip(0)
        masks[i] = masks[i] | (tied & (rank_from_the_end <= missing)).view(masks[i].shape)
        missing = (missing - tied.sum()).clamp(min=0)
