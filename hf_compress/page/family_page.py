"""What the page of a family shows: numbers of its manifest, none of them measured again."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from .. import __version__
from ..family.manifest import Manifest
from ..family.table import format_size, is_less_better, main_metric, share_removed, table_rows
from ..family.variant import Variant
from .document import render_document
from .kinds import kind_of
from .snippet import class_of, load_variant

_METHODS = {"cram": "CrAM", "sfw": "SFW", "tpp": "TPP", "lilnetx": "LilNetX", "one_shot": "none, cut in one shot"}
_TIMING = ("runtime", "samples_per_second", "steps_per_second")
_LARGEST = 2**53  # whole numbers up to here are exact in JavaScript
_CLOSE = 0.01  # of the dense metric
_AXES: tuple[dict[str, str], ...] = (
    {"key": "zeros", "label": "Zeros", "title": "zeros in the compressed weights", "unit": "percent", "better": "more"},
    {"key": "removed", "label": "Removed", "title": "parameters removed", "unit": "percent", "better": "more"},
    {"key": "disk", "label": "Disk", "title": "bytes on disk", "unit": "bytes", "better": "fewer"},
    {"key": "zipped", "label": "Zipped", "title": "bytes after zlib", "unit": "bytes", "better": "fewer"},
    {"key": "latency", "label": "Latency", "title": "latency, dense is 1", "unit": "ratio", "better": "less"},
)


def render_family(family: Manifest) -> str:
    """The page of a family.

    Args:
        family: from a folder or from the Hub, of which only the manifest is read.

    Raises:
        ValueError: for a count that no file or model has.
    """
    family = _checked(family)
    metrics = _metrics(family)
    rows = _rows(family, metrics)
    axes = [axis for axis in _AXES if axis["key"] != "removed" or any(row["values"]["removed"] for row in rows)]
    repo_id = getattr(family, "repo_id", None)
    content = {
        "overline": "Family of checkpoints",
        "lead": _lead(family),
        "link": {"text": repo_id, "address": f"https://huggingface.co/{repo_id}"} if repo_id else None,
        "facts": _facts(family),
        "tiles": _tiles(family, metrics[0] if metrics else None),
        "metrics": [_metric(name) for name in metrics],
        "metric_missing": "No metric: not measured. build_family takes a function `evaluate`, which gives them.",
        "axes": [{**axis, "missing": _missing(axis)} for axis in axes],
        "start": _start(axes, rows),
        "columns": _columns(axes, bool(metrics)),
        "table_title": "All checkpoints",
        "rows": rows,
        "notes": _notes(family, bool(metrics)),
        "footer": f"Made by hf_compress {__version__}. Numbers are those of family.json.",
    }
    return render_document(family_title(family), content)


def family_title(family: Manifest) -> str:
    """The repository, or the folder; a family that a run leaves in its output is called as the run."""
    repo_id = getattr(family, "repo_id", None)
    if repo_id is not None:
        return str(repo_id)
    path = PurePath(family.folder.absolute())
    return path.parent.name if path.name.startswith("_") else path.name


def _checked(family: Manifest) -> Manifest:
    """Without latencies that are no numbers."""

    def check(variant: Variant) -> Variant:
        numbers = {**vars(variant), **variant.metrics}
        for name, value in numbers.items():
            if isinstance(value, int) and abs(value) > _LARGEST:
                raise ValueError(f"{name} of {variant.revision!r} has {len(str(value))} digits; build the family again")
        latency = variant.latency or {}
        times = [latency.get(key) for key in ("milliseconds", "dense_milliseconds")]
        is_sound = all(isinstance(t, (int, float)) and 0 < t < _LARGEST for t in times)
        return variant if is_sound else replace(variant, latency=None)

    return replace(family, dense=check(family.dense), variants=tuple(map(check, family.variants)))


def _metrics(family: Manifest) -> list[str]:
    """The main one first, then others of any checkpoint; no timings."""
    names = dict.fromkeys(name for variant in family.checkpoints for name in variant.metrics)
    found = [n for n in names if not n.endswith(_TIMING) and any(_finite(v.metrics.get(n)) for v in family.checkpoints)]
    main = main_metric({name: family.dense.metrics.get(name) for name in found}) or main_metric(dict.fromkeys(found, 0))
    return sorted(found, key=lambda name: name != main)


def _columns(axes: list[dict[str, str]], is_measured: bool) -> list[dict[str, str]]:
    """As in `table_rows`; the page writes the chosen metric into "metric" and "change"."""
    found = {axis["key"]: {"key": axis["key"], "label": axis["label"].lower(), "title": axis["title"]} for axis in axes}
    metric = [{"key": "metric", "label": ""}, {"key": "change", "label": "vs dense"}] if is_measured else []
    shares = [found[key] for key in ("removed", "zeros") if key in found]
    return [{"key": "name", "label": "variant"}, *shares, *metric, *(found[k] for k in ("disk", "zipped", "latency"))]


def _metric(name: str) -> dict[str, Any]:
    return {"key": name, "label": name.replace("_", " "), "less": is_less_better(name)}


def _rows(family: Manifest, metrics: list[str]) -> list[dict[str, Any]]:
    """A row a checkpoint: texts as in `table_rows`, the numbers behind them, and the snippet that loads it."""
    bare = replace(family.dense, metrics={}), tuple(replace(v, metrics={}) for v in family.variants)
    header, *texts = table_rows(replace(family, dense=bare[0], variants=bare[1]))
    class_name = class_of(family)
    return [
        {
            "name": row[0],
            "kind": kind_of(variant.pattern),
            "detail": _detail(variant),
            "badge": "import hf_compress" if variant.loads_with != "transformers" else None,
            "cells": dict(zip(header, row, strict=True)),
            "values": _values(variant, family.dense),
            "metrics": {name: _scored(variant, family.dense, name) for name in metrics},
            "more": _more(variant),
            "snippet": load_variant(family, variant, class_name),
        }
        for variant, row in zip(family.checkpoints, texts, strict=True)
    ]


def _detail(variant: Variant) -> str:
    trained = ", trained" if variant.pattern and variant.made_by == "trained" else ""
    is_said = variant.storage == "dense" or variant.revision.endswith(variant.storage)
    return variant.revision + trained + ("" if is_said else f", {variant.storage}")


def _values(variant: Variant, dense: Variant) -> dict[str, float | None]:
    latency = variant.latency
    ratio = latency["milliseconds"] / latency["dense_milliseconds"] if latency else None
    return {
        "zeros": 100 * variant.sparsity if _finite(variant.sparsity) else None,
        "removed": 100 * share_removed(variant, dense),
        "disk": variant.bytes,
        "zipped": variant.compressed_bytes,
        "latency": 1.0 if latency and variant.pattern is None else ratio,
    }


def _scored(variant: Variant, dense: Variant, metric: str) -> dict[str, Any]:
    value, reference = variant.metrics.get(metric), dense.metrics.get(metric)
    if value is None or not _finite(value):
        return {"value": None, "text": "nan", "delta": None, "change": ""}
    if variant.pattern is None or reference is None or not _finite(reference):
        return {"value": value, "text": f"{value:.4f}", "delta": None, "change": ""}
    return {"value": value, "text": f"{value:.4f}", "delta": value - reference, "change": f"{value - reference:+.4f}"}


def _more(variant: Variant) -> list[list[str]]:
    """What only the tooltip shows."""
    found = [["parameters", f"{variant.parameters:,}"], ["not zero", f"{variant.nonzero:,}"]]
    if variant.macs is not None:
        found.append(["multiplications", f"{variant.macs:,}"])
    if variant.latency and variant.pattern:
        found.append(["median time", f"{variant.latency['milliseconds']:.2f} ms"])
    return found


def _lead(family: Manifest) -> str:
    count = len(family.variants)
    many = f"{count} compressed variant{'s' if count != 1 else ''}"
    return f"One dense checkpoint and {many} of it. Each was measured as it was loaded back from disk."


def _facts(family: Manifest) -> list[list[str]]:
    data = family.recipe.get("dataset_name")
    facts = [["method", _METHODS.get(family.method, family.method)], ["task", family.task or "not said"]]
    facts += [["base model", family.base_model or "none"]]
    facts += [["data", data]] if isinstance(data, str) else []
    return [*facts, ["versions", ", ".join(f"{name} {version}" for name, version in family.versions.items())]]


def _tiles(family: Manifest, metric: str | None) -> list[dict[str, str]]:
    dense, variants = family.dense, family.variants
    count = f"1 dense, {len(variants)} variant{'s' if len(variants) != 1 else ''}"
    tiles = [{"label": "Checkpoints", "value": str(1 + len(variants)), "note": count}]
    size = f"{format_size(dense.compressed_bytes)} zipped"
    reference = dense.metrics.get(metric) if metric else None
    if metric and reference is not None and _finite(reference):
        label = metric.replace("_", " ")
        tiles.append({"label": f"Dense {label}", "value": f"{reference:.4f}", "note": size})
        close = [v for v in variants if _is_close(v.metrics.get(metric), reference, is_less_better(metric))]
        if close:
            best = min(close, key=lambda v: v.compressed_bytes)
            share = f", {100 * best.compressed_bytes / dense.compressed_bytes:.0f} %" if dense.compressed_bytes else ""
            note = f"{format_size(best.compressed_bytes)} zipped{share}; {label} {best.metrics[metric]:.4f}"
            tiles.append({"label": "Smallest within 1 % of dense", "value": str(best.pattern), "note": note})
    ratios = [v.latency["milliseconds"] / v.latency["dense_milliseconds"] for v in variants if v.latency]
    value = f"{min(ratios):.2f} to {max(ratios):.2f} x" if ratios else "not measured"
    note = "of variants, beside the dense checkpoint" if ratios else "it needs example_inputs"
    return [*tiles, {"label": "Latency", "value": value, "note": note}]


def _is_close(value: float | None, reference: float, is_less_better: bool) -> bool:
    if value is None or not _finite(value):
        return False
    room = _CLOSE * abs(reference)
    return value <= reference + room if is_less_better else value >= reference - room


def _start(axes: list[dict[str, str]], rows: list[dict[str, Any]]) -> int:
    """The first axis over which the checkpoints lie apart: zeros tell nothing of one that was coded or removed."""
    for i, axis in enumerate(axes):
        values = [value for row in rows if (value := row["values"][axis["key"]]) is not None]
        largest = 100 if axis["unit"] == "percent" else max(values, default=0)
        if values and max(values) - min(values) > 0.05 * largest:
            return i
    return 0


def _missing(axis: dict[str, str]) -> str:
    how = " build_family measures it with example_inputs or calibration_data." if axis["key"] == "latency" else ""
    return f"{axis['label']}: not measured.{how}"


def _notes(family: Manifest, is_measured: bool) -> list[str]:
    latency = next((v.latency for v in family.checkpoints if v.latency), None)
    place = "not measured"
    if latency:
        threads = latency.get("threads")
        count = f"{threads} thread{'s' if threads != 1 else ''}, batch {latency.get('batch_size')}"
        place = f"measured on {latency.get('device')}, {count}: the median of one sample beside the dense checkpoint"
        place += " in the same run. It says nothing about other devices"
    notes = [
        "Zeros: share of zeros in the compressed weights. In a dense file they make downloads smaller and compute no "
        "faster by themselves; N:M patterns need a device and a runtime that use them.",
        "Disk: bytes of all files. Zipped: the same after zlib, level 6, which is what a compressed download costs.",
        f"Latency: {place}.",
        "Metrics were measured once, on one evaluation set. They say nothing about other data, nor about rare classes, "
        "which pruning can hurt first."
        if is_measured
        else "No metric was measured: evaluate a variant on your data before you use it.",
    ]
    if any(v.storage == "int8" for v in family.variants):
        notes.append("Variants stored in int8 need `pip install compressed-tensors`.")
    for variant in family.variants:
        if variant.skipped:
            count = f"{len(variant.skipped)} weight{'s' if len(variant.skipped) != 1 else ''}"
            reasons = "; ".join(dict.fromkeys(variant.skipped.values()))
            notes.append(f"{variant.pattern} left {count} dense: {reasons}.")
    return notes


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
