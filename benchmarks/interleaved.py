"""The one timing harness: contenders timed in turn, in one process, so that whatever slows the machine slows them all.

A round times every contender once, each for a block of at least ``BLOCK`` seconds of repeated calls, after
``prepare`` and one untimed call that brings its data into the caches. The order changes from round to round. A
contender much slower than the baseline takes part in every k-th round only, but in five at least. On one thread, a
block during which the operating system gave the processor to someone else is run again, so that a busy machine costs
rounds rather than truth. Times are medians over rounds; ratios are medians of the ratios *within* a round, so a drift
of the machine's speed over the rounds cancels.
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
        values = list(self.rounds[name].values())
        if len(values) < 4:
            return math.nan
        low, _, high = quantiles(values, n=4)
        return (high - low) / median(values)

    def combine(self, function: Callable[..., float], *names: str) -> float:
        """Median of ``function(seconds of each name)``, round by round, over the rounds that all took part in."""
        common = set.intersection(*(set(self.rounds[name]) for name in names))
        return median(function(*(self.rounds[name][i] for name in names)) for i in common)

    def ratio(self, name: str, to: str | None = None) -> float:
        """Seconds of ``name`` over those of ``to`` (the baseline if none): median of the rounds' ratios."""
        return self.combine(lambda a, b: a / b, name, to or self.baseline)

    def summary(self) -> dict[str, Any]:
        """The results as plain data, for a JSON file."""
        return {
            "baseline": self.baseline,
            "seconds": {name: self.seconds(name) for name in self.rounds},
            "spread": {name: self.spread(name) for name in self.rounds},
            "ratio_to_baseline": {name: self.ratio(name) for name in self.rounds},
            "rounds": {name: len(values) for name, values in self.rounds.items()},
            "calls_per_round": self.calls,
            "stable": self.stable,
        }


def compare(
    contenders: Mapping[str, Callable[[], Any]],
    check: Callable[[str, Any], None],
    *,
    baseline: str,
    prepare: Callable[[], None] = lambda: None,
    threads: int = 1,
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
        threads: torch.set_num_threads during checks and timing.
        time_limit: seconds, after which no further round begins once ``min_rounds`` are done.
    """
    with _measuring(threads):
        for name, call in contenders.items():
            prepare()
            check(name, call())
        calls = {name: _calls_per_block(call, prepare) for name, call in contenders.items()}
        once = {name: _block(call, calls[name], prepare) * calls[name] for name, call in contenders.items()}
        every = {name: math.ceil(seconds / (SLOW * once[baseline])) for name, seconds in once.items()}
        every = {name: max(1, min(k, min_rounds // 5)) for name, k in every.items()}
        result = Comparison(baseline, {name: {} for name in contenders}, calls)
        stop = time.perf_counter() + time_limit
        for i in range(max_rounds):
            for name in _order(list(contenders), i):
                if i % every[name] == 0:
                    result.rounds[name][i] = _block(contenders[name], calls[name], prepare)
            done = i + 1
            if done >= min_rounds and done % 10 == 0 and _is_stable(result, done):
                result.stable = True
                break
            if done >= min_rounds and time.perf_counter() > stop:
                break
        return result


@contextmanager
def _measuring(threads: int) -> Iterator[None]:
    """A fixed number of threads, no gradients, and no garbage collection in the middle of a block."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


def _block(call: Callable[[], Any], calls: int, prepare: Callable[[], None]) -> float:
    """Seconds per call over ``calls`` calls, after ``prepare`` and an untimed call; the least if all were cut short."""
    tries = []
    for _ in range(TRIES if torch.get_num_threads() == 1 else 1):
        prepare()
        call()
        turns = repeat(None, calls)
        running, started = time.thread_time(), time.perf_counter()
        for _ in turns:
            call()
        seconds = time.perf_counter() - started
        running = time.thread_time() - running
        tries.append(seconds / calls)
        if seconds > LONG or seconds - running <= AWAY * seconds:
            return tries[-1]
    return min(tries)


def _calls_per_block(call: Callable[[], Any], prepare: Callable[[], None]) -> int:
    calls = 1
    while (seconds := _block(call, calls, prepare) * calls) < BLOCK:
        calls = max(calls + 1, min(2 * calls, math.ceil(1.1 * calls * BLOCK / seconds)))
    return calls


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
