"""The layout of a plot for SVG: the coordinates of axes, points, error bars and front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .marks import SHAPES, Mark, Point, is_log
from .results import CellResult

_R = 5.5
# Centred at (0, 0), with about equal areas.
_PATHS = {
    "circle": f"M{-_R} 0a{_R} {_R} 0 1 0 {2 * _R} 0a{_R} {_R} 0 1 0 {-2 * _R} 0z",
    "square": "M-5-5h10v10h-10z",
    "triangle": "M0-6.5L6.5 5h-13z",
    "diamond": "M0-7L7 0 0 7-7 0z",
    "down": "M0 6.5L6.5-5h-13z",
    "pentagon": "M0-6.5L6.2-2 3.8 5.3h-7.6L-6.2-2z",
    "cross": "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
    "star": "M0-7.5L2-2.5 7-2.5 3 1 4.5 6.5 0 3.2-4.5 6.5-3 1-7-2.5-2-2.5z",
}
_ERROR_REACH = 0.6
"""The largest share of a value by which its error bar extends the vertical axis."""


def path_of(mark: Mark) -> str:
    return _PATHS[SHAPES[mark.shape]]


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Axis:
    """A map from values to coordinates: ``low`` is at ``start``, ``high`` at ``end``."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    def place(self, value: float) -> float:
        """Return the coordinate of a value, clamped to the ends of the axis."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(value, self.low))
        share = (at - low) / (high - low)
        return round(self.start + (self.end - self.start) * min(max(share, 0.0), 1.0), 1)

    def ticks(self, most: int) -> list[Tick]:
        """Return at most ``most`` ticks, at round numbers."""
        values = _log_ticks(self.low, self.high, most) if self.log else _linear_ticks(self.low, self.high, most)
        return [Tick(self.place(value), f"{value:,.6g}") for value in values]


def axis(values: Sequence[float], start: float, end: float, margin: float = 0.07) -> Axis:
    """Return an axis that contains all values, with room at both ends."""
    low, high = min(values), max(values)
    if is_log(values):
        room = (high / low) ** margin
        return Axis(low / room, high * room, True, start, end)
    room = margin * (high - low) or 0.2 * abs(high) or 1.0
    # An axis of non-negative values must not start below 0.
    return Axis(max(0.0, low - room) if low >= 0 else low - room, high + room, False, start, end)


@dataclass(frozen=True)
class Dot:
    """A point at its coordinates. Its error bars reach from ``top`` to ``bottom`` and from ``left``
    to ``right``; None if it has none."""

    point: Point
    x: float
    y: float
    top: float | None
    bottom: float | None
    on_front: bool
    left: float | None = None
    right: float | None = None


@dataclass(frozen=True)
class Plot:
    """A plot of ``width`` by ``height``, whose axes span (left, top) to (right, bottom)."""

    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    dots: list[Dot]
    labels: list[tuple[Dot, float]]
    line: str


def plot(points: Sequence[Point], front: Sequence[CellResult], width: int, height: int, labels_below: bool) -> Plot:
    """Return the layout of a plot of at least one point.

    Args:
        front: the results that the line connects.
        labels_below: write the numbers of calls below the front, the side without points if lower
            is better; otherwise above.
    """
    left, right, top, bottom = 58.0, width - 14.0, 24.0, height - 46.0
    horizontal = axis([x for p in points for x in (p.x, *(p.reach or ()))], left, right)
    vertical = axis([value for p in points for value in _reach(p)], bottom, top)
    dots = []
    for p in points:
        known = math.isfinite(p.measure.error) and p.measure.error > 0
        top_end, bottom_end = (
            vertical.place(p.measure.value + sign * p.measure.error) if known else None for sign in (1, -1)
        )
        is_on = any(p.result is one for one in front)
        ends = (None, None) if p.reach is None else (horizontal.place(p.reach[0]), horizontal.place(p.reach[1]))
        dots.append(Dot(p, horizontal.place(p.x), vertical.place(p.measure.value), top_end, bottom_end, is_on, *ends))
    on_front = sorted((dot for dot in dots if dot.on_front), key=lambda dot: dot.x)
    return Plot(
        width,
        height,
        left,
        right,
        top,
        bottom,
        horizontal.ticks(max(3, width // 110)),
        vertical.ticks(max(4, height // 60)),
        dots,
        _labels(on_front, labels_below, bottom),
        " ".join(f"{dot.x},{dot.y}" for dot in on_front),
    )


def _labels(on_front: Sequence[Dot], below: bool, floor: float) -> list[tuple[Dot, float]]:
    """Return the points of the front to label, each with the label's y, starting from the last.

    Labels that would overlap are left out, and none is placed below ``floor``.
    """
    placed: list[tuple[Dot, float]] = []
    for dot in reversed(on_front):
        y = max(dot.y + 20, (dot.bottom or 0.0) + 14)
        if not below or y > floor:
            y = min(dot.y - 11, math.inf if dot.top is None else dot.top - 5)
        if all(abs(dot.x - other.x) > 30 or abs(y - at) > 14 for other, at in placed):
            placed.append((dot, round(y, 1)))
    return placed


def _reach(point: Point) -> list[float]:
    """Return the values of a point that the vertical axis must contain."""
    value, error = point.measure.value, point.measure.error
    error = min(error, _ERROR_REACH * abs(value)) if math.isfinite(error) else 0.0
    return [value - error, value, value + error]


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    exponent = math.floor(math.log10(high - low)) - 1
    for e in range(exponent, exponent + 4):
        for factor in (1, 2, 5):
            step = factor * 10.0**e
            numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
            if len(numbers) <= most:
                return [number * step for number in numbers]
    return []


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for factors in ((1, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]
