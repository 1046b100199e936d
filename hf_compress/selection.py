"""Which weights are the smallest: exact selection by magnitude over many tensors.

Exact means that precisely the asked number is pruned. Of equal magnitudes the lower position goes first: order of the
tensors, then row-major index.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from .distributed import counts_here, is_sharded, local, shard_group, sharded_like

CHUNK = 1 << 17  # elements: half a MiB of float32, so that all work on a chunk stays in the cache
_MOST_SAMPLES, _LEAST_SAMPLES = 1 << 16, 512
_CONFIDENCE = 3.0  # standard deviations of the sample quantile; one miss in 400 costs one more pass, never exactness
# Ranks are int32 there, and take 4 bytes an entry; what is larger is cut once, where a wait costs little.
_MOST_ON_ACCELERATOR = (1 << 31) - 1

Group = tuple[Sequence[torch.Tensor], int]  # weights that are compared with each other, and how many to prune or keep


def keep_largest_of_groups(groups: Sequence[Group]) -> list[list[torch.Tensor]]:
    """`keep_largest` of every group; sharded groups share three small collectives, however many there are."""
    if any(is_sharded(w) for weights, _ in groups for w in weights):
        return _keep_largest_sharded(groups)
    return [keep_largest(weights, num_pruned) for weights, num_pruned in groups]


def keep_largest(weights: Sequence[torch.Tensor], num_pruned: int) -> list[torch.Tensor]:
    """Masks that prune the `num_pruned` entries of smallest magnitude of all tensors together.

    Args:
        weights: floating-point tensors of any shape, also of several devices; DTensors give DTensors, as one process.
        num_pruned: between 0 and the number of all entries.

    Returns:
        One bool tensor a weight, of its shape: True is kept.

    Raises:
        ValueError: if `num_pruned` is out of range, or (on a CPU, where looking costs nothing) a weight is NaN.
    """
    total = sum(w.numel() for w in weights)
    if not 0 <= num_pruned <= total:
        raise ValueError(f"cannot prune {num_pruned} of {total} weights")
    if any(map(is_sharded, weights)):
        return _keep_largest_sharded([(weights, num_pruned)])[0]
    if num_pruned in (0, total):
        return [torch.full_like(w, num_pruned == 0, dtype=torch.bool) for w in weights]
    if _is_for_the_cpu(weights, total):
        flat = _select_on_cpu([w.detach().cpu() for w in weights], num_pruned)
        return [torch.from_numpy(mask).view(w.shape).to(w.device) for mask, w in zip(flat, weights, strict=True)]
    return _select_on_accelerator(weights, num_pruned)


def _is_for_the_cpu(weights: Sequence[torch.Tensor], total: int) -> bool:
    """Weights that lie there, on several devices, or are too many for the memory of one."""
    devices = {w.device for w in weights}
    return devices == {torch.device("cpu")} or len(devices) > 1 or total > _MOST_ON_ACCELERATOR


def kth_largest_magnitude(weights: Sequence[torch.Tensor], k: int) -> torch.Tensor:
    """The k-th largest magnitude (k counts from 1) of all entries, as a 0-dim tensor, equal on all ranks.

    NaN has no order: it gives NaN, or counts as larger than everything else. No wait for the device.
    """
    total = sum(w.numel() for w in weights)
    if any(map(is_sharded, weights)):
        return kth_largest_of_shards([(weights, k)])[0]
    if any(w.device.type != "cpu" for w in weights):
        return kth_smallest_magnitude(weights, total - k + 1)
    cut = cut_on_cpu(weights, k)
    return torch.tensor(torch.nan, dtype=weights[0].dtype) if cut is None else torch.tensor(cut.threshold)


def kth_smallest_magnitude(weights: Sequence[torch.Tensor], k: int) -> torch.Tensor:
    """The k-th smallest magnitude (k counts from 1) of all entries, as a 0-dim tensor; no wait for the device."""
    if all(w.device.type == "cpu" for w in weights):
        return torch.tensor(_search(weights, k).threshold)
    return kth_smallest(_all_magnitudes(weights), k)


class Cut(NamedTuple):
    """Where entries in the order of their magnitudes are cut in two.

    Attributes:
        threshold: the largest magnitude that is pruned.
        num_smaller: entries below the threshold.
        largest: the largest magnitude of all.
        ties: positions of the entries of the threshold's magnitude, in their order; at least one of them is pruned.
        in_band: positions of smaller entries that masks still keep.
    """

    threshold: np.floating
    num_smaller: int
    largest: float
    ties: np.ndarray
    in_band: np.ndarray


def cut_on_cpu(weights: Sequence[torch.Tensor], k: int) -> Cut | None:
    """Where the k largest magnitudes (k from 1) end; None if a weight is NaN."""
    try:
        return _search(weights, sum(w.numel() for w in weights) - k + 1)
    except ValueError:
        return None


def _select_on_cpu(weights: Sequence[torch.Tensor], num_pruned: int) -> list[np.ndarray]:
    """The flat mask of every weight."""
    masks = [np.empty(w.numel(), bool) for w in weights]
    cut = _search(weights, num_pruned, masks)
    # Both are in order, which a stable sort merges.
    pruned = np.sort(np.concatenate([cut.in_band, cut.ties[: num_pruned - cut.num_smaller]]), kind="stable")
    ends = np.cumsum([mask.size for mask in masks])
    for mask, end, part in zip(masks, ends, np.split(pruned, np.searchsorted(pruned, ends[:-1])), strict=True):
        mask[part - (end - mask.size)] = False
    return masks


def _search(weights: Sequence[torch.Tensor], num_pruned: int, masks: list[np.ndarray] | None = None) -> Cut:
    """The threshold, and masks that keep all entries but those below a band around it.

    A strided sample gives the band. One pass over the weights keeps what lies above it and gathers what lies inside;
    only that is ordered.
    """
    dtype = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32
    low, high = _confidence_band(weights, num_pruned, dtype)
    while True:
        below, largest, places, values = _mark(weights, masks, low, high, dtype)
        if below < num_pruned <= below + values.size:
            break
        low, high = (type(low)(0.0), low) if num_pruned <= below else (high, type(high)(np.inf))
    rank = num_pruned - below
    threshold = np.partition(values, rank - 1)[rank - 1]
    in_band, ties = places[values < threshold], places[np.flatnonzero(values == threshold)]
    return Cut(threshold, below + in_band.size, largest, ties, in_band)


def _mark(
    weights: Sequence[torch.Tensor],
    masks: list[np.ndarray] | None,
    low: np.floating,
    high: np.floating,
    dtype: torch.dtype,
) -> tuple[int, float, np.ndarray, np.ndarray]:
    """Write |w| >= low into the masks; how many are smaller, the largest, and places and magnitudes up to `high`."""
    is_in_band, scratch = np.empty(CHUNK, bool), np.empty(CHUNK, bool)
    start, kept, largest = 0, 0, 0.0
    places, values = [], []
    parts: Iterator[np.ndarray] = itertools.repeat(scratch)
    if masks is not None:
        parts = (mask[at : at + CHUNK] for mask in masks for at in range(0, mask.size, CHUNK))
    for chunk, room in zip(_magnitudes(weights, dtype), parts, strict=masks is not None):
        top = float(chunk.max())
        if top != top:
            raise ValueError(
                "a weight is NaN, so magnitudes have no order; look for a diverged run or a broken checkpoint"
            )
        largest = max(largest, top)
        part, band = room[: chunk.size], is_in_band[: chunk.size]
        np.greater_equal(chunk, low, out=part)
        kept += int(np.count_nonzero(part))
        np.less_equal(chunk, high, out=band)
        np.logical_and(band, part, out=band)
        inside = np.flatnonzero(band)
        values.append(chunk[inside])
        places.append(inside + start)
        start += chunk.size
    return start - kept, largest, np.concatenate(places), np.concatenate(values)


def _confidence_band(weights: Sequence[torch.Tensor], k: int, dtype: torch.dtype) -> tuple[np.floating, np.floating]:
    """Magnitudes between which the k-th smallest lies, as far as a sample of every tensor can tell."""
    total = sum(w.numel() for w in weights)
    stride = max(1, total // min(max(total // 64, _LEAST_SAMPLES), _MOST_SAMPLES))
    sample = np.concatenate([m.copy() for m in _magnitudes([_flat(w)[::stride] for w in weights], dtype)])
    sample.sort()
    share = k / total
    spread = _CONFIDENCE * (sample.size * share * (1 - share)) ** 0.5 + 2 + len(weights)
    first, last = int(share * sample.size - spread), int(share * sample.size + spread)
    kind = sample.dtype.type  # comparisons with a Python number would be slower
    return (
        sample[first] if first >= 0 else kind(0.0),
        sample[last] if last < sample.size else kind(np.inf),
    )


def _magnitudes(weights: Sequence[torch.Tensor], dtype: torch.dtype) -> Iterator[np.ndarray]:
    """|w| of all weights in chunks that fit the cache; the next chunk takes the place of the one before."""
    scratch = torch.empty(CHUNK, dtype=dtype).numpy()
    for weight in weights:
        for chunk in _flat(weight).split(CHUNK):
            if chunk.numel():
                yield np.abs(chunk.to(dtype).numpy(), out=scratch[: chunk.numel()])


def _flat(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().reshape(-1)


def _select_on_accelerator(weights: Sequence[torch.Tensor], num_pruned: int) -> list[torch.Tensor]:
    """The masks in a few calls, however many tensors there are; no number is looked at, and NaN stays where it is."""
    flat = _all_magnitudes(weights)
    threshold = kth_smallest(flat, num_pruned)
    keep, tied = (flat <= threshold).logical_not_(), flat == threshold
    ranks = tied.cumsum(0, dtype=torch.int32)  # the first are pruned, so that all kept ones come after them
    keep |= tied & (ranks > ranks[-1] + keep.sum() - (flat.numel() - num_pruned))
    return [part.view(w.shape) for part, w in zip(keep.split([w.numel() for w in weights]), weights, strict=True)]


def _all_magnitudes(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([m.flatten() for m in torch._foreach_abs([w.detach() for w in weights])])


def kth_smallest(flat: torch.Tensor, k: int) -> torch.Tensor:
    """By topk, which shares its work among all of a GPU, where kthvalue runs on one block; the shorter side of both."""
    if 2 * k <= flat.numel():
        return flat.topk(k, largest=False, sorted=False).values.max()
    return flat.topk(flat.numel() - k + 1, sorted=False).values.min()


def _keep_largest_sharded(groups: Sequence[Group]) -> list[list[torch.Tensor]]:
    """The thresholds of every group take two collectives, a third one orders the ties."""
    return _masks_of_shards(groups, *_thresholds_of_shards(groups))


def kth_largest_of_shards(groups: Sequence[Group]) -> torch.Tensor:
    """The k-th largest magnitude (k from 1) of each group of sharded weights, (groups,), equal on all ranks."""
    bits, *_ = _thresholds_of_shards([(weights, sum(w.numel() for w in weights) - k + 1) for weights, k in groups])
    return bits.to(torch.int32).view(torch.float32)


def _thresholds_of_shards(
    groups: Sequence[Group],
) -> tuple[torch.Tensor, torch.Tensor, dist.ProcessGroup, Sequence[bool]]:
    """Two histograms of the bits of |w| find the threshold of every group exactly.

    Bit patterns of floats of one sign are ordered as the floats are: the upper 15 bits choose a bucket, the lower 16
    the value inside. Nothing of the size of a weight is sent.

    Returns:
        Bits of the largest magnitude that is pruned of each group, how many that tie with it are pruned, the ranks that
        share the weights, and for each weight whether it is counted here.
    """
    flat = [(g, w) for g, (weights, _) in enumerate(groups) for w in weights]
    process_group = next(group for _, w in flat if (group := shard_group(w)) is not None)
    device = local(flat[0][1]).device
    is_counted = counts_here([w for _, w in flat])
    wanted = torch.tensor([num_pruned for _, num_pruned in groups]).to(device, non_blocking=True)
    upper, lower = (torch.zeros(len(groups), size, dtype=torch.int64, device=device) for size in (1 << 15, 1 << 16))
    for (g, weight), counts in zip(flat, is_counted, strict=True):
        for bits in _bits(weight) if counts else ():
            upper[g].scatter_add_(0, bits >> 16, torch.ones_like(bits))
    dist.all_reduce(upper, group=process_group)
    bucket, wanted = _bin_of(upper, wanted)
    for (g, weight), counts in zip(flat, is_counted, strict=True):
        for bits in _bits(weight) if counts else ():
            lower[g].scatter_add_(0, bits & 0xFFFF, (bits >> 16 == bucket[g]).long())
    dist.all_reduce(lower, group=process_group)
    value, pruned_ties = _bin_of(lower, wanted)
    return (bucket << 16) | value, pruned_ties, process_group, is_counted


def _bin_of(histograms: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row the bin that holds its `wanted`-th entry (from 1), and the rank of that entry inside the bin."""
    cumulated = histograms.cumsum(1)
    bins = (cumulated < wanted[:, None]).sum(1).clamp(max=histograms.shape[1] - 1)
    below = (cumulated - histograms).gather(1, bins[:, None])[:, 0]
    return bins, wanted - below


