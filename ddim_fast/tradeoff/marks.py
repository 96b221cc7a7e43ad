"""The look of plots, the same on the page and in PNG files: colours, shapes, fills, log axes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .cells import Cell
from .results import CellResult, Measure, Study, eta_text, order_text
from .timing import spread

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#f0e442")
"""Okabe and Ito's colour-blind safe palette (2008), with grey instead of black for dark pages."""
_GREY = 6
SHAPES = ("circle", "square", "triangle", "diamond", "down", "pentagon", "cross", "star")
LOG_FROM = 8
"""An axis is logarithmic if its largest value is at least this many times its smallest."""

_DIMENSIONS: dict[str, Callable[[Cell], str]] = {
    "spacing": lambda cell: (
        cell.timestep_spacing if cell.history_weights is None else f"{cell.timestep_spacing}, fitted"
    ),
    "eta": eta_text,
    "order": order_text,
}


@dataclass(frozen=True)
class Mark:
    """The look of a point: indices into ``COLOURS`` and ``SHAPES``."""

    colour: int = 0
    shape: int = 0
    filled: bool = True


@dataclass(frozen=True)
class LegendEntry:
    """A value and the mark that shows it."""

    value: str
    mark: Mark


class Marks:
    """The marks of a study's cells: colour shows the spacing, shape the eta; order 1 is filled.

    With a single spacing, colour shows the eta as well; with a single eta too, the order. Colours
    and shapes repeat after eight values. Other libraries' schedulers take the next colours, and
    shapes from the other end, one mark each.
    """

    def __init__(self, study: Study):
        cells = [result.cell for result in study.results if result.cell.scheduler is None]
        self._values = {name: _in_order(name, map(of, cells)) for name, of in _DIMENSIONS.items()}
        several = [name for name, values in self._values.items() if len(values) > 1]
        self._coloured_by = several[0] if several else "spacing"
        theirs = dict.fromkeys(r.cell.scheduler for r in study.results if r.cell.scheduler is not None)
        colours = len(self._values[self._coloured_by])
        shapes = max(1, len(SHAPES) - len(self._values["eta"]))
        self._theirs = {
            scheduler: Mark((colours + i) % len(COLOURS), len(SHAPES) - 1 - i % shapes)
            for i, scheduler in enumerate(theirs)
        }
        self._their_names = {r.cell.scheduler: r.cell.timestep_spacing for r in study.results}

    def of(self, cell: Cell) -> Mark:
        if cell.scheduler is not None:
            return self._theirs[cell.scheduler]
        at = {name: self._values[name].index(of(cell)) for name, of in _DIMENSIONS.items()}
        return Mark(at[self._coloured_by] % len(COLOURS), at["eta"] % len(SHAPES), cell.order == 1)

    def legend(self) -> dict[str, list[LegendEntry]]:
        """Return the entries for each of "spacing", "eta" and "order" in which cells differ, and for
        "others".

        An entry's mark shows its own dimension only and is plain in the others.
        """
        several = 0 if self._theirs else 1
        ours = {
            name: [LegendEntry(value, self._plain(name, i, value)) for i, value in enumerate(values)]
            for name, values in self._values.items()
            if len(values) > (several if name == self._coloured_by else 1)
        }
        theirs = [LegendEntry(self._their_names[scheduler], mark) for scheduler, mark in self._theirs.items()]
        return ours | ({"others": theirs} if theirs else {})

    def _plain(self, name: str, i: int, value: str) -> Mark:
        colour = i % len(COLOURS) if name == self._coloured_by else _GREY
        return Mark(colour, i % len(SHAPES) if name == "eta" else 0, name != "order" or value == "1")


@dataclass(frozen=True)
class Horizontal:
    """What a plot shows quality against.

    Attributes:
        of: its value for a result.
        reach: how far its error bar goes; None for none.
    """

    name: str
    title: str
    of: Callable[[CellResult], float]
    reach: Callable[[CellResult], tuple[float, float] | None] = lambda result: None


HORIZONTALS = {
    axis.name: axis
    for axis in (
        Horizontal("time", "milliseconds a sample", lambda result: result.milliseconds, spread),
        Horizontal("calls", "model calls a sample", lambda result: result.calls),
    )
}


@dataclass(frozen=True)
class Point:
    """A result in a plot of a metric, at the horizontal position ``x``, with an error bar over
    ``reach``."""

    result: CellResult
    x: float
    measure: Measure
    mark: Mark
    reach: tuple[float, float] | None = None


def points(study: Study, metric: str, horizontal: Horizontal) -> list[Point]:
    """Return all points of a plot, the Pareto front last, so that it is drawn on top."""
    marks, front = Marks(study), study.pareto_front(metric, horizontal.of)
    drawn = sorted(study.with_metric(metric), key=lambda result: any(result is one for one in front))
    return [
        Point(result, horizontal.of(result), result.quality[metric], marks.of(result.cell), horizontal.reach(result))
        for result in drawn
    ]


def is_log(values: Sequence[float]) -> bool:
    """Return whether these values are shown on a logarithmic axis."""
    return len(values) > 0 and min(values) > 0 and max(values) >= LOG_FROM * min(values)


def _in_order(name: str, values: Iterable[str]) -> list[str]:
    """Return the distinct values: spacings in their order, others by number, words last."""
    different = list(dict.fromkeys(values))
    return different if name == "spacing" else sorted(different, key=lambda text: (_number(text), text))


def _number(text: str) -> float:
    """Return the number that a text begins with; infinity if with none."""
    found = re.match(r"\d+(\.\d+)?(e[+-]?\d+)?", text)
    return float(found[0]) if found else math.inf
