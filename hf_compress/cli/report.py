"""`hf-compress report`: what pruning would cost a checkpoint, or the table and the picture of a family once more."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..family import Family, is_family, load_family
from ..family.manifest import MANIFEST
from ..family.plots import plot_family
from ..family.table import format_count, format_percent, format_size
from ..page import save_page
from ..report import CheckpointReport, inspect_checkpoint
from ..report.plots import plot_report
from .table import render

_WORST = 8
_NAME = 46  # characters of a layer's name
_WIDTH = 110
_SENSITIVITY = "Sensitivity: by how much the outputs of a layer change (root mean square) for inputs of length 1."


def report(argv: Sequence[str]) -> None:
    """Report a checkpoint, which needs no data, or a family, from the numbers in its manifest."""
    parser = argparse.ArgumentParser(
        prog="hf-compress report",
        description="What pruning would leave of a checkpoint, layer by layer, without data, training or loading it: "
        "energy kept, bytes, decay of singular values, bottlenecks. Of a family: its table and picture, from its "
        "manifest.",
    )
    parser.add_argument("model", help="folder, file or Hub id of any checkpoint; folder or Hub id of a family")
    parser.add_argument(
        "--pattern", action="append", help="such as unstructured:0.8 or 2:4; repeatable; a grid of them"
    )
    parser.add_argument("--include", nargs="+", help="globs on names of weights to look at")
    parser.add_argument("--exclude", nargs="+", help="globs on names of weights to leave out")
    parser.add_argument("--revision", help="of a Hub checkpoint or family")
    parser.add_argument("--output_dir", help="for report.json, .png and .svg; out/report/NAME by default")
    parser.add_argument("--json", action="store_true", help="print JSON, and write files only to a given --output_dir")
    parser.add_argument("--html", action="store_true", help="write index.html too: one page, also a static Space")
    args = parser.parse_args(argv)
    if args.html and args.json and args.output_dir is None:
        raise ValueError("--json writes files only to a given --output_dir; give one for the page of --html")
    folder = Path(args.output_dir or Path("out", "report", _name(args.model)))
    writes = args.output_dir is not None or not args.json
    made = _make(folder) if writes else []
    try:
        _report(args, folder, writes)
    except BaseException:
        for empty in made:
            with suppress(OSError):
                empty.rmdir()
        raise


def _report(args: argparse.Namespace, folder: Path, writes: bool) -> None:
    # A family on the Hub has its dense checkpoint on main: what is asked of weights is asked of that one.
    is_of_weights = not Path(args.model).is_dir() and (args.pattern or args.include or args.exclude)
    if not is_of_weights and is_family(args.model, args.revision):
        _report_family(args, folder, writes)
        return
    found = inspect_checkpoint(
        args.model,
        args.pattern,
        revision=args.revision,
        include=args.include,
        exclude=args.exclude,
        progress=_show_progress if sys.stderr.isatty() else None,
    )
    print(found.to_json() if args.json else _text(found))
    if writes:
        found.save(folder / "report.json")
        paths = plot_report(found, folder / "report")
        if not args.json:
            print(f"\nreport   {folder / 'report.json'}")
            print("".join(f"picture  {path}\n" for path in paths[:1]), end="")
        _save_page(args, found, folder)


def _report_family(args: argparse.Namespace, folder: Path, writes: bool) -> None:
    """Numbers of a manifest are measured; nothing is measured again."""
    is_local = Path(args.model).is_dir()
    if args.pattern or args.include or args.exclude or (is_local and args.revision):
        raise ValueError(
            f"{args.model} is a family, whose numbers are in its manifest: --pattern, --include, --exclude and "
            f"--revision are for checkpoints, such as {Path(args.model) / 'dense'}"
        )
    family = load_family(args.model, args.revision)
    print((family.folder / MANIFEST).read_text(encoding="utf-8") if args.json else render(family))
    paths = plot_family(family, folder / "sparsity") if writes else []
    if not args.json:
        print("".join(f"\npicture  {path}\n" for path in paths[:1]), end="")
    _save_page(args, family, folder)


def _save_page(args: argparse.Namespace, subject: Family | CheckpointReport, folder: Path) -> None:
    if args.html:
        path = save_page(subject, folder, args.revision)
        if not args.json:
            print(f"page     {path}")


def _name(model: str) -> str:
    """Of the folder for a report: the last word of a path; the family that a run leaves is named after the run."""
    path = Path(model).absolute()
    stem = path.name.removesuffix(".safetensors")
    return f"{path.parent.name}{stem}" if stem.startswith("_") else stem


def _make(folder: Path) -> list[Path]:
    """A folder that cannot be written fails before the work; those that are new, from the inside out."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; choose another --output_dir") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write to {folder}: permission denied; choose another --output_dir")
    return made


