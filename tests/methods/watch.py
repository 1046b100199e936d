"""Counts what a step allocates, writes and waits for, so that it holds on every machine."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Every one of these makes the host wait for an accelerator.
WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal"}


class Watch(TorchDispatchMode):
    """The largest new tensor, bytes written to new and old ones, and names of all calls; views write nothing."""

    def __init__(self):
        super().__init__()
        self.largest, self.written, self.names = 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for each in (*args, *kwargs.values()) for t in (each if isinstance(each, (tuple, list)) else [each])]
        old = {t.untyped_storage().data_ptr() for t in given if isinstance(t, torch.Tensor)}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        self.names.append(name)
        is_in_place = func._schema.is_mutable
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                is_new = tensor.untyped_storage().data_ptr() not in old
                size = tensor.numel() * tensor.element_size()
                self.largest = max(self.largest, size * is_new)
                self.written += size * (is_new or is_in_place)
        return result
