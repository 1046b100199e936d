"""Sizes of a MiniLM in 16 bits, int8 and entropy-coded, beside zstd -19: the encoder's weights, and all files.

Patterns are applied in one shot to the weights of encoder and pooler (10.8 of 22.7 million parameters). The first
column is these alone, and tells the codec; the second is all files. Embeddings, norms and biases lie beside coded
weights in 16 bits, which hold the values of this checkpoint exactly; in the files of compressed-tensors, which
patterns of 8 bits have, they take 32 bits, so that these are compared behind zstd.

    OMP_NUM_THREADS=1 python recipes/benchmarks/coded_sizes.py --model MINILM \\
        --output recipes/benchmarks/results/coded_sizes.json
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import zstandard
from machine import facts
from transformers import AutoModel

import hf_compress as hfc
from hf_compress.codec import encode, entropy_bits
from hf_compress.family.coded import integer_latents, save_coded
from hf_compress.family.footprint import disk_bytes
from hf_compress.family.storage import save_model

PATTERNS = ("int8", "int4", "2:4+int8", "unstructured:0.8+int8")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", required=True, help="folder of MiniLM-L6")
    flags.add_argument("--output", type=Path, required=True)
    options = flags.parse_args()
    model = AutoModel.from_pretrained(options.model)
    count = sum(target.parameter.numel() for target in hfc.find_targets(model).values())
    rows = {"float16": {"weights": 2 * count, "files": files_of(copy.deepcopy(model).half())}}
    for pattern in PATTERNS:
        rows |= sizes_of(copy.deepcopy(model), pattern, count)
    options.output.write_text(
        json.dumps({"what": __doc__, **facts(), "weights": count, "bytes": rows}, indent=2) + "\n"
    )
    for name, row in rows.items():
        print(f"{name:32} {row['weights'] / 1e6:8.2f} MB {row['files'] / 1e6:8.2f} MB")


def sizes_of(model: Any, pattern: str, count: int) -> dict[str, dict[str, float]]:
    """Of one pattern: a byte a weight, the same behind zstd, coded ones, and the entropy."""
    hfc.compress(model, pattern)
    latents, decoders = integer_latents(model, pattern)
    codes = b"".join(latents[name].values.tobytes() for name in latents)
    small = zstandard.ZstdCompressor(19).compress(codes)
    blobs, groups = encode(latents, decoders)
    own = sum(map(len, blobs.values())) + len(groups)
    scales = sum(4 * len(each.values) for each in latents.values())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        integers = integer_files(model, pattern, folder / "int8")
        save_coded(model, folder / "coded", pattern)
        rest = disk_bytes(folder / "coded")[0] - own
    weights = {
        "a byte each": count + scales,
        "zstd -19": len(small) + scales,
        "coded": own,
        "entropy": round(sum(map(entropy_bits, latents.values())) / 8) + scales,
    }
    rows = {f"{pattern}, {name}": {"weights": size, "files": rest + size} for name, size in weights.items()}
    for name, files in integers.items():
        same = "zstd -19" if name.endswith("zstd -19") else "a byte each"
        rows[f"{pattern}, {name}"] = {"weights": weights[same], "files": files}
    return rows


def integer_files(model: Any, pattern: str, folder: Path) -> dict[str, int]:
    """Of all files in the format of compressed-tensors, and of the same behind zstd; empty for fewer bits than 8."""
    if save_model(model, folder, hfc.parse_pattern(pattern)) != "int8":
        return {}
    path, total = folder / "model.safetensors", disk_bytes(folder)[0]
    data = path.read_bytes()
    small = len(zstandard.ZstdCompressor(19).compress(data))
    return {"compressed-tensors": total, "compressed-tensors, zstd -19": total - len(data) + small}


def files_of(model: Any) -> int:
    """Of all files."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return disk_bytes(Path(folder))[0]


if __name__ == "__main__":
    main()
