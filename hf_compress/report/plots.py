"""The picture of a report: curves of the whole checkpoint above, every layer under every pattern below."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..family.plots import LOOKS
from ..patterns import Unstructured, parse_pattern
from .result import CheckpointReport, LayerNumbers, PatternNumbers

_INK, _QUIET, _LINE, _SECOND, _POINT = "#1a1a1a", "#8a8a8a", "#2a6fbb", "#7fb2e5", "#d1603d"
_NAMED = 8  # bottlenecks that are marked, and at most a third of the layers
_ALL_NAMES = 64  # layers up to which every row has its name
_GAP = 0.35  # between groups of columns
_Column = tuple[str, str, Callable[[LayerNumbers], float | None]]  # group, label, share that is kept


def plot_report(report: CheckpointReport, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg.

    Returns:
        The two paths; none where no layer could be measured.
    """
    layers = [layer for layer in report.layers if not layer.problem]
    if not layers or not report.patterns:
        return []
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    with rc_context(LOOKS):
        rows = min(11.0, max(2.0, 0.19 * len(layers)))
        figure = Figure(figsize=(11, 4.4 + rows), layout="constrained")
        FigureCanvasAgg(figure)
        _draw(figure, report, layers, rows)
        figure.savefig(paths[0], dpi=130, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _draw(figure: Any, report: CheckpointReport, layers: list[LayerNumbers], rows: float) -> None:
    above, below = figure.subfigures(2, 1, height_ratios=(3.1, rows + 1.3), hspace=0.03)
    energy, size = above.subplots(1, 2)
    _draw_curves(energy, report, ("global", "layer"), lambda n: n.energy, "energy kept, %")
    _draw_curves(
        size, report, ("global",), lambda n: n.compressed_bytes / report.compressed_bytes, "zipped, % of dense"
    )
    _draw_layers(below, report, layers)
    millions = report.parameters / 1e6
    count = f"{millions:.{1 if millions >= 1 else 3}f} M parameters, {len(report.layers)} layers to compress"
    figure.suptitle(f"{Path(report.model).name}: {count}", x=0.01, ha="left", color=_INK, fontsize=12)


def _draw_curves(
    axes: Any,
    report: CheckpointReport,
    scopes: tuple[str, ...],
    value: Callable[[PatternNumbers], float | None],
    label: str,
) -> None:
    """Shares over zeros: lines of unstructured patterns, points of all others."""
    looks = {"global": (_LINE, "unstructured, over all layers"), "layer": (_SECOND, "unstructured, within each layer")}
    curves: dict[str, list[tuple[float, float]]] = {scope: [(report.sparsity, 1.0)] for scope in looks}
    points: dict[str, tuple[float, float]] = {}
    for text, numbers in report.patterns.items():
        pattern, height = parse_pattern(text), value(numbers)
        if height is None:
            continue
        if isinstance(pattern, Unstructured):
            curves[pattern.scope].append((numbers.sparsity, height))
        else:
            points[text] = (numbers.sparsity, height)
    for scope in scopes:
        if len(curves[scope]) > 1:
            zeros, kept = zip(*[(100 * a, 100 * b) for a, b in sorted(curves[scope])], strict=True)
            color, name = looks[scope]
            axes.plot(zeros, kept, color=color, marker="o", markersize=4.5, linewidth=2, label=name)
    for texts, (x, y) in _clusters(points):
        shift, side = ((7, -13), "left") if x < 0.2 else ((-5, -14), "right")
        place = {"textcoords": "offset points", "ha": side, "color": _POINT, "fontsize": 9}
        axes.annotate(texts, (100 * x, 100 * y), shift, **place)
    for x, y in points.values():
        axes.plot([100 * x], [100 * y], color=_POINT, marker="D", markersize=5.5, linestyle="none")
    axes.set_xlabel("zeros in the compressed weights, %", color=_INK)
    axes.set_ylabel(label, color=_INK)
    axes.set_ylim(0, 104)
    axes.set_xlim(-2, 100)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    if axes.lines and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="lower left", fontsize=9)


