"""Time to quality: the least time in which each contender reaches a target, with error bars.

A contender is everything that differs in its number of steps alone. Its times are those of the
counts that were measured: nothing is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..utils.html import plain_text
from .apply import command_of, python_of
from .numbers import number_text, range_text
from .results import METRICS, CellResult, Metric, Recommendation, Study, describe, way_of
from .timing import remarks

USUAL_STEPS = 50
"""Of plain DDIM, whose quality is the target unless one is given."""
_PLAIN_SPACINGS = ("leading", "uniform")
_DRAWS = 1000
_LOW, _HIGH = 15.87, 84.13
"""Percentiles as far apart as one standard error each way."""


@dataclass(frozen=True)
class Interval:
    """A value, and what chance could have made of it: one standard error each way."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        value, chance = number_text(self.value), self.chance
        return f"{value} ({chance})" if chance else value

    @property
    def chance(self) -> str:
        """The ends of the interval in words; empty where they are the value in its digits."""
        ends = range_text(self.low, self.high) if math.isfinite(self.value) else ""
        return "" if ends in ("", range_text(self.value, self.value)) else ends


@dataclass(frozen=True)
class Entry:
    """A contender in a race.

    Attributes:
        name: what its cells share, in words.
        fastest: its fastest cell that reaches the target; None if none does.
        nearest: its best cell.
        milliseconds: of the fastest, a sample; infinite if none reaches the target.
        ratio: these over the baseline's; NaN where the baseline does not reach the target.
        reached: in which share of what chance could have made of the numbers it reaches the target.
        is_baseline: whether it is plain DDIM.
    """

    name: str
    fastest: CellResult | None
    nearest: CellResult
    milliseconds: Interval
    ratio: Interval
    reached: float
    is_baseline: bool

    @property
    def might(self) -> bool:
        """Whether it does not reach the target, but could within its error bars."""
        return self.fastest is None and self.reached >= _LOW / 100


@dataclass(frozen=True)
class Race:
    """A race to a target.

    Attributes:
        target: the value of the metric to reach.
        baseline: the cell of plain DDIM with that value; None where the target was given.
        entries: the fastest first, those that never reach the target last.
        not_judged: contenders without the metric, in words.
    """

    metric: Metric
    target: float
    baseline: CellResult | None
    entries: tuple[Entry, ...]
    not_judged: tuple[str, ...]

    @property
    def aim(self) -> str:
        """The target in words."""
        of = (
            f"a {self.metric.title} of"
            if self.baseline is None
            else f"the {self.metric.title} of {describe(self.baseline.cell)},"
        )
        return f"{of} {number_text(self.target)}"

    def __str__(self) -> str:
        first = self.entries[0]
        if first.fastest is None:
            return f"Nothing that was measured reaches {self.aim}."
        cell, calls = first.fastest.cell, first.fastest.calls
        if self.baseline is not None and first.fastest is self.baseline:
            return f"Nothing that was measured reaches {self.aim}, in less time."
        how = f"{describe(cell)} {'reaches' if cell.num_inference_steps == 1 else 'reach'} {self.aim}, in {calls} model calls"
        theirs = next((entry.fastest for entry in self.entries if entry.is_baseline), None)
        if theirs is None or not math.isfinite(first.ratio.value):
            return f"{how} and {first.milliseconds} ms a sample."
        return f"{how} instead of {theirs.calls}, and {first.ratio} of the time."


def races(study: Study) -> list[Race]:
    """Return the race of each metric that has a target and at least two contenders."""
    found = (race_of(study, name) for name, metric in METRICS.items() if metric.raced)
    return [race for race in found if race is not None]


