"""How numbers are written: with the digits that their errors allow."""

from __future__ import annotations

import math

from .results import Measure


def number_text(value: float) -> str:
    """Format a number with three digits and no exponent."""
    if not math.isfinite(value):
        return "\N{EM DASH}"
    return f"{value:,.{_decimals(value, 3)}f}"


def measure_text(measure: Measure | None) -> str:
    """Format a value and its standard error, both to the error's second digit."""
    if measure is None:
        return "\N{EM DASH}"
    if not math.isfinite(measure.value):
        return "not finite"
    if not (math.isfinite(measure.error) and measure.error > 0):
        return number_text(measure.value)
    decimals = _decimals(measure.error, 2)
    return f"{measure.value:,.{decimals}f} ± {measure.error:,.{decimals}f}"


def range_text(low: float, high: float) -> str:
    """Format an interval with the digits that its width allows, three at most; "or more" where it has
    no end, one number where its ends are the same in these digits."""
    if not math.isfinite(high):
        return f"{number_text(low)} or more"
    decimals = _decimals(high, 3)
    if high > low:
        decimals = min(decimals, _decimals(high - low, 2))
    ends = [f"{value:,.{decimals}f}" for value in (low, high)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _decimals(value: float, digits: int) -> int:
    return 0 if value == 0 else min(max(digits - 1 - math.floor(math.log10(abs(value))), 0), 9)
