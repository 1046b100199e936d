"""What a user reads of a family: a line when a variant is done, a table at the end."""

from __future__ import annotations

from pathlib import Path

from ..family import Family, Variant
from ..family.table import main_metric, table_rows
from ..loading.statistics import STATISTICS


class VariantPrinter:
    """Called with every variant of a family that is being built."""

    def __init__(self, is_talking: bool = True) -> None:
        self.is_talking = is_talking

    def __call__(self, variant: Variant) -> None:
        """One line for a variant that is done."""
        if self.is_talking:
            metric = main_metric(variant.metrics)
            value = f", {metric} {variant.metrics[metric]:.4f}" if metric else ""
            removed = variant.parameters_removed
            size = f"{variant.parameters} parameters" if removed else f"{100 * variant.sparsity:.1f} % zeros"
            print(f"saved {variant.path}: {size}{value}", flush=True)

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.is_talking:
            print(text, flush=True)

    def finish(self, family: Family) -> None:
        """The table, and where everything lies."""
        if self.is_talking:
            print("\n" + render(family))
            if names := _above_dense(family):
                why = "whose batch norms are as trained, while variants have theirs computed anew behind the cut"
                print(f"\nnote: {', '.join(names)} above dense, {why}")
            plot = family.folder / "plots" / "sparsity.png"
            print(f"\nfamily    {_relative(family.folder)}")
            print(f"manifest  {_relative(family.folder / 'family.json')}")
            if plot.is_file():
                print(f"plot      {_relative(plot)}")
            needing = [v.path for v in family.variants if v.loads_with != "transformers"]
            if not needing:
                print("Every folder loads with plain transformers: AutoModel....from_pretrained(FOLDER)")
            elif len(needing) == len(family.variants):
                print("Every variant loads with transformers after `import hf_compress`")
            else:
                print(f"After `import hf_compress` transformers loads {', '.join(needing)}, and the others without it")


def _above_dense(family: Family) -> list[str]:
    """Variants that were cut from a dense checkpoint with batch norms and score clearly higher than it."""
    metric = main_metric(family.dense.metrics)
    dense = family.dense.metrics.get(metric) if metric else None
    if dense is None or not any(name.endswith(STATISTICS) for name in family.files):
        return []
    scores = {str(v.pattern): v.metrics.get(str(metric)) for v in family.variants if v.made_by == "one_shot"}
    return [name for name, score in scores.items() if score is not None and score > dense + 0.02 * abs(dense)]


def render(family: Family) -> str:
    """The table of a family: a row a checkpoint, numbers as they stand in the manifest."""
    rows = table_rows(family)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def _relative(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