def race_of(study: Study, name: str) -> Race | None:
    """Return the race by a metric to the study's target, or to what plain DDIM has in 50 steps, or
    in the most that were measured.

    Numbers of samples that differ from the baseline's are left out: some metrics depend on them.

    Returns:
        The race; None without a target, or with fewer than two contenders.
    """
    results = study.with_metric(name)
    plain = plain_ddim(results)
    target = study.targets.get(name)
    if not results or (target is None and plain is None):
        return None
    baseline = plain if target is None else None
    count = (plain or max(results, key=lambda result: result.count)).count
    results = [result for result in results if result.count == count]
    contenders: dict[tuple[str, ...], list[int]] = {}
    for index, result in enumerate(results):
        contenders.setdefault(way_of(result.cell), []).append(index)
    if len(contenders) < 2:
        return None
    metric = METRICS[name]
    goal = baseline.quality[name].value if baseline is not None else float(target or 0.0)
    costs = np.array([metric.cost(result.quality[name].value) for result in results], dtype=np.float64)
    times = np.array([result.milliseconds for result in results], dtype=np.float64)
    pinned = [result is baseline for result in results]
    by_chance = _times_by_chance(results, name, costs, np.array(pinned), metric.cost(goal))
    measured = np.where(costs <= metric.cost(goal), times, math.inf)
    base = contenders.get(way_of(plain.cell)) if plain is not None else None
    base_time = measured[base].min() if base is not None else math.nan
    base_by_chance = by_chance[:, base].min(1) if base is not None else np.full(_DRAWS, math.nan)
    entries = []
    for way, members in contenders.items():
        at = members[int(measured[members].argmin())]
        chance, least = by_chance[:, members].min(1), float(measured[at])
        entries.append(
            Entry(
                name=_name(way),
                fastest=results[at] if math.isfinite(least) else None,
                nearest=results[members[int(costs[members].argmin())]],
                milliseconds=_interval(least, chance),
                ratio=_interval(_ratio(least, base_time), _ratios(chance, base_by_chance)),
                reached=float(np.isfinite(chance).mean()),
                is_baseline=members is base,
            )
        )
    entries.sort(key=lambda entry: (entry.milliseconds.value, metric.cost(entry.nearest.quality[name].value)))
    others = dict.fromkeys(_name(way_of(r.cell)) for r in study.results if way_of(r.cell) not in contenders)
    return Race(metric, goal, baseline, tuple(entries), tuple(others))


def _name(way: tuple[str, ...]) -> str:
    """Return a way to sample in words, without what is usual."""
    return ", ".join(part for part in way if part not in ("eta 0", "order=1"))


def plain_ddim(results: Sequence[CellResult]) -> CellResult | None:
    """Return the cell of plain DDIM, evenly spaced and without noise, with 50 steps or the most; None
    if there is none."""
    plain = [r for r in results if _is_plain(r)]
    for spacing in (*_PLAIN_SPACINGS, *dict.fromkeys(r.cell.timestep_spacing for r in plain)):
        alike = {r.cell.num_inference_steps: r for r in plain if r.cell.timestep_spacing == spacing}
        if alike:
            return alike.get(USUAL_STEPS, alike[max(alike)])
    return None


def _is_plain(result: CellResult) -> bool:
    cell = result.cell
    ours = cell.scheduler is None and cell.timesteps is None and cell.history_weights is None
    return ours and cell.order == 1 and cell.eta == 0


def _times_by_chance(
    results: Sequence[CellResult], name: str, costs: np.ndarray, pinned: np.ndarray, goal: float
) -> np.ndarray:
    """Return ``(draws, cells)``: times a sample as chance could have made them, infinite where the
    quality then misses the goal.

    Qualities are drawn with their standard errors, independently; the baseline's is the goal itself.
    Times are medians of batches drawn again, the same rounds for all cells of a run: what slowed a
    round slowed all of them.
    """
    random = np.random.default_rng(0)
    errors = np.array([result.quality[name].error for result in results], dtype=np.float64)
    errors = np.where(np.isfinite(errors) & ~pinned, errors, 0.0)
    drawn = costs + errors * random.standard_normal((_DRAWS, len(results)))
    rounds: dict[tuple[str, int], np.ndarray] = {}
    times = np.empty((_DRAWS, len(results)), dtype=np.float64)
    for column, result in enumerate(results):
        size = len(result.batch_ms)
        if size < 2:
            times[:, column] = result.milliseconds
            continue
        chosen = rounds.setdefault((result.measured_at, size), random.integers(size, size=(_DRAWS, size)))
        times[:, column] = np.median(np.array(result.batch_ms, dtype=np.float64)[chosen], axis=1)
    return np.where(drawn <= goal, times, math.inf)


