"""What the page of a plain checkpoint shows: what patterns would leave of it, and the layers that would suffer most."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from .. import __version__
from ..family.table import format_count, format_percent, format_size
from ..report import CheckpointReport, LayerNumbers, PatternNumbers
from .document import render_document
from .kinds import kind_of
from .snippet import cut_while_loading

_LAYERS = 24
_AXES = (
    {"key": "zeros", "label": "Zeros", "title": "zeros in the compressed weights", "unit": "percent", "better": "more"},
    {"key": "zipped", "label": "Zipped", "title": "bytes after zlib", "unit": "bytes", "better": "fewer"},
)
_COLUMNS = (
    {"key": "name", "label": "pattern"},
    {"key": "zeros", "label": "zeros", "title": "share of zeros in the compressed weights"},
    {"key": "metric", "label": ""},
    {"key": "disk", "label": "disk", "title": "bytes of all tensors"},
    {"key": "zipped", "label": "zipped", "title": "the same after zlib"},
    {"key": "share", "label": "of dense", "title": "zipped bytes, beside those of the checkpoint as it is"},
)


def render_checkpoint(report: CheckpointReport, revision: str | None = None) -> str:
    """The page of a checkpoint.

    Args:
        report: of `inspect_checkpoint`.
        revision: of a checkpoint on the Hub, for the snippets.
    """
    has_snippets = cut_while_loading(report, None, revision) is not None
    rows = [_dense_row(report, cut_while_loading(report, None, revision))]
    for text, numbers in report.patterns.items():
        rows.append(_row(report, text, numbers, cut_while_loading(report, text, revision)))
    content = {
        "overline": "What pruning would leave of it",
        "lead": "Measured on the weights alone: no data, no training, no evaluation.",
        "link": None,
        "facts": _facts(report, revision),
        "tiles": _tiles(report),
        "metrics": [{"key": "energy", "label": "energy kept", "less": False, "unit": "percent"}],
        "metric_missing": "Energy kept: not measured.",
        "axes": [{**axis, "missing": f"{axis['label']}: not measured."} for axis in _AXES],
        "columns": list(_COLUMNS),
        "table_title": "All patterns",
        "rows": rows,
        "layers": _layers(report),
        "notes": _notes(report, has_snippets),
        "footer": f"Made by hf_compress {__version__}. report.json has the numbers of every layer.",
    }
    return render_document(checkpoint_title(report), content)


def checkpoint_title(report: CheckpointReport) -> str:
    """The Hub id, or the last word of a path."""
    is_id = (
        report.model.count("/") == 1 and not report.model.startswith((".", "/")) and not PurePath(report.model).suffix
    )
    return report.model if is_id else PurePath(report.model).name or report.model


def _dense_row(report: CheckpointReport, snippet: str | None) -> dict[str, Any]:
    disk, zipped = report.bytes, report.compressed_bytes
    return {
        "name": "as it is",
        "kind": "dense",
        "cells": {
            "zeros": format_percent(report.sparsity),
            "disk": format_size(disk),
            "zipped": format_size(zipped),
            "share": "",
        },
        "values": {"zeros": 100 * report.sparsity, "disk": disk, "zipped": zipped, "share": 100.0},
        "metrics": {"energy": {"value": 100.0, "text": "100.0 %", "delta": None, "change": ""}},
        "more": [["parameters", f"{report.parameters:,}"]],
        "snippet": snippet,
    }


def _row(report: CheckpointReport, text: str, numbers: PatternNumbers, snippet: str | None) -> dict[str, Any]:
    share = 100 * numbers.compressed_bytes / report.compressed_bytes if report.compressed_bytes else None
    energy = None if numbers.energy is None else 100 * numbers.energy
    return {
        "name": text,
        "kind": kind_of(text),
        "cells": {
            "zeros": format_percent(numbers.sparsity),
            "disk": format_size(numbers.bytes),
            "zipped": format_size(numbers.compressed_bytes),
            "share": "-" if share is None else f"{share:.0f} %",
        },
        "values": {
            "zeros": 100 * numbers.sparsity,
            "disk": numbers.bytes,
            "zipped": numbers.compressed_bytes,
            "share": share,
        },
        "metrics": {"energy": {"value": energy, "text": format_percent(numbers.energy), "delta": None, "change": ""}},
        "more": [],
        "snippet": snippet,
    }


def _facts(report: CheckpointReport, revision: str | None) -> list[list[str]]:
    facts = [["architecture", report.architecture or "unknown"], ["checkpoint", report.model]]
    return [*facts, ["revision", revision]] if revision else facts


def _tiles(report: CheckpointReport) -> list[dict[str, str]]:
    worst = report.bottlenecks[0] if report.bottlenecks else None
    zipped = f"{format_size(report.compressed_bytes)} zipped, {report.bytes_are}"
    tiles = [
        {
            "label": "Parameters",
            "value": format_count(report.parameters).replace("G", "B").strip(),
            "note": f"{len(report.layers)} layers to compress",
        },
        {"label": "Disk", "value": format_size(report.bytes), "note": zipped},
    ]
    reference = report.patterns.get(report.reference)
    if reference is not None:
        note = f"{format_size(reference.compressed_bytes)} zipped"
        tiles.append({"label": f"{report.reference} keeps", "value": format_percent(reference.energy), "note": note})
    if worst is not None:
        note = f"to {report.reference}"
        tiles.append({"label": "Most sensitive layer", "value": worst.removesuffix(".weight"), "note": note})
    return tiles


def _layers(report: CheckpointReport) -> dict[str, Any] | None:
    layers = {layer.name: layer for layer in report.layers}
    chosen = [layers[name] for name in report.bottlenecks[:_LAYERS]]
    if not chosen:
        return None
    columns: list[dict[str, Any]] = [
        {"key": "name", "label": "layer"},
        {"key": "sensitivity", "label": "sensitivity", "title": "by how much its outputs change", "bar": True},
        {"key": "zeros", "label": "zeros"},
        {"key": "energy", "label": "energy kept"},
    ]
    if "2:4" in report.patterns and report.reference != "2:4":
        columns.append({"key": "two_of_four", "label": "2:4 keeps"})
    return {
        "title": f"Layers most sensitive to {report.reference}",
        "note": f"{len(chosen)} of {len(report.layers)}",
        "columns": columns,
        "rows": [_layer_row(layer, report.reference) for layer in chosen],
    }


def _layer_row(layer: LayerNumbers, reference: str) -> dict[str, Any]:
    numbers, other = layer.patterns[reference], layer.patterns.get("2:4")
    two_of_four = None if other is None or other.skipped else other.energy
    return {
        "name": layer.name.removesuffix(".weight"),
        "detail": " x ".join(map(str, layer.shape)),
        "cells": {
            "sensitivity": f"{numbers.sensitivity:.3g}" if numbers.sensitivity is not None else "-",
            "zeros": format_percent(numbers.sparsity),
            "energy": format_percent(numbers.energy),
            "two_of_four": "dense" if other is not None and other.skipped else format_percent(two_of_four),
        },
        "values": {
            "sensitivity": numbers.sensitivity,
            "zeros": numbers.sparsity,
            "energy": numbers.energy,
            "two_of_four": two_of_four,
        },
    }


def _notes(report: CheckpointReport, has_snippets: bool) -> list[str]:
    notes = [
        "Energy kept: share of the sum of squares of the weights that a pattern leaves. It is no accuracy: evaluate a "
        "pruned model on your data before you use it.",
        f"Zipped: bytes of all tensors after zlib, level 6, {report.bytes_are}.",
        "Sensitivity: by how much the outputs of a layer change, in the root mean square, for inputs of length 1 in "
        "random directions.",
        "Latency: not measured. Zeros in a dense file compute no faster by themselves.",
    ]
    if has_snippets:
        notes.append("The snippets cut the checkpoint while it is loaded, and write no file.")
    if report.collapsed:
        names = ", ".join(name.removesuffix(".weight") for name in report.collapsed[:3])
        more = ", …" if len(report.collapsed) > 3 else ""
        count = f"{len(report.collapsed)} layer{'s' if len(report.collapsed) > 1 else ''}"
        notes.append(f"{report.reference} leaves less than 10 % of the energy of {count}: {names}{more}.")
    return [*notes, *report.notes]
