"""Tables of the summary of evidence.py as Markdown, made from its numbers alone; READMEs quote lines of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from evidence_plots import counted_of, label_of

Numbers = dict[str, Any]


def as_markdown(result: Numbers) -> str:
    """All tables, each under its heading."""
    tables = {"Best of each pattern": best, "All arms": arms, "Pairs": pairs, "Files": files, "Settings": settings}
    parts = [f"## {title}\n\n{make(result)}" for title, make in tables.items()]
    return f"# {result['title']}\n\nMade by evidence.py; numbers are points.\n\n" + "\n\n".join(parts) + "\n"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def points(numbers: Numbers) -> str:
    """Mean and standard deviation over seeds."""
    return f"{numbers['mean']:.1f} ± {numbers['std']:.1f}"


def margin(numbers: Numbers) -> str:
    """The mean difference over seeds, and its standard error."""
    error = numbers["standard_error"]
    return f"{numbers['difference']:+.1f}" + (f" ({error:.1f})" if error is not None else "")


def best(result: Numbers) -> str:
    """The arm that scores highest, and its margin over the first baseline; * where that is within the spread."""
    plain = result["plan"]["baselines"][0]
    rows = []
    for pattern, found in result["best"].items():
        arm = found["arm"]
        of_both = [counted_of(result["mean"][name][pattern]) for name in (arm, plain)]
        by = margin(result["minus"][arm][plain][pattern]) + ("" if found["counts"] else " *")
        rows.append([pattern, label_of(result, arm), *map(points, of_both), by])
    return table(["cut to", "best", "points", label_of(result, plain), "margin (standard error)"], rows)


def arms(result: Numbers) -> str:
    patterns = list(dict.fromkeys(pattern for own in result["mean"].values() for pattern in own))
    rows = [
        [label_of(result, arm), *(points(counted_of(own[p])) if p in own else "" for p in patterns)]
        for arm, own in result["mean"].items()
    ]
    return table(["", *patterns], rows)


def pairs(result: Numbers) -> str:
    rows = [
        [f"{label_of(result, ours)} - {label_of(result, theirs)}", pattern, margin(by)]
        for ours, theirs in result["plan"]["pairs"]
        for pattern, by in result["minus"].get(ours, {}).get(theirs, {}).items()
    ]
    return table(["pair", "cut to", "difference (standard error)"], rows)


def files(result: Numbers) -> str:
    rows = [
        [label_of(result, arm), name, f"{numbers['bytes']['mean'] / 1000:.1f}", points(numbers["as_loaded"])]
        for arm, own in result["files"].items()
        for name, numbers in own.items()
    ]
    return table(["", "file", "kB", "points as loaded"], sorted(rows, key=lambda row: float(row[2])))


def settings(result: Numbers) -> str:
    rows = [
        [label_of(result, arm), ", ".join(f"{name} {value}" for name, value in setting.items())]
        for arm, setting in result["chosen"].items()
    ]
    return table(["", "chosen on held-out training data"], rows)
