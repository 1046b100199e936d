"""Facts about the processes of a run, the few things that they do together, and tensors sharded over them.

Sharded means a DTensor with its rows dealt to the ranks (`Shard(0)`), as FSDP2 makes them; replicas are fine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def is_main_process() -> bool:
    """True on rank 0, and where no process group is running."""
    return not is_distributed() or dist.get_rank() == 0


def run_on_main(work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0 alone, the others waiting; every rank gets its (picklable) result.

    Raises:
        RuntimeError: on the other ranks when `work` fails on rank 0, where its own error is raised: nobody is left
            waiting for a process that is gone.
    """
    if not is_distributed():
        return work()
    message: list[Any] = [None, None]
    failure: BaseException | None = None
    if is_main_process():
        try:
            message[0] = work()
        except BaseException as error:
            failure, message[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(message, src=0)
    if failure is not None:
        raise failure
    if message[1] is not None:
        raise RuntimeError(f"the main process failed: {message[1]}")
    return message[0]


def is_sharded(tensor: torch.Tensor) -> bool:
    """True for a DTensor."""
    return isinstance(tensor, DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that lies on this rank, sharing its memory; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(part: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The tensor of which every rank holds a part, dealt as `reference` is; `part` itself beside a plain one."""
    if not isinstance(reference, DTensor):
        return part
    mesh, placements = reference.device_mesh, reference.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=reference.shape, stride=reference.stride())


def dealt_like(whole: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """A tensor that every rank has whole, dealt as `reference` is."""
    if not isinstance(reference, DTensor):
        return whole
    return distribute_tensor(whole, reference.device_mesh, reference.placements, src_data_rank=None)  # nothing is sent


def shard_group(tensor: torch.Tensor) -> dist.ProcessGroup | None:
    """The ranks that share the rows of a tensor, in the order of the rows; None for a plain tensor.

    Raises:
        ValueError: if it is sharded in another way.
    """
    if not isinstance(tensor, DTensor):
        return None
    dims = [i for i, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate)]
    if len(dims) != 1 or tensor.placements[dims[0]] != Shard(0):
        raise ValueError(
            f"a weight is sharded as {tensor.placements}; only rows dealt over one dimension of the mesh (FSDP2) are "
            "understood: run without tensor parallelism"
        )
    return tensor.device_mesh.get_group(dims[0])


def total_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm of all tensors together, in float64, equal on all ranks; no wait for the device."""
    tensors = list(tensors)
    squares = [torch.linalg.vector_norm(local(t), dtype=torch.float64).square() for t in tensors]
    return sum_over_shards(squares, tensors).sqrt()


def sum_over_shards(values: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of values that each describe the part of a tensor on this rank, equal on all ranks.

    Args:
        values: of one shape and type, one for each tensor.
        tensors: plain ones count once, sharded ones on every rank that holds a part.
    """
    shared: dict[dist.ProcessGroup | None, torch.Tensor] = {}
    for value, tensor in zip(values, tensors, strict=True):
        group = shard_group(tensor)
        shared[group] = shared[group] + value.to(shared[group].device) if group in shared else value
    for group, value in shared.items():
        if group is not None:
            dist.all_reduce(value, group=group)
    first = next(iter(shared.values()))
    if len(shared) == 1:
        return first
    return torch.stack([value.to(first.device) for value in shared.values()]).sum(0)


def counts_here(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Whether each tensor counts in a sum over ranks: a plain one beside sharded ones lies on all, and counts once."""
    group = next((found for t in tensors if (found := shard_group(t)) is not None), None)
    return [group is None or is_sharded(t) or dist.get_rank(group) == 0 for t in tensors]


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The mean of a value that every rank has one of; the value itself where no process group is running."""
    if is_distributed():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


def reshard(model: nn.Module) -> None:
    """Forget gathered copies of sharded weights, which an edit in place would leave stale."""
    if not is_distributed():  # a walk over the modules takes milliseconds, three times a step
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_distributed() -> bool:
    """True where a process group is running."""
    return dist.is_available() and dist.is_initialized()
