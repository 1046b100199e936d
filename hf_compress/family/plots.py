"""The picture of a family: its metric over sparsity, with the dense checkpoint as a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .manifest import Manifest
from .table import main_metric, share_removed
from .variant import Variant

_INK, _QUIET, _LINE, _POINT = "#1a1a1a", "#8a8a8a", "#2a6fbb", "#d1603d"

# A $ in the name of a metric or a folder is no formula; names inside SVG files are drawn at random without a salt.
LOOKS: Any = {"text.parse_math": False, "svg.hashsalt": "hf_compress"}


def plot_family(family: Manifest, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg.

    Returns:
        The two paths; none where the family has no metric.
    """
    metric = main_metric(family.dense.metrics)
    variants = [v for v in family.variants if metric is not None and v.metrics.get(metric) is not None]
    if metric is None or not variants:
        return []
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    with rc_context(LOOKS):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        _draw(figure.add_subplot(), family, variants, metric)
        figure.savefig(paths[0], dpi=160, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _draw(axes: Any, family: Manifest, variants: list[Variant], metric: str) -> None:
    dense = family.dense.metrics[metric]
    curve = sorted((v for v in variants if v.revision.startswith("unstructured")), key=lambda v: v.sparsity)
    others = [v for v in variants if v not in curve]
    shrinks, is_coded = any(v.parameters_removed for v in variants), any(v.storage == "coded" for v in variants)
    is_trained = all(v.made_by == "trained" for v in variants)
    axes.axhline(dense, color=_QUIET, linestyle=(0, (4, 3)), linewidth=1.2, label=f"dense, {dense:.3f}", zorder=1)
    if curve:
        x, y = [100 * v.sparsity for v in curve], [v.metrics[metric] for v in curve]
        axes.plot(x, y, color=_LINE, marker="o", markersize=5, linewidth=2, label="unstructured", zorder=2)
    if others:
        gone = [_saved(v, family.dense) for v in others]
        x, y = [100 * share for share in gone], [v.metrics[metric] for v in others]
        name = "N:M" if all(v.revision.startswith("nm-") for v in others) else "other patterns"
        name = "trained" if is_trained else name
        axes.plot(x, y, color=_POINT, marker="D", markersize=6, linestyle="none", label=name, zorder=3)
        for variant, right, top in zip(others, x, y, strict=True):
            axes.annotate(str(variant.pattern), (right, top), (6, -12), textcoords="offset points", color=_POINT)
    axes.margins(y=0.15)  # room for the names below their points
    shown = (v.metrics[metric] for v in (family.dense, *variants))
    if max(value for value in shown if value is not None) <= 1:  # shares do not go above 1, nor matter below a point
        top = min(axes.get_ylim()[1], 1.005)
        axes.set_ylim(min(axes.get_ylim()[0], top - 0.02), top)
    if shrinks or is_coded:
        axes.set_xlim(0, 100)
    axes.set_xlabel(_name_of_shares(curve, shrinks, is_coded), color=_INK)
    axes.set_ylabel(metric.replace("_", " "), color=_INK)
    made = "Trained beside the dense checkpoint" if is_trained else "Cut in one shot from one dense checkpoint"
    axes.set_title(f"{made} ({family.method})", loc="left", color=_INK, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="best")


def _saved(variant: Variant, dense: Variant) -> float:
    """What a variant no longer has: bytes where they are coded, else parameters, else weights that are not zero."""
    if variant.storage == "coded" and dense.bytes:
        return max(0.0, 1 - variant.bytes / dense.bytes)
    return share_removed(variant, dense) or variant.sparsity


def _name_of_shares(curve: list[Variant], shrinks: bool, is_coded: bool) -> str:
    names = ["zeros in the compressed weights"] if curve or not is_coded else []
    names += ["parameters removed"] if shrinks else []
    names += ["bytes saved by coding"] if is_coded else []
    return f"{', or '.join(names)}, %"
