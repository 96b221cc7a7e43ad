"""What the times of a study are worth: their spread, and where they contradict each other."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import quantiles

from .numbers import number_text, range_text
from .results import CellResult, Study

DISAGREE = 1.1
"""The ratio of times in the model from which cells with as many calls disagree."""


def spread(result: CellResult) -> tuple[float, float] | None:
    """Return the quartiles of a cell's milliseconds a sample over its batches; None for fewer than
    two."""
    if len(result.batch_ms) < 2:
        return None
    low, _, high = quantiles(result.batch_ms, n=4, method="inclusive")
    return low, high


def spread_text(result: CellResult) -> str:
    """Return the quartiles in words: "80 to 95"."""
    found = spread(result)
    return "" if found is None else range_text(*found)


def remarks(study: Study) -> list[str]:
    """Return what a reader of the times has to know, a sentence each; empty where they agree."""
    return [*_disagreements(study.results), *_not_in_turn(study.results)]


def _disagreements(results: Sequence[CellResult]) -> list[str]:
    """As many calls of one model in batches of one size should take as long, whoever asks for them."""
    by_calls: dict[int, list[float]] = {}
    for result in results:
        if result.model_ms > 0:
            by_calls.setdefault(result.calls, []).append(result.model_ms)
    found = {
        calls: (min(times), max(times))
        for calls, times in sorted(by_calls.items())
        if max(times) >= DISAGREE * min(times)
    }
    if not found:
        return []
    listed = "; ".join(
        f"{number_text(low)} to {number_text(high)} ms for {calls} {'call' if calls == 1 else 'calls'}"
        for calls, (low, high) in found.items()
    )
    worst = max(high / low for low, high in found.values())
    return [
        f"Cells with as many model calls disagree in the time that the model took: {listed}. The machine was busy, or its speed "
        f"changed: read no differences of less than {100 * (worst - 1):.0f} % from these times, compare model calls."
    ]


def _not_in_turn(results: Sequence[CellResult]) -> list[str]:
    runs = {result.measured_at for result in results}
    if len(runs) < 2:
        return []
    return [
        f"The cells were measured in {len(runs)} runs: only cells of one run were timed in turn, so times of different runs compare "
        "less well."
    ]
