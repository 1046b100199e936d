"""What other tools of today make of the same checkpoints of a ResNet-20, beside hf_compress at the same size.

Filters: torch-pruning by group magnitude, in all layers or only inside blocks, by layer or global. Beside it
`filters:SHARE` with `remove`, whose share is the multiple of 1/64 with the nearest number of parameters.
Zeros: torch.nn.utils.prune, torch.ao.pruning, torchao and llm-compressor, beside the pattern with as many zeros. Most
of these know Linear layers alone: they get the net as it is, and the same net with its convolutions as matrix products.
Files: int8 of onnxruntime, and its bytes behind zlib, beside entropy-coded files with all that lies in their folder.

Accuracies are points on the test images, with batch norms recalibrated on 1,000 training images, and in parentheses as
cut, on 2,500 test images; int8 of a net that is not pruned needs no recalibration. The images are a lossy JPEG copy of
CIFAR-10, so that only differences count. What a tool cannot do is kept as its message, and so is that it is not
installed: torchao and llmcompressor are no dependencies of the project. The latter asks for older versions of torch,
transformers and compressed-tensors than the project does, and works with these where it is installed without its
dependencies: pip install --no-deps torchao llmcompressor loguru

    OMP_NUM_THREADS=1 python recipes/benchmarks/todays_tools.py --data FOLDER \\
        --checkpoint start=resnet20_jpeg.safetensors --checkpoint NAME=FILE \\
        --output recipes/benchmarks/results/todays_tools.json

A checkpoint is a state dict of resnet20_cifar, or of one in TimmWrapper (.pt) as evidence.py keeps it in --weights.
"""

from __future__ import annotations

import argparse
import bisect
import copy
import functools
import importlib.metadata
import itertools
import json
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import other_tools
import torch
from evidence_runs import Task, coded, images, recalibrate
from kept import Run
from machine import facts
from safetensors.torch import load_file

import hf_compress as hfc
from hf_compress.family.footprint import count_macs, count_parameters

PACKAGES = ("torch-pruning", "torchao", "llmcompressor", "compressed-tensors", "onnx", "onnxruntime")
FILTER_SHARES, ZERO_SHARES = (0.3, 0.5, 0.7), (0.5, 0.8, 0.9)
CODED = ("int8", "int6", "unstructured:0.8+int8")
AS_CUT = 2500
SETTINGS: Run = {
    "task": {"name": "images", "data": "cifar10", "model": "resnet20_cifar", "augmentation": "crop_flip"},
    "held_out": 0,
    "seed": 0,
}
# Tool, what it is called there, its function, and shares besides 2:4.
SPARSIFIERS: tuple[tuple[str, str, Callable[..., None], tuple[float, ...]], ...] = (
    ("torch.ao.pruning", "WeightNormSparsifier", other_tools.weight_norm, ZERO_SHARES),
    ("torchao", "apply_fake_sparsity", other_tools.torchao_fake, ()),
    ("torchao", "sparsify_ to semi_sparse_weight", other_tools.torchao_semi, ()),
    ("torchao", "WandaSparsifier", other_tools.torchao_wanda, ()),
    ("llmcompressor", "SparseGPTModifier", other_tools.sparse_gpt, ZERO_SHARES),
    ("llmcompressor", "WandaPruningModifier", other_tools.wanda, ()),
    ("llmcompressor", "MagnitudePruningModifier", other_tools.magnitude, ()),
)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", type=Path, required=True, help="folder with train-*.parquet and test-*.parquet")
    flags.add_argument("--checkpoint", action="append", required=True, help="NAME=FILE; the start weights first")
    flags.add_argument("--samples", type=int, help="so many test images; all by default")
    flags.add_argument("--output", type=Path, required=True)
    options = flags.parse_args()
    torch.set_num_threads(1)
    task = images(SETTINGS, {"cifar10": str(options.data)})
    count = min(options.samples or task.samples, task.samples)
    task = replace(task, samples=count, score=functools.partial(at_most, task.score, count))
    command = re.sub(r"(?<![\w.])/\S*/", "", " ".join(sys.argv))  # without the folders of this machine
    result: Run = {"what": __doc__, "command": f"OMP_NUM_THREADS=1 python {command}", **facts(), "samples": count}
    result["versions"] |= {package: version(package) for package in PACKAGES}
    for name, file in (each.split("=", 1) for each in options.checkpoint):
        start = time.process_time()
        ground = Ground(loaded(task.parts["model"], Path(file)), task)
        result.setdefault("torch_pruning_of_shortcuts", other_tools.shortcuts(ground.model))
        dense = ground.row("hf_compress", "dense", lambda model: None)
        rows = [dense, *filters(ground), *zeros(ground), *files(ground)]
        own = {"minutes": round((time.process_time() - start) / 60, 1), "rows": rows}
        result["checkpoints"] = {**result.get("checkpoints", {}), name: own}
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(as_text(result))