def _interval(value: float, by_chance: np.ndarray) -> Interval:
    if not math.isfinite(value) or np.isnan(by_chance).all():
        return Interval(value, value, value)
    low, high = np.percentile(by_chance, [_LOW, _HIGH], method="nearest")
    # The median of all batches, and of a run of them, may differ: the value lies in its interval.
    return Interval(value, min(float(low), value), max(float(high), value))


def _ratio(time: float, base: float) -> float:
    return time / base if math.isfinite(base) and base > 0 else math.nan


def _ratios(times: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Return the ratios of the draws in which the baseline reaches the target."""
    usable = np.isfinite(base) & (base > 0)
    return times[usable] / base[usable] if usable.any() else np.array([math.nan])


# --- In words and as data ---------------------------------------------------------------------------------------------


def reached_text(entry: Entry, metric: Metric) -> str:
    """Describe how an entry did: "10 calls, 10 steps", or that it never reaches the target."""
    if entry.fastest is not None:
        steps = entry.fastest.cell.num_inference_steps
        return f"{entry.fastest.calls} calls, {steps} {'step' if steps == 1 else 'steps'}"
    value = number_text(entry.nearest.quality[metric.name].value)
    best = f"{value} in {entry.nearest.calls} calls at best"
    return f"not reached, though within error: {best}" if entry.might else f"never reaches it: {best}"


def summary(study: Study) -> list[str]:
    """Return the results of a study in lines for a terminal: each race, what its times are worth, and
    last what to use, how, and what other metrics would recommend."""
    lines = []
    for race in races(study):
        lines += [str(race), *_table(race), ""]
    lines += remarks(study) if lines else []
    if (recommended := study.recommendation()) is not None:
        lines.append(str(recommended))
        lines += [f"  {how}" for how in ways_to_apply(study)]
        lines += [str(other) for other in alternatives(study)]
    return [plain_text(line) for line in lines]


def ways_to_apply(study: Study) -> list[str]:
    """Return the command and the line of Python that apply the recommendation, if there are any."""
    recommended = study.recommendation()
    if recommended is None:
        return []
    cell = recommended.chosen.cell
    return [how for how in (command_of(cell, study.model), python_of(cell)) if how]


@dataclass(frozen=True)
class Alternative:
    """What to use if another metric decides."""

    recommendation: Recommendation

    def __str__(self) -> str:
        words = str(self.recommendation)
        return f"By {self.recommendation.metric.title} alone: {words[0].lower()}{words[1:]}"


def alternatives(study: Study) -> list[Alternative]:
    """Return what the metrics after the first recommend, where it is another cell."""
    first = study.recommendation()
    found = [study.recommendation(metric.name) for metric in study.metrics[1:]]
    return [Alternative(other) for other in found if other and first and other.chosen is not first.chosen]


def _table(race: Race) -> list[str]:
    rows = [("of the time", "ms a sample", "", f"to {race.aim}")] + [
        (
            "-" if entry.fastest is None else str(entry.ratio),
            "-" if entry.fastest is None else str(entry.milliseconds),
            entry.name + (" (baseline)" if entry.is_baseline else ""),
            reached_text(entry, race.metric),
        )
        for entry in race.entries
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  " + "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    ]
    return lines + [f"  {name}: has no {race.metric.title}" for name in race.not_judged]


def as_data(race: Race) -> dict[str, Any]:
    """Return a race for JSON."""
    return {
        "metric": race.metric.name,
        "target": race.target,
        "baseline": None if race.baseline is None else race.baseline.cell.key,
        "contenders": [
            {
                "name": entry.name,
                "reaches_it": entry.fastest is not None,
                "reached_share": entry.reached,
                "cell": None if entry.fastest is None else entry.fastest.cell.key,
                "calls": None if entry.fastest is None else entry.fastest.calls,
                "milliseconds": vars(entry.milliseconds),
                "ratio_to_baseline": vars(entry.ratio),
                "best_value": entry.nearest.quality[race.metric.name].value,
            }
            for entry in race.entries
        ],
        "without_the_metric": list(race.not_judged),
    }
