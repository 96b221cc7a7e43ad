"""The one timing harness: contenders timed in turn, in one process, so that whatever slows the machine slows them all.

A round times every contender once, each for a block of at least ``BLOCK`` seconds of repeated calls, after
``prepare`` and one untimed call that brings its data into the caches (not where a call takes longer than ``SELF_WARM``).
The order changes from round to round. A contender much slower than the baseline takes part in every k-th round only,
but in five at least. On one thread, a block during which the operating system gave the processor to someone else is run
again, so that a busy machine costs rounds rather than truth. Times are medians over rounds; ratios are medians of the
ratios *within* a round, so a drift of the machine's speed over the rounds cancels.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from statistics import median, quantiles
from typing import Any

import torch

BLOCK = 200e-6
"""Seconds that a contender runs at least in each round: the clock costs less than 0.1 % of it."""
STABLE = 0.01
"""Stop when no median differs by more than this from the median of the first half of the rounds."""
LEAST = 1.0
"""Seconds that the rounds take together at least: a shorter look may meet nothing but one mood of the machine."""
SELF_WARM = 50e-3
"""A call longer than this warms the caches up itself, for all but a sliver of its time."""
SLOW = 10
"""A contender whose block takes longer than this many of the baseline's is left out of some rounds."""

AWAY, TRIES, LONG = 0.02, 3, 4e-3
"""A block is run again, up to ``TRIES`` times, if the thread was not running for more than the share ``AWAY`` of it,
unless it is longer than ``LONG`` seconds: those are all interrupted, and all contenders alike."""


@dataclass
class Comparison:
    """Seconds per call: ``rounds[name][i]`` in round i; a slow contender is missing from some rounds."""

    baseline: str
    rounds: dict[str, dict[int, float]]
    calls: dict[str, int] = field(default_factory=dict)
    stable: bool = False

    def seconds(self, name: str) -> float:
        """Median seconds per call."""
        return median(self.rounds[name].values())

    def spread(self, name: str) -> float:
        """Interquartile range over median; NaN for fewer than four rounds."""
        return _spread(list(self.rounds[name].values()))

    def combine(self, function: Callable[..., float], *names: str) -> float:
        """Median of ``function(seconds of each name)``, round by round, over the rounds that all took part in."""
        common = set.intersection(*(set(self.rounds[name]) for name in names))
        return median(function(*(self.rounds[name][i] for name in names)) for i in common)

    def ratio(self, name: str, to: str | None = None) -> float:
        """Seconds of ``name`` over those of ``to`` (the baseline if none): median of the rounds' ratios."""
        return self.combine(lambda a, b: a / b, name, to or self.baseline)

    def ratio_spread(self, name: str, to: str | None = None) -> float:
        """Interquartile range over median of the rounds' ratios; NaN for fewer than four rounds."""
        first, second = self.rounds[name], self.rounds[to or self.baseline]
        return _spread([first[i] / second[i] for i in first if i in second])

    def summary(self) -> dict[str, Any]:
        """The results as plain data, for a JSON file."""
        return {
            "baseline": self.baseline,
            "seconds": {name: self.seconds(name) for name in self.rounds},
            "spread": {name: self.spread(name) for name in self.rounds},
            "ratio_to_baseline": {name: self.ratio(name) for name in self.rounds},
            "ratio_spread": {name: self.ratio_spread(name) for name in self.rounds},
            "rounds": {name: len(values) for name, values in self.rounds.items()},
            "calls_per_round": self.calls,
            "stable": self.stable,
        }


