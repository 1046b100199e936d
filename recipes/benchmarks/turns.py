"""Forms of one computation timed in turns, so that a busy machine slows all of them alike; quote ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Seconds = dict[str, list[float]]


def in_turns(
    forms: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warm_up: int = 2,
    repeats: Mapping[str, int] | None = None,
    before: Callable[[], Any] | None = None,
    clock: Callable[[], float] = time.process_time,
) -> Seconds:
    """Seconds of every form in every round; the order turns round from one to the next.

    Args:
        forms: what to call.
        rounds: that count.
        warm_up: rounds before them.
        repeats: how often a form is called in a round, 1 by default; seconds are of one call.
        before: called at the start of every round, not timed.
        clock: seconds, of the processor by default.
    """
    seconds: Seconds = {name: [] for name in forms}
    for i in range(rounds + warm_up):
        if before is not None:
            before()
        for name in forms if i % 2 else reversed(list(forms)):
            count = (repeats or {}).get(name, 1)
            start = clock()
            for _ in range(count):
                forms[name]()
            if i >= warm_up:
                seconds[name].append((clock() - start) / count)
    return seconds


def ratios(seconds: Seconds, name: str, base: str) -> list[float]:
    """Of every round."""
    return [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]


def beside(seconds: Seconds, base: str) -> dict[str, dict[str, Any]]:
    """Seconds of each form, and its ratio to one of them: of the minima, and the median over rounds."""
    return {
        name: {
            "seconds": {"min": min(s), "median": statistics.median(s)},
            "ratio_of_minima": min(s) / min(seconds[base]),
            "median_ratio": statistics.median(ratios(seconds, name, base)),
        }
        for name, s in seconds.items()
    }
