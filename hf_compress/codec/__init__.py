"""Entropy-coded integer tensors on disk: what LilNetX trains, in few bytes, decoded to the same bits everywhere.

`encode` turns latents into files (container.py describes them), `decode` gives the weights. Files may come from anyone:
`CodecError` is all that they can cause.
"""

from .container import Groups, byte_report, decode, decode_latents, read_groups
from .encoder import encode
from .fields import CodecError
from .latents import Latents, entropy_bits, weights_of
from .parallel import decode_all

__all__ = [
    "CodecError",
    "Groups",
    "Latents",
    "byte_report",
    "decode",
    "decode_all",
    "decode_latents",
    "encode",
    "entropy_bits",
    "read_groups",
    "weights_of",
]