def _masks_of_shards(
    groups: Sequence[Group],
    thresholds: torch.Tensor,
    pruned_ties: torch.Tensor,
    process_group: dist.ProcessGroup,
    is_counted: Sequence[bool],
) -> list[list[torch.Tensor]]:
    flat = [(g, w) for g, (weights, _) in enumerate(groups) for w in weights]
    tied = [torch.cat([b == thresholds[g] for b in _bits(w)] or [_nothing(w)]) for g, w in flat]
    here = torch.stack([t.sum() * counts for t, counts in zip(tied, is_counted, strict=True)])
    ranks = dist.get_world_size(process_group)
    everywhere = torch.empty(ranks * len(flat), dtype=here.dtype, device=here.device)
    dist.all_gather_into_tensor(everywhere, here, group=process_group)
    everywhere = everywhere.view(ranks, len(flat))
    on_earlier_ranks = everywhere[: dist.get_rank(process_group)].sum(0)
    in_tensor = everywhere.sum(0)
    masks: list[list[torch.Tensor]] = [[] for _ in groups]
    before = torch.zeros(len(groups), dtype=torch.int64, device=here.device)
    for i, (g, weight) in enumerate(flat):
        # Ties count from 1 in the order of positions: over tensors, then over ranks, then inside the shard.
        first = before[g] + (on_earlier_ranks[i] if is_sharded(weight) else 0)
        keep = torch.cat([b > thresholds[g] for b in _bits(weight)] or [_nothing(weight)])
        keep |= tied[i] & (tied[i].cumsum(0) + first > pruned_ties[g])
        nothing_pruned = groups[g][1] == 0
        part = torch.ones_like(keep) if nothing_pruned else keep
        masks[g].append(sharded_like(part.view(local(weight).shape), weight))
        before[g] += in_tensor[i]
    return masks


def _bits(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The bit patterns of |w| of the part of a weight on this rank, as whole numbers, in chunks."""
    if weight.dtype == torch.float64:
        raise ValueError("a sharded weight is float64; selection over ranks takes float32 and smaller types")
    for chunk in _flat(local(weight)).split(1 << 22):
        if chunk.numel():
            yield chunk.float().abs().view(torch.int32).long()


def _nothing(weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros(0, dtype=torch.bool, device=local(weight).device)
