"""The timing harness: contenders take turns in one process, so that other load slows all alike.

A round times every contender once, for a block of at least ``BLOCK`` seconds of repeated calls,
after ``prepare`` and one untimed call that warms the caches (not if a call takes longer than
``SELF_WARM``). The order changes from round to round. A contender much slower than the baseline
takes part only in every k-th round, but in at least five. On one thread, a block during which the
operating system ran another thread on the processor is repeated, so that a busy machine costs
rounds, not accuracy. Times are medians over rounds. Ratios are medians of the ratios *within* a
round, so that drifts of the machine's speed cancel.
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
"""Minimum seconds of a contender in each round: the clock costs less than 0.1 % of it."""
STABLE = 0.01
"""Stop when no median differs by more than this from the median of the first half of the rounds."""
LEAST = 1.0
"""Minimum seconds of all rounds together: a shorter time may not be representative."""
SELF_WARM = 50e-3
"""A call longer than this warms the caches itself, at a negligible share of its time."""
SLOW = 10
"""A contender whose block takes longer than this many of the baseline's skips some rounds."""

AWAY, TRIES, LONG = 0.02, 3, 4e-3
"""A block is run up to ``TRIES`` times while its thread was off the processor for more than the
share ``AWAY`` of it. Blocks longer than ``LONG`` seconds are not repeated: all of them are
interrupted, and all contenders equally."""


@dataclass
class Comparison:
    """Seconds per call: ``rounds[name][i]`` in round i. Slow contenders skip some rounds."""

    baseline: str
    rounds: dict[str, dict[int, float]]
    calls: dict[str, int] = field(default_factory=dict)
    stable: bool = False

    def seconds(self, name: str) -> float:
        """Return the median seconds per call."""
        return median(self.rounds[name].values())

    def spread(self, name: str) -> float:
        """Return the interquartile range over the median; NaN for fewer than four rounds."""
        return _spread(list(self.rounds[name].values()))

    def combine(self, function: Callable[..., float], *names: str) -> float:
        """Return the median over common rounds of ``function(seconds of each name)``."""
        common = set.intersection(*(set(self.rounds[name]) for name in names))
        return median(function(*(self.rounds[name][i] for name in names)) for i in common)

    def ratio(self, name: str, to: str | None = None) -> float:
        """Return the median over rounds of the seconds of ``name`` over those of ``to``.

        None: the baseline.
        """
        return self.combine(lambda a, b: a / b, name, to or self.baseline)

    def ratio_spread(self, name: str, to: str | None = None) -> float:
        """Return the interquartile range over the median of the rounds' ratios.

        NaN for fewer than four rounds.
        """
        first, second = self.rounds[name], self.rounds[to or self.baseline]
        return _spread([first[i] / second[i] for i in first if i in second])

    def summary(self) -> dict[str, Any]:
        """Return the results as plain data, for a JSON file."""
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
    """A contender: ``calls`` calls per block on ``threads`` threads, ``units`` units per call."""

    call: Callable[[], Any]
    prepare: Callable[[], None]
    threads: int
    units: int
    calls: int = 1
    warms_itself: bool = False

    def first(self) -> tuple[Any, float]:
        """Return the result of one call, and its seconds."""
        torch.set_num_threads(self.threads)
        self.prepare()
        started = time.perf_counter()
        result = self.call()
        return result, time.perf_counter() - started

    def calibrate(self, first_seconds: float) -> float:
        """Choose ``calls``; return the seconds of a block."""
        self.warms_itself = first_seconds > SELF_WARM
        seconds = self._seconds()
        self.warms_itself = seconds > SELF_WARM
        while seconds < BLOCK:
            self.calls = max(self.calls + 1, min(2 * self.calls, math.ceil(1.1 * self.calls * BLOCK / seconds)))
            seconds = self._seconds()
        return seconds

    def block(self) -> float:
        """Return the seconds per unit of work, over a block."""
        return self._seconds() / self.calls / self.units

    def _seconds(self) -> float:
        """Return the seconds of a block, after ``prepare`` and an untimed call.

        If all tries were interrupted, the minimum.
        """
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
        """Return the wall-clock seconds, and those that this thread was running."""
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
        check: ``check(name, result of one call)`` raises AssertionError if the result is not close
            to a float64 oracle's. No contender is timed until all have passed.
        baseline: the contender that ratios are relative to.
        prepare: runs untimed before each check and each block, to undo in-place changes.
        threads: torch.set_num_threads during checks and timing: one number, or one per contender.
        units: units of work in a call of each contender, 1 by default. Seconds are per unit.
        time_limit: seconds after which no new round starts, once ``min_rounds`` are done.
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
    """Disable gradients and garbage collection; restore torch's number of threads at the end."""
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
    """Return the order of round ``i``.

    Each contender is first, last and after each of its two neighbours equally often.
    """
    start = i // 2 % len(names)
    rotated = names[start:] + names[:start]
    return rotated[::-1] if i % 2 else rotated


def _is_stable(result: Comparison, done: int) -> bool:
    for values in result.rounds.values():
        early = [seconds for i, seconds in values.items() if i < done // 2]
        if len(early) >= 4 and abs(median(early) / median(values.values()) - 1) > STABLE:
            return False
    return True
