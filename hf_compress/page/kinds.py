"""Which patterns share a colour and a shape. `plot.js` and `page.css` know the same names."""

from __future__ import annotations

from ..patterns import (
    NM,
    Chain,
    Coded,
    Filters,
    Heads,
    LowRank,
    Neurons,
    Pattern,
    Quantized,
    Unstructured,
    parse_pattern,
)

_KINDS: dict[type[Pattern], str] = {
    NM: "n-m",
    Filters: "structured",
    Neurons: "structured",
    Heads: "structured",
    LowRank: "low-rank",
    Quantized: "rounded",
    Chain: "chained",
    Coded: "coded",
}


def kind_of(pattern: str | None) -> str:
    """The kind of a pattern, "dense" for None and "other" for a text that is no pattern."""
    if pattern is None:
        return "dense"
    try:
        parsed = parse_pattern(pattern)
    except ValueError:
        return "other"
    if isinstance(parsed, Unstructured):
        return "unstructured" if parsed.scope == "global" else "within-layers"
    return _KINDS.get(type(parsed), "other")