def at_most(score: Callable[[Any, int | None], float], most: int, model: Any, samples: int | None) -> float:
    return score(model, min(most, samples or most))


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def loaded(model: Any, file: Path) -> Any:
    """The net with the weights of a file, whose names may have the prefix of TimmWrapper."""
    model = copy.deepcopy(model).eval().to(memory_format=torch.contiguous_format)  # torch.nn.utils.prune takes no other
    state = torch.load(file, weights_only=True, map_location="cpu") if file.suffix == ".pt" else load_file(file)
    state = {name.removeprefix("timm_model."): value for name, value in state.items()}
    found = model.timm_model.load_state_dict(state, strict=False)
    missing = [name for name in found.missing_keys if not name.endswith("num_batches_tracked")]
    if missing or found.unexpected_keys:
        raise ValueError(f"{file} is no resnet20_cifar: it lacks {missing} and has {found.unexpected_keys} instead")
    return model


@dataclass(frozen=True)
class Ground:
    """One checkpoint, and what judges all that is made of it."""

    model: Any
    task: Task

    def batches(self) -> list[Any]:
        """The training images that batch norms are recalibrated on."""
        torch.manual_seed(SETTINGS["seed"])
        return list(self.task.batches())

    def ours(self, pattern: str, **options: Any) -> Any:
        model = copy.deepcopy(self.model)
        hfc.compress(model, pattern, **options)
        return model

    def row(self, tool: str, how: str, cut: Callable[[Any], Any], pattern: str | None = None) -> Run:
        """What is left of a copy that a tool cuts, or what the tool says instead; errors of ours are raised.

        Args:
            tool: its name.
            how: what it is told.
            cut: the tool itself.
            pattern: of ours that is compared; "differs" counts the weights that are zero with one of the two alone.
        """
        row: Run = {"tool": tool, "how": how}
        model = copy.deepcopy(self.model)
        try:
            cut(model)
        except Exception as error:
            if tool == "hf_compress":
                raise
            return {**row, "error": other_tools.said(error)}
        masks = [target.parameter == 0 for target in hfc.find_targets(model).values()]
        row["zeros"] = sum(int(mask.sum()) for mask in masks)
        row["share"] = round(row["zeros"] / sum(mask.numel() for mask in masks), 4)
        row |= {"parameters": count_parameters(model)[0]}
        row["macs"] = count_macs(model, {"pixel_values": other_tools.EXAMPLE})
        if pattern:
            weights = [target.parameter for target in hfc.find_targets(self.ours(pattern)).values()]
            differs = sum(int((mask != (w == 0)).sum()) for mask, w in zip(masks, weights, strict=True))
            row |= {"pattern": pattern, "differs": differs}
        row["as_cut"] = self.task.score(model, AS_CUT)
        recalibrate(model, SETTINGS, self.task)
        return {**row, "recalibrated": self.task.score(model, None)}


def filters(ground: Ground) -> list[Run]:
    """torch-pruning, each followed by our filters with about as many parameters."""
    rows: list[Run] = []
    count = functools.cache(lambda part: count_parameters(ground.ours(f"filters:{part / 64}", remove=True))[0])
    for is_inside, is_global, share in itertools.product((False, True), (False, True), FILTER_SHARES):
        how = f"{'inside blocks' if is_inside else 'all layers'}, {'global' if is_global else 'by layer'}, {share}"
        options = {"share": share, "is_global": is_global, "is_inside": is_inside}
        theirs = ground.row("torch-pruning", how, functools.partial(other_tools.torch_pruning, **options))
        rows.append({**theirs, "kind": "filters"})
        if "error" in theirs:
            continue
        pattern = nearest(count, theirs["parameters"])
        for include in (["*layer*.conv1"],) if is_inside else (None, ["*layer*.conv1"]):
            cut = functools.partial(hfc.compress, pattern=pattern, include=include, remove=True)
            own = ground.row("hf_compress", f"{'inside blocks' if include else 'filters'}, as large as {how}", cut)
            off = round(own["parameters"] / theirs["parameters"] - 1, 4)
            rows.append({**own, "kind": "filters", "pattern": pattern, "parameters_off": off})
    return rows


def nearest(count: Callable[[int], int], parameters: int) -> str:
    """The filters whose removal leaves the nearest number of parameters: all widths are parts of 64."""
    above = bisect.bisect_left(range(1, 63), -parameters, key=lambda part: -count(part))  # counts fall with the share
    part = min((max(above, 1), above + 1), key=lambda part: abs(count(part) - parameters))
    return f"filters:{part / 64}"


