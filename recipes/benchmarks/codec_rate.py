"""How fast integer tensors are coded and how small they get, beside constriction alone and beside zstd.

"bare" is one call of constriction over all symbols, which are int32 numbers from 0 on already, with one table that is
known: no counting, no check, no header. "bare from int8" takes the same bytes that we take: it makes the numbers,
counts them for the table, and codes. "ours" is `encode` from int8 and `decode_latents` to int8; "weights" is `decode`
to float32. All run in turns on the processor clock of one thread; a ratio is the median over the rounds. zstd (level
19) gets the first 2 million int8 values and fewer rounds. Latents are drawn from Laplace distributions, nine channels
of different scale, as section 4 of the specification has them; "int8 MiniLM" is the rounded weights of all linear
layers of a model, each with its scales. Bits are of a value, all files counted.

    OMP_NUM_THREADS=1 python recipes/benchmarks/codec_rate.py --model FOLDER \\
        --output recipes/benchmarks/results/codec_rate.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import constriction
import numpy as np
import zstandard
from machine import facts
from safetensors.torch import load_file
from turns import in_turns, ratios

from hf_compress.codec import Latents, decode, decode_latents, encode, entropy_bits, read_groups
from hf_compress.patterns.quantized import quantize
from hf_compress.targets import Target

ROUNDS, ZSTD_ROUNDS = 9, 2
SIZE, SAMPLE = 9_900_000, 2_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a BERT-like model")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    cases = {
        "Laplace, d = 1": (laplace(1, 0), matrix(1)),
        "Laplace, d = 9": (laplace(9, 0), matrix(9)),
        "Laplace, d = 9, 75 % zero slices": (laplace(9, 0.75), matrix(9)),
        "int8 MiniLM": (int8_weights(options.model), matrix(1)),
    }
    described = facts()
    described["versions"] |= {p: importlib.metadata.version(p) for p in ("constriction", "zstandard", "numpy")}
    result = {
        "what": __doc__,
        "command": "OMP_NUM_THREADS=1 python recipes/benchmarks/codec_rate.py --model FOLDER",
        **described,
        "rounds": ROUNDS,
        "cases": {name: measured(tensors, s) for name, (tensors, s) in cases.items()},
    }
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result["cases"]))


def matrix(d: int) -> np.ndarray:
    """A decoder."""
    return np.random.default_rng(1).normal(size=(d, d)).astype(np.float32)


def laplace(row: int, zero_slices: float) -> dict[str, Latents]:
    """One tensor."""
    rng = np.random.default_rng(0)
    values = rng.laplace(0, np.linspace(2.2, 0.8, 9), (SIZE // 9, 9))
    values[rng.random(len(values)) < zero_slices] = 0
    return {"w": Latents(np.rint(values).clip(-127, 127).astype(np.int8), row)}


def int8_weights(folder: Path) -> dict[str, Latents]:
    """The weights of the linear layers of an encoder."""
    found = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.ndim == 2 and re.search(r"\.layer\.\d+\..*\.weight$", name):
            codes, scales = quantize(Target(weight, 1, "linear"), 8)
            found[name] = Latents(codes.numpy().astype(np.int8), scales=scales.reshape(-1).numpy())
    if not found:
        raise ValueError(f"{folder} has no matrices in layers; give the folder of a BERT-like model")
    return found


def measured(tensors: dict[str, Latents], decoder: np.ndarray) -> dict[str, Any]:
    """Rates, their ratios, and bits of a value."""
    values = np.concatenate([t.values.reshape(-1) for t in tensors.values()])
    blobs, data = encode(tensors, [decoder])
    groups, forms = read_groups(data), bare(values)
    forms |= {
        "ours encode": lambda: encode(tensors, [decoder]),
        "ours decode": lambda: [decode_latents(blobs[name], groups, t.shape) for name, t in tensors.items()],
        "weights": lambda: [decode(blobs[name], groups, t.shape) for name, t in tensors.items()],
    }
    for found, t in zip(forms["ours decode"](), tensors.values(), strict=True):
        if not np.array_equal(found.values, t.values):
            raise RuntimeError("a tensor did not come back as it was")
    seconds = in_turns(forms, ROUNDS, warm_up=1)
    sample = values[:SAMPLE].tobytes()
    packed = zstandard.ZstdCompressor(level=19).compress(sample)
    slow = in_turns(
        {
            "zstd encode": lambda: zstandard.ZstdCompressor(level=19).compress(sample),
            "zstd decode": lambda: zstandard.ZstdDecompressor().decompress(packed),
        },
        ZSTD_ROUNDS,
        warm_up=1,
    )
    rate = {name: len(values) / 1e6 / statistics.median(s) for name, s in seconds.items()}
    rate |= {name: len(sample) / 1e6 / statistics.median(s) for name, s in slow.items()}
    pairs = [("encode", "bare encode"), ("encode", "bare from int8"), ("decode", "bare decode")]
    ratio = {
        f"{way}_over_{other.replace(' ', '_')}": statistics.median(ratios(seconds, other, f"ours {way}"))
        for way, other in pairs
    }
    size = sum(map(len, blobs.values())) + len(data)
    return {
        "values": len(values),
        "tensors": len(tensors),
        "million_values_per_second": {name: round(r, 1) for name, r in rate.items()},
        **{name: round(r, 3) for name, r in ratio.items()},
        "bits": {
            "raw": 8.0,
            "zstd": round(8 * len(packed) / len(sample), 4),
            "bare": round(8 * len(forms["bare encode"]()) * 4 / len(values), 4),
            "ours": round(8 * size / len(values), 4),
            "entropy": round(sum(map(entropy_bits, tensors.values())) / len(values), 4),
        },
    }


def bare(values: np.ndarray) -> dict[str, Callable[[], Any]]:
    """constriction with one table for all values."""
    coder = constriction.stream.stack.AnsCoder
    symbols, model = prepared(values)

    def encoded(symbols: np.ndarray, model: Any) -> np.ndarray:
        found = coder()
        found.encode_reverse(symbols, model)
        return found.get_compressed()

    words = encoded(symbols, model)
    return {
        "bare encode": lambda: encoded(symbols, model),
        "bare from int8": lambda: encoded(*prepared(values)),
        "bare decode": lambda: coder(words).decode(model, len(symbols)),
    }


def prepared(values: np.ndarray) -> tuple[np.ndarray, Any]:
    """Symbols and a table for them."""
    symbols = values.astype(np.int32)
    symbols -= symbols.min()
    shares = np.bincount(symbols) / len(symbols)
    return symbols, constriction.stream.model.Categorical(shares, perfect=False)


def table(cases: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    lines = ["| data | coder | bits | encode, M/s | decode, M/s |", "| --- | --- | --- | --- | --- |"]
    for name, case in cases.items():
        rate, bits = case["million_values_per_second"], case["bits"]
        for coder in ("ours", "bare", "zstd"):
            speed = [f"{rate[f'{coder} {way}']:.1f}" for way in ("encode", "decode")]
            lines.append(f"| {name} | {coder} | {bits[coder]:.3f} | {' | '.join(speed)} |")
        lines.append(f"| {name} | bare from int8 | {bits['bare']:.3f} | {rate['bare from int8']:.1f} | |")
        lines.append(f"| {name} | ours to float32 | {bits['ours']:.3f} | | {rate['weights']:.1f} |")
        lines.append(f"| {name} | raw int8 | {bits['raw']:.3f} | | |")
        lines.append(f"| {name} | entropy | {bits['entropy']:.3f} | | |")
    lines += ["", "| data | encode / bare | encode / bare from int8 | decode / bare |", "| --- | --- | --- | --- |"]
    keys = ("encode_over_bare_encode", "encode_over_bare_from_int8", "decode_over_bare_decode")
    lines += [f"| {name} | {' | '.join(f'{case[key]:.2f}' for key in keys)} |" for name, case in cases.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
