"""A process that decodes: groups and then tensors come in at stdin, latents go out at stdout (see parallel.py).

Only numpy and constriction are imported.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import BinaryIO

import numpy as np

from .container import decode_latents, read_groups
from .fields import CodecError
from .frames import read_frame, write_frame


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Decode what comes until it ends: shape as JSON and blob in, fields as JSON, values and scales out."""
    first = read_frame(source)
    if first is None:
        return
    groups = read_groups(first)
    while (shape := read_frame(source)) is not None and (blob := read_frame(source)) is not None:
        try:
            latents = decode_latents(blob, groups, tuple(json.loads(shape.tobytes())))
        except CodecError as error:
            write_frame(sink, json.dumps({"error": str(error)}).encode())
        else:
            fields = {name: getattr(latents, name) for name in ("row", "group", "gain", "is_transposed")}
            scales = latents.scales if latents.scales is not None else np.empty(0, np.float32)
            head = {"fields": fields, "dtype": latents.values.dtype.name, "shape": latents.values.shape}
            write_frame(sink, json.dumps(head).encode())
            write_frame(sink, latents.values.reshape(-1).view(np.uint8))
            write_frame(sink, scales.view(np.uint8))
        sink.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    serve(sys.stdin.buffer, sys.stdout.buffer)
