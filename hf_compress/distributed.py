"""Facts about the processes of a run, and the few things that they do together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def is_main_process() -> bool:
    """True on rank 0, and where no process group is running."""
    return not _is_distributed() or dist.get_rank() == 0


def run_on_main(work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0 alone, the others waiting; every rank gets its (picklable) result.

    Raises:
        RuntimeError: on the other ranks when `work` fails on rank 0, where its own error is raised: nobody is left
            waiting for a process that is gone.
    """
    if not _is_distributed():
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


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
