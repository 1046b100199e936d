"""Tables of the summary of evidence.py as Markdown, made from its numbers alone; READMEs quote lines of them."""

from __future__ import annotations

import statistics
from collections.abc import Container, Iterable
from typing import Any

from evidence_plots import counted_of, label_of

Numbers = dict[str, Any]


def as_markdown(result: Numbers, only: Container[str] | None = None) -> str:
    """The tables that have rows, all or those of `only`, each under its heading."""
    tables = {
        "Best of each pattern": best(result),
        "Claims": claims(result),
        "All arms": arms(result),
        "Pairs": pairs(result),
        "Files": files(result),
        "Settings": settings(result),
        "Tried, each arm by the mean over its own cuts": tried(result),
    }
    shown = {title: text for title, text in tables.items() if only is None or title in only}
    parts = [f"## {title}\n\n{text}" for title, text in shown.items() if text.count("\n") > 1]
    return "\n\n".join([f"# {result['title']}", "Made by evidence.py; numbers are points.", *parts]) + "\n"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def points(numbers: Numbers) -> str:
    """Mean and standard deviation over seeds; the number alone where there is one."""
    spread = f" ± {numbers['std']:.1f}" if len(numbers["by_seed"]) > 1 else ""
    return f"{numbers['mean']:.1f}{spread}"


def margin(numbers: Numbers) -> str:
    """The mean difference over seeds, and its standard error."""
    error = numbers["standard_error"]
    return f"{numbers['difference']:+.1f}" + (f" ({error:.1f})" if error is not None else "")


def verdict(result: Numbers, ours: str, theirs: str, pattern: str) -> str:
    """A difference counts where it is larger than the standard deviation over seeds of either arm and of itself."""
    by = result["minus"][ours][theirs][pattern]
    if len(by["by_seed"]) < 2:
        return "one seed"
    spreads = [counted_of(result["mean"][arm][pattern])["std"] for arm in (ours, theirs)]
    if abs(by["difference"]) <= max(*spreads, statistics.stdev(by["by_seed"])):
        return "within the spread"
    return "yes" if by["difference"] > 0 else "no"


def beside(result: Numbers, ours: str, theirs: str, pattern: str) -> list[str]:
    """Both arms, and by how much ours is ahead."""
    of_both = [points(counted_of(result["mean"][arm][pattern])) for arm in (ours, theirs)]
    return [*of_both, margin(result["minus"][ours][theirs][pattern])]


def best(result: Numbers) -> str:
    """Of every pattern the arm that scores highest, beside plain training; * for what is not above the spread.

    Plain training is the first baseline, or the best of those that the plan calls "plain".
    """
    plains = result["plan"].get("plain", result["plan"]["baselines"][:1])
    head, rows = " or ".join(label_of(result, plain) for plain in plains), []
    for pattern in result["mean"].get(plains[0], {}):
        plain = highest(result, plains, pattern)
        others = [arm for arm, by in result["minus"].items() if arm not in plains and pattern in by.get(plain, {})]
        if others:
            arm = highest(result, others, pattern)
            *of_both, by = beside(result, arm, plain, pattern)
            star = "" if verdict(result, arm, plain, pattern) in ("yes", "one seed") else " *"
            rows.append([pattern, label_of(result, arm), *of_both, by + star])
    return table(["cut to", "best of the others", "points", head, "margin (standard error)"], rows)


def highest(result: Numbers, arms: list[str], pattern: str) -> str:
    """The arm of these that scores highest."""
    own = {arm: result["mean"][arm] for arm in arms if pattern in result["mean"].get(arm, {})}
    return max(own, key=lambda arm: float(counted_of(own[arm][pattern])["mean"]))


def claims(result: Numbers) -> str:
    """What the papers claim and the plan names."""
    rows = [
        [claim, *beside(result, ours, theirs, pattern), verdict(result, ours, theirs, pattern)]
        for claim, ours, theirs, pattern in result["plan"].get("claims", ())
        if pattern in result["minus"].get(ours, {}).get(theirs, {})
    ]
    return table(["claim of the papers", "ours", "theirs", "difference (standard error)", "holds"], rows)


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
    rows = [[label_of(result, arm), as_text(setting)] for arm, setting in result["chosen"].items()]
    return table(["", "chosen on held-out training data"], rows)


def tried(result: Numbers) -> str:
    """Every setting of every grid, with the points that chose among them: one seed, held-out training data."""
    rows = [
        [label_of(result, arm), as_text(row["setting"]), f"{row['points']:.1f}"]
        for arm, found in result["tuning"].items()
        for row in found
        if row["points"] is not None
    ]
    return table(["", "tried", "points, held out"], rows)


def as_text(setting: Numbers) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items())