def zeros(ground: Ground) -> list[Run]:
    """Our patterns, and tools that write zeros, each compared with the pattern that has as many."""
    ours = ["2:4", *(f"unstructured:{share}{scope}" for share in ZERO_SHARES for scope in (":layer", ""))]
    rows = [ground.row("hf_compress", pattern, functools.partial(hfc.compress, pattern=pattern)) for pattern in ours]
    for pattern in ours[2::2]:
        count = next(row["zeros"] for row in rows if row["how"] == pattern)
        cut = functools.partial(other_tools.global_unstructured, count=count)
        share = pattern.split(":")[1]
        rows.append(ground.row("torch.nn.utils.prune", f"global_unstructured, {share}", cut, pattern))
    for tool, name, function, shares in SPARSIFIERS:
        for share in (None, *shares):
            pattern = f"unstructured:{share}:layer" if share else "2:4"
            cut = functools.partial(function, share=share, batches=ground.batches())
            if not share:  # at other shares it fails alike
                rows.append(ground.row(tool, f"{name}, 2:4, net as it is", cut, pattern))
            report = hfc.compress(copy.deepcopy(ground.model), pattern)
            layers = [each.removesuffix(".weight") for each in report.layers if each not in report.skipped]
            by_matrices = functools.partial(other_tools.as_matrices, cut=cut, names=layers)
            rows.append(ground.row(tool, f"{name}, {share or '2:4'}, as matrices", by_matrices, pattern))
    return rows


def files(ground: Ground) -> list[Run]:
    """Bytes and accuracy of int8 in onnxruntime, and of our coded files."""
    pruned = ground.ours("unstructured:0.8")
    recalibrate(pruned, SETTINGS, ground.task)
    static = "quantize_static, QDQ, per channel"
    rows = in_onnxruntime(ground, ground.model, ["float32", "quantize_dynamic", static], "")
    rows += in_onnxruntime(ground, pruned, [static], ", after our unstructured:0.8")
    for pattern in CODED:
        found = coded(ground.model, pattern, SETTINGS, ground.task)
        kind = "as_cut" if pattern == "int8" else "recalibrated"
        rows.append(
            {"tool": "hf_compress", "how": f"{pattern}, coded", "bytes": found["bytes"], kind: found["as_loaded"]}
        )
    return rows


def in_onnxruntime(ground: Ground, model: Any, hows: list[str], after: str) -> list[Run]:
    """Rows of files that one export becomes; with new statistics of batch norms where the model was cut."""
    rows: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        for how in hows:
            row: Run = {"tool": "onnxruntime", "how": how + after}
            try:
                path = other_tools.exported(model, how.split(",")[0], Path(folder), ground.batches())
                net = other_tools.InOnnxruntime(path)
            except Exception as error:
                rows.append({**row, "error": other_tools.said(error)})
                continue
            row |= {"bytes": path.stat().st_size, "zipped": len(zlib.compress(path.read_bytes(), 9))}
            rows.append({**row, "recalibrated" if after else "as_cut": ground.task.score(net, None)})
    return rows


def as_text(result: Run) -> str:
    """A table of Markdown with a column for each checkpoint, and below it what tools say that they cannot."""
    by = {name: {(row["tool"], row["how"]): row for row in own["rows"]} for name, own in result["checkpoints"].items()}
    lines = ["| tool | how | " + " | ".join(by) + " |", "| --- " * (2 + len(by)) + "|"]
    said: dict[str, list[str]] = {}
    for tool, how in dict.fromkeys(key for rows in by.values() for key in rows):
        found = [rows.get((tool, how), {}) for rows in by.values()]
        for text in {row["error"] for row in found if "error" in row}:
            said.setdefault(text, []).append(f"{tool}: {how}")
        lines.append(f"| {tool} | {how} | " + " | ".join(map(cell, found)) + " |")
    return "\n".join([*lines, "", *(f"* {'; '.join(where)}: {text}" for text, where in said.items())])


def cell(row: Run) -> str:
    """The size, and the accuracy with recalibrated batch norms (and without)."""
    if not row or "error" in row:
        return "error" if row else ""
    size = f"{100 * row['share']:.1f} % zeros" if "share" in row else f"{row['bytes'] / 1e3:.0f} kB"
    if row.get("kind") == "filters":
        size = f"{row['parameters'] / 1e3:.1f} k, {row['macs'] / 1e6:.1f} M MACs"
    if "zipped" in row:
        size += f", {row['zipped'] / 1e3:.0f} zipped"
    points = [f"{row[kind]:.1f}" for kind in ("recalibrated", "as_cut") if kind in row]
    return f"{size}: {points[0]}" + (f" ({points[1]})" if points[1:] else "")


if __name__ == "__main__":
    main()