def _show_progress(done: int, count: int) -> None:
    print(f"\r{done} of {count} layers", end="" if done < count else "\r\033[K", file=sys.stderr, flush=True)


def _text(found: CheckpointReport) -> str:
    architecture = f"{found.architecture}, " if found.architecture else ""
    parameters = format_count(found.parameters).replace("G", "B")
    lines = [
        f"{found.model}: {architecture}{parameters} parameters, {len(found.layers)} layers to compress",
        "",
        *_table(_total_rows(found)),
        "",
        f"Zipped sizes are {found.bytes_are}; energy kept is the share of the sum of squares."
        if found.patterns
        else "",
    ]
    rows = _layer_rows(found)
    if len(rows) > 1:
        lines += ["", f"Most sensitive to {found.reference}, without data:", "", *_table(rows), "", _SENSITIVITY]
    if found.collapsed:
        names = ", ".join(_short(name) for name in found.collapsed[:3]) + (", ..." if len(found.collapsed) > 3 else "")
        count = f"{len(found.collapsed)} layer{'s' if len(found.collapsed) > 1 else ''}"
        lines += ["", _wrapped(f"{found.reference} leaves less than 10 % of the energy of {count}: {names}")]
    if found.notes:
        lines += ["", *(_wrapped(f"note: {note}") for note in found.notes)]
    return "\n".join(lines)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _total_rows(found: CheckpointReport) -> list[list[str]]:
    """Totals; the column within layers belongs to unstructured patterns."""
    rows = [["pattern", "zeros", "energy kept", "within layers", "disk", "zipped", "of dense"]]
    dense = found.compressed_bytes
    rows.append(["as it is", format_percent(found.sparsity), "", "", format_size(found.bytes), format_size(dense), ""])
    for text, numbers in found.patterns.items():
        whole = text.removesuffix(":layer")
        if whole != text and whole in found.patterns:
            continue
        within = found.patterns.get(f"{text}:layer")
        rows.append(
            [
                text,
                format_percent(numbers.sparsity),
                format_percent(numbers.energy),
                format_percent(within.energy) if within else "",
                format_size(numbers.bytes),
                format_size(numbers.compressed_bytes),
                f"{100 * numbers.compressed_bytes / dense:.0f} %" if dense else "",
            ]
        )
    return rows


def _layer_rows(found: CheckpointReport) -> list[list[str]]:
    rows = [
        ["layer", "shape", "sensitivity", "zeros", "energy kept", *(["2:4 keeps"] if "2:4" in found.patterns else [])]
    ]
    layers = {layer.name: layer for layer in found.layers}
    for name in found.bottlenecks[:_WORST]:
        layer = layers[name]
        numbers = layer.patterns[found.reference]
        shape = "x".join(map(str, layer.shape))
        row = [
            _short(name),
            shape,
            f"{numbers.sensitivity:.3g}",
            format_percent(numbers.sparsity),
            format_percent(numbers.energy),
        ]
        if "2:4" in found.patterns:
            two_of_four = layer.patterns["2:4"]
            row.append("dense" if two_of_four.skipped else format_percent(two_of_four.energy))
        rows.append(row)
    return rows


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths).rstrip(), *lines[1:]]


def _short(name: str) -> str:
    name = name.removesuffix(".weight")
    return name if len(name) <= _NAME else "..." + name[3 - _NAME :]
