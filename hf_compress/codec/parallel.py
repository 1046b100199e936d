"""Decoding on several cores. constriction holds Python's lock, so it takes processes.

They are started as programs of their own: multiprocessing would run the user's script again (spawn) or copy a process
with running threads (fork).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from .container import decode_latents, read_groups
from .fields import Bytes, CodecError
from .frames import read_frame, write_frame
from .latents import Latents


def decode_all(
    blobs: Mapping[str, Bytes], groups: Bytes, shapes: Mapping[str, tuple[int, ...]], processes: int
) -> Iterator[tuple[str, Latents]]:
    """Decode many tensors, the largest files first.

    Args:
        blobs: by name, what `encode` gave.
        groups: of the same call.
        shapes: of the model's weights, by name.
        processes: that decode; with 1 it is this one.

    Yields:
        Name and latents, as soon as they are there; with several processes in no order. At most twice as many tensors
        as processes are decoded ahead.

    Raises:
        CodecError: for bytes that are not what they should be, with the name of the tensor.
        RuntimeError: when a process ended, or the installed constriction does not code as the format says.
        ValueError: for a number of processes below 1, or a blob without a shape.
    """
    if processes < 1:
        raise ValueError(f"at least 1 process decodes, got {processes}")
    if missing := sorted(blobs.keys() - shapes.keys()):
        raise ValueError(f"these tensors have no shape: {missing[:5]}")
    names = sorted(blobs, key=lambda name: (-len(blobs[name]), name))
    known = read_groups(groups)
    if min(processes, len(names)) < 2:
        for name in names:
            try:
                latents = decode_latents(blobs[name], known, shapes[name])
            except CodecError as error:
                raise CodecError(f"{name}: {error}") from None
            yield name, latents
    else:
        yield from _in_processes(names, blobs, groups, shapes, min(processes, len(names)))


def _in_processes(
    names: list[str], blobs: Mapping[str, Bytes], groups: Bytes, shapes: Mapping[str, tuple[int, ...]], count: int
) -> Iterator[tuple[str, Latents]]:
    """One thread for each process, which writes to it and waits for it."""
    workers = [_Worker() for _ in range(count)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def one(name: str) -> tuple[str, Latents]:
        worker = idle.get()
        try:
            return name, worker.decode(name, blobs[name], groups, shapes[name])
        finally:
            idle.put(worker)  # also a dead one: who gets it next fails at once instead of waiting for ever

    pool = ThreadPoolExecutor(count)
    try:
        running: set[Future[tuple[str, Latents]]] = set()
        for name in names:
            running.add(pool.submit(one, name))
            if len(running) < 2 * count:
                continue
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        for worker in workers:
            worker.kill()
        pool.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


class _Worker:
    """A process that decodes; it starts at once and reads the groups with its first tensor."""

    def __init__(self) -> None:
        above = str(Path(__file__).parents[2])
        path = os.pathsep.join([above, *filter(None, [os.environ.get("PYTHONPATH")])])
        # -P: no module of the folder in which the user happens to be.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "hf_compress.codec.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        self._has_groups = False

    def decode(self, name: str, blob: Bytes, groups: Bytes, shape: tuple[int, ...]) -> Latents:
        """Have a tensor decoded."""
        sink, source = cast(BinaryIO, self._process.stdin), cast(BinaryIO, self._process.stdout)
        try:
            if not self._has_groups:
                write_frame(sink, groups)
                self._has_groups = True
            write_frame(sink, json.dumps([int(size) for size in shape]).encode())
            write_frame(sink, blob)
            sink.flush()
            head = json.loads(self._frame(source, name).tobytes())
            if "error" in head:
                raise CodecError(f"{name}: {head['error']}")
            values = self._frame(source, name).view(head["dtype"]).reshape(head["shape"])
            scales = self._frame(source, name).view(np.float32)
        except (BrokenPipeError, ValueError) as error:
            if isinstance(error, CodecError):
                raise
            raise self._ended(name) from error
        return Latents(values, scales=scales if scales.size else None, **head["fields"])

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()

    def close(self) -> None:
        """Forget the process; no thread may use it any more."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                cast(BinaryIO, pipe).close()
        self._process.wait()

    def _frame(self, source: BinaryIO, name: str) -> np.ndarray:
        found = read_frame(source)
        if found is None:
            raise self._ended(name)
        return found

    def _ended(self, name: str) -> RuntimeError:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.wait()
        return RuntimeError(f"{name}: the process that decoded it ended with code {code}")
