"""What the settings of CrAM may be, for its optimizer and for the flags."""

from __future__ import annotations


def check_rho(rho: float) -> float:
    """`rho` if it is finite and not negative; ValueError otherwise."""
    if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not 0 <= rho < float("inf"):
        raise ValueError(f"rho must be a finite number of at least 0, got {rho!r}")
    return rho


def check_options(plus_reduction: str, every: int) -> None:
    """ValueError for an unknown reduction, or an interval that is no whole number of at least 1."""
    if plus_reduction not in ("sum", "mean"):
        raise ValueError(f"plus_reduction must be 'sum' or 'mean', got {plus_reduction!r}")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a whole number of at least 1, got {every!r}")