@dataclass
class _Contender:
    """What is timed, and how: ``calls`` calls a block on ``threads`` threads; a call does what is timed ``units`` times."""

    call: Callable[[], Any]
    prepare: Callable[[], None]
    threads: int
    units: int
    calls: int = 1
    warms_itself: bool = False

    def first(self) -> tuple[Any, float]:
        """The result of one call, and its seconds."""
        torch.set_num_threads(self.threads)
        self.prepare()
        started = time.perf_counter()
        result = self.call()
        return result, time.perf_counter() - started

    def calibrate(self, first_seconds: float) -> float:
        """Choose ``calls``; the seconds of a block."""
        self.warms_itself = first_seconds > SELF_WARM
        seconds = self._seconds()
        self.warms_itself = seconds > SELF_WARM
        while seconds < BLOCK:
            self.calls = max(self.calls + 1, min(2 * self.calls, math.ceil(1.1 * self.calls * BLOCK / seconds)))
            seconds = self._seconds()
        return seconds

    def block(self) -> float:
        """Seconds of what is timed, over a block."""
        return self._seconds() / self.calls / self.units

    def _seconds(self) -> float:
        """Of ``calls`` calls, after ``prepare`` and an untimed call; the least of some tries if all were cut short."""
        torch.set_num_threads(self.threads)
        tries = []
        for _ in range(TRIES if self.threads == 1 else 1):
            self.prepare()
            if not self.warms_itself:
                self.call()
            seconds, running = self._timed()
            tries.append(seconds)
            if seconds > LONG or seconds - running <= AWAY * seconds:
                return seconds
        return min(tries)

    def _timed(self) -> tuple[float, float]:
        """Seconds by the clock, and those that this thread was running."""
        call, turns = self.call, repeat(None, self.calls)
        running, started = time.thread_time(), time.perf_counter()
        for _ in turns:
            call()
        seconds = time.perf_counter() - started
        return seconds, time.thread_time() - running


def compare(
    contenders: Mapping[str, Callable[[], Any]],
    check: Callable[[str, Any], None],
    *,
    baseline: str,
    prepare: Callable[[], None] = lambda: None,
    threads: int | Mapping[str, int] = 1,
    units: Mapping[str, int] | None = None,
    time_limit: float = 5.0,
    min_rounds: int = 20,
    max_rounds: int = 2000,
) -> Comparison:
    """Check every contender, then time them all.

    Args:
        check: ``check(name, result of one call)`` raises AssertionError where the result is not near a float64
            oracle's; no contender is timed until all have passed.
        baseline: the name that ratios are taken to.
        prepare: run before each check and each block, untimed: puts back what contenders have changed in place.
        threads: torch.set_num_threads during checks and timing: one number, or one for each contender.
        units: how often a call of a contender does what is timed, 1 where it is left out: seconds are those of once.
        time_limit: seconds, after which no further round begins once ``min_rounds`` are done.
    """
    of = dict(threads) if isinstance(threads, Mapping) else dict.fromkeys(contenders, threads)
    timed = {name: _Contender(call, prepare, of[name], (units or {}).get(name, 1)) for name, call in contenders.items()}
    with _measuring():
        first = {}
        for name, contender in timed.items():
            output, first[name] = contender.first()
            check(name, output)
        blocks = {name: contender.calibrate(first[name]) for name, contender in timed.items()}
        every = {name: math.ceil(seconds / (SLOW * blocks[baseline])) for name, seconds in blocks.items()}
        every = {name: max(1, min(k, min_rounds // 5)) for name, k in every.items()}
        result = Comparison(baseline, {name: {} for name in timed}, {name: c.calls for name, c in timed.items()})
        started = time.perf_counter()
        for i in range(max_rounds):
            for name in _order(list(timed), i):
                if i % every[name] == 0:
                    result.rounds[name][i] = timed[name].block()
            done, passed = i + 1, time.perf_counter() - started
            if done >= min_rounds and done % 10 == 0 and passed > LEAST and _is_stable(result, done):
                result.stable = True
                break
            if done >= min_rounds and passed > time_limit:
                break
        return result


@contextmanager
def _measuring() -> Iterator[None]:
    """No gradients, no garbage collection in the middle of a block, and torch's number of threads put back."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


def _spread(values: list[float]) -> float:
    if len(values) < 4:
        return math.nan
    low, _, high = quantiles(values, n=4)
    return (high - low) / median(values)


def _order(names: list[str], i: int) -> list[str]:
    """Every contender comes first, last and after each of its two neighbours equally often."""
    start = i // 2 % len(names)
    rotated = names[start:] + names[:start]
    return rotated[::-1] if i % 2 else rotated


def _is_stable(result: Comparison, done: int) -> bool:
    for values in result.rounds.values():
        early = [seconds for i, seconds in values.items() if i < done // 2]
        if len(early) >= 4 and abs(median(early) / median(values.values()) - 1) > STABLE:
            return False
    return True
