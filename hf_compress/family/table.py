"""The table of a family, for terminals and cards: a row a checkpoint, numbers as they stand in the manifest."""

from __future__ import annotations

from .manifest import Manifest
from .variant import Variant

_LESS_IS_BETTER = ("loss", "perplexity", "error", "error_rate", "wer", "cer", "mae", "mse", "rmse")


def main_metric(metrics: dict[str, float | None]) -> str | None:
    """The metric that a checkpoint is judged by: the first that is a number and neither loss nor timing."""
    timing = ("loss", "runtime", "samples_per_second", "steps_per_second")
    return next((name for name, value in metrics.items() if value is not None and not name.endswith(timing)), None)


def is_less_better(metric: str) -> bool:
    """Whether a smaller number of this name says of a better model."""
    return any(metric == word or metric.endswith(f"_{word}") for word in _LESS_IS_BETTER)


def table_rows(manifest: Manifest) -> list[list[str]]:
    """The header, the dense checkpoint, the variants; the first column is text, the others are numbers."""
    metric = main_metric(manifest.dense.metrics)
    shrinks = any(variant.parameters_removed for variant in manifest.variants)
    removed = ["removed"] if shrinks else []
    header = ["variant", *removed, "zeros", *([metric, "vs dense"] if metric else []), "disk", "zipped", "latency"]
    return [header, *(_row(variant, manifest.dense, metric, shrinks) for variant in manifest.checkpoints)]


def share_removed(variant: Variant, dense: Variant) -> float:
    """The share of the parameters of the dense checkpoint that a variant no longer has."""
    return variant.parameters_removed / dense.parameters if dense.parameters else 0.0


def _row(variant: Variant, dense: Variant, metric: str | None, shrinks: bool) -> list[str]:
    row = [variant.pattern or "dense", *([f"{100 * share_removed(variant, dense):.1f} %"] if shrinks else [])]
    row.append(f"{100 * variant.sparsity:.1f} %")
    if metric:
        value, reference = variant.metrics.get(metric), dense.metrics[metric]
        if value is None or reference is None:
            row += ["nan", ""]
        else:
            row += [f"{value:.4f}", f"{value - reference:+.4f}" if variant.pattern else ""]
    latency = variant.latency
    time = "-" if latency is None else f"{latency['milliseconds'] / latency['dense_milliseconds']:.2f} x"
    if latency and variant.pattern is None:
        time = f"{latency['milliseconds']:.2f} ms"
    return [*row, format_size(variant.bytes), format_size(variant.compressed_bytes), time]


def format_size(count: int) -> str:
    """Bytes with their unit."""
    return f"{format_count(count)}B"


def format_count(count: int) -> str:
    """A number in thousands, millions or thousands of millions, up to the letter of its unit: "12 ", "1.2 k"."""
    size, unit = float(count), ""
    for unit in ("", "k", "M", "G"):
        if round(size, 1) < 1000 or unit == "G":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if not unit else f"{size:.1f} {unit}"


def format_percent(share: float | None) -> str:
    """A share in percent, with a second digit where one would round it to all; "-" for none."""
    return "-" if share is None else f"{100 * share:.{2 if 0.999 < share < 1 else 1}f} %"
