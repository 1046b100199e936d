"""Plots of the summary of evidence.py, made from its numbers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

KINDS = ("recalibrated", "one_shot", "as_trained")
MARKERS = "osD^vP*X<>hp"
PANELS = {  # name of a pattern to what its axis shows
    "unstructured": "zeros in the compressed weights, %",
    "n_m": "N:M",
    "filters": "filters removed, %",
    "neurons": "neurons removed, %",
    "heads": "heads removed, %",
    "low_rank": "rank removed, %",
    "bytes": "size of all files, kB",
}


def draw(result: dict[str, Any], stem: Path) -> None:
    """Everything, and the few arms of the plan's `figure`."""
    draw_panels(result, stem)
    if "figure" in result["plan"]:
        draw_figure(result, stem.with_name(f"{stem.name}_figure"))


def draw_panels(result: dict[str, Any], stem: Path) -> None:
    """A panel for every kind of pattern, a line for every arm, bars from the lowest to the highest seed."""
    from matplotlib import colormaps

    found = {arm: points_of(result, arm) for arm in result["mean"]}
    panels = [panel for panel in PANELS if any(points.get(panel) for points in found.values())] or ["unstructured"]
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure, panes = new_figure(4.6 * columns, 3.8 * lines + 1.6, lines, columns)
    grid = list(panes.flat)
    for axes, panel in zip(grid, panels, strict=False):
        labels = sorted({x for points in found.values() for x, _ in points.get(panel, [])}, key=str)
        for i, points in enumerate(found.values()):
            line(axes, panel, points.get(panel, []), labels, colormaps["tab20"](i % 20), MARKERS[i % len(MARKERS)], i)
        finish(axes, panel, labels)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles = [
        grid[0].plot(
            [], [], color=colormaps["tab20"](i % 20), marker=MARKERS[i % len(MARKERS)], label=label_of(result, a)
        )
        for i, a in enumerate(found)
    ]
    figure.legend(handles=[h for (h,) in handles], loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    seeds = sorted({len(s) for s in result["seeds"].values() if s})
    count = " to ".join(str(s) for s in dict.fromkeys((seeds[0], seeds[-1]))) if seeds else "no"
    figure.suptitle(f"{result['title']}: mean and range, seeds of an arm: {count}", fontsize=11, x=0.01, ha="left")
    save(figure, stem)


def draw_figure(result: dict[str, Any], stem: Path) -> None:
    """One panel of a few arms, those that the plan names under `figure`: what a README opens with."""
    from matplotlib import colormaps

    arms = [arm for arm in result["plan"]["figure"]["arms"] if arm in result["mean"]]
    panel = result["plan"]["figure"]["panel"]
    figure, grid = new_figure(7.2, 4.2)
    axes = grid[0, 0]
    for i, arm in enumerate(arms):
        points = points_of(result, arm).get(panel, [])
        line(axes, panel, points, [], colormaps["tab10"](i), MARKERS[i], i)
        axes.plot([], [], color=colormaps["tab10"](i), marker=MARKERS[i], label=label_of(result, arm))
    finish(axes, panel, [])
    if arms:
        axes.legend(frameon=False, fontsize=9, loc="lower left")
    axes.set_title(f"{result['title']}, cut in one shot", fontsize=11, loc="left")
    save(figure, stem)


def new_figure(width: float, height: float, lines: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(lines, columns, squeeze=False)


def save(figure: Any, stem: Path) -> None:
    from matplotlib import rc_context

    stem.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(stem.with_suffix(".png"), dpi=140, metadata={"Software": None})
    with rc_context({"svg.hashsalt": stem.name}):  # names inside the file are drawn at random otherwise
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def points_of(result: dict[str, Any], arm: str) -> dict[str, list[tuple[Any, list[float]]]]:
    """For every panel the places of an arm on its axis, and the values of all seeds there."""
    found: dict[str, list[tuple[Any, list[float]]]] = {}
    scores = {name: counted_of(numbers)["by_seed"] for name, numbers in result["mean"][arm].items()}
    shares: set[str] = set()
    for name, values in scores.items():
        kind, _, rest = name.removeprefix("blocks:").partition(":")
        if kind.isdigit():
            found.setdefault("n_m", []).append((name, values))
        elif kind in PANELS and rest.replace(".", "").isdigit() and not name.startswith("blocks:"):
            shares.add(kind)
            found.setdefault(kind, []).append((100 * float(rest), values))
    for kind in shares if "dense" in scores and len(scores) > 2 else ():
        found[kind].insert(0, (0.0, scores["dense"]))
    for numbers in result["files"].get(arm, {}).values():
        size = numbers["bytes"]["mean"] / 1000
        found.setdefault("bytes", []).append((size, numbers["as_loaded"]["by_seed"]))
    return {panel: points if panel == "n_m" else sorted(points) for panel, points in found.items()}


def counted_of(numbers: dict[str, Any]) -> Any:
    """Of the scores of a variant that which counts: with new batch norms, where it has some."""
    return next(numbers[kind] for kind in KINDS if kind in numbers)


def line(axes: Any, panel: str, points: list[Any], labels: list[Any], color: Any, marker: str, i: int) -> None:
    if not points:
        return
    x = [labels.index(at) + 0.03 * (i - 6) if panel == "n_m" else at for at, _ in points]
    y = [sum(values) / len(values) for _, values in points]
    spread = [
        [mean - min(values) for mean, (_, values) in zip(y, points, strict=True)],
        [max(values) - mean for mean, (_, values) in zip(y, points, strict=True)],
    ]
    joined = "none" if panel in ("n_m", "bytes") else "-"
    axes.errorbar(x, y, spread, color=color, marker=marker, markersize=4, linestyle=joined, linewidth=1.2, capsize=2)


def finish(axes: Any, panel: str, labels: list[Any]) -> None:
    axes.set_xlabel(PANELS[panel])
    axes.set_ylabel("points")
    if panel == "n_m":
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.5, len(labels) - 0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def label_of(result: dict[str, Any], arm: str) -> str:
    return str(result["plan"]["arms"][arm].get("label", arm))