def _clusters(points: dict[str, tuple[float, float]]) -> list[tuple[str, tuple[float, float]]]:
    """Points that lie so close that their labels would overlap share one, at the lowest of them."""
    found: list[tuple[str, tuple[float, float]]] = []
    for text, (x, y) in sorted(points.items(), key=lambda item: -item[1][1]):
        for i, (texts, (a, b)) in enumerate(found):
            if abs(a - x) < 0.1 and abs(b - y) < 0.08:
                found[i] = (f"{texts}, {text}", (a, min(b, y)))
                break
        else:
            found.append((text, (x, y)))
    return found


def _columns(report: CheckpointReport, layers: list[LayerNumbers]) -> list[_Column]:
    columns: list[_Column] = []

    def kept(text: str) -> Callable[[LayerNumbers], float | None]:
        return lambda layer: None if layer.patterns[text].skipped else layer.patterns[text].energy

    def in_rank(rank: str) -> Callable[[LayerNumbers], float | None]:
        return lambda layer: layer.spectrum.energy[rank] if layer.spectrum else None

    for text in report.patterns:
        pattern = parse_pattern(text)
        if isinstance(pattern, Unstructured):
            group = "% zeros, over all layers" if pattern.scope == "global" else "% zeros, within each layer"
            columns.append((group, f"{100 * pattern.share:g}", kept(text)))
        else:
            columns.append(("other patterns", text, kept(text)))
    ranks = next((list(layer.spectrum.energy) for layer in layers if layer.spectrum), [])
    for rank in sorted(ranks, reverse=True):
        columns.append(("% of rank kept", f"{100 * float(rank):g}", in_rank(rank)))
    order = list(dict.fromkeys(group for group, _, _ in columns))
    return sorted(columns, key=lambda column: order.index(column[0]))


def _draw_layers(figure: Any, report: CheckpointReport, layers: list[LayerNumbers]) -> None:
    """The heat map, and beside it how sensitive each layer is."""
    columns = _columns(report, layers)
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=(4.6, 1))
    named = set(report.bottlenecks[: min(_NAMED, max(1, len(layers) // 3))])
    edges, left, image = [0.0], 0.0, None
    ticks: list[float] = []
    for group in dict.fromkeys(group for group, _, _ in columns):
        chosen = [column for column in columns if column[0] == group]
        values = [[_percent(value(layer)) for _, _, value in chosen] for layer in layers]
        extent = (left, left + len(chosen), len(layers) - 0.5, -0.5)
        image = heat.imshow(values, extent=extent, aspect="auto", cmap=_colors(), vmin=0, vmax=100)
        heat.text(left + len(chosen) / 2, -0.9, group, ha="center", va="bottom", fontsize=9, color=_INK)
        ticks += [left + i + 0.5 for i in range(len(chosen))]
        left += len(chosen) + _GAP
        edges.append(left)
    heat.set_xlim(0, left - _GAP)
    heat.set_xticks(ticks, [label for _, label, _ in columns], fontsize=9)
    rows = [i for i, layer in enumerate(layers) if len(layers) <= _ALL_NAMES or layer.name in named]
    heat.set_yticks(rows, [_short(layers[i].name) for i in rows], fontsize=7.5)
    for row, label in zip(rows, heat.get_yticklabels(), strict=True):
        label.set_color(_POINT if layers[row].name in named else _INK)
    heat.tick_params(length=0)
    heat.spines[:].set_visible(False)
    lengths = [layer.patterns[report.reference].sensitivity for layer in layers]
    bars.barh(range(len(layers)), lengths, color=[_POINT if layer.name in named else _QUIET for layer in layers])
    bars.text(0, -0.9, f"sensitivity to {report.reference}", va="bottom", fontsize=9, color=_INK)
    bars.tick_params(axis="y", length=0)
    bars.spines[["top", "right"]].set_visible(False)
    figure.colorbar(image, ax=bars, label="energy kept, %", shrink=min(1.0, 30 / len(layers)), anchor=(0, 1))


def _colors() -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"].with_extremes(bad="#ececec")


def _percent(energy: float | None) -> float:
    return float("nan") if energy is None else 100 * energy


def _short(name: str) -> str:
    name = name.removesuffix(".weight").removeprefix("timm_model.")
    return name if len(name) <= 44 else "…" + name[-43:]
