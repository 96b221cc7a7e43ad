"""How plots show a study, the same on the page and in PNG files: colours, shapes, what is filled,
and which axes are logarithmic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .cells import Cell
from .results import CellResult, Measure, Study, eta_text

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#f0e442")
"""Okabe and Ito's palette (2008), which colour-blind people can distinguish; grey instead of black,
for dark pages."""
_GREY = 6
SHAPES = ("circle", "square", "triangle", "diamond", "down", "pentagon", "cross", "star")
LOG_FROM = 8
"""An axis whose largest value is that many times its smallest is logarithmic."""

_DIMENSIONS: dict[str, Callable[[Cell], str]] = {
    "spacing": lambda cell: cell.timestep_spacing,
    "eta": eta_text,
    "order": lambda cell: str(cell.order),
}


@dataclass(frozen=True)
class Mark:
    """How a point is drawn: numbers in ``COLOURS`` and ``SHAPES``."""

    colour: int = 0
    shape: int = 0
    filled: bool = True


@dataclass(frozen=True)
class LegendEntry:
    """What a mark stands for."""

    value: str
    mark: Mark


class Marks:
    """The marks of a study's cells: colour is the spacing, shape the eta, and order 1 is filled.

    With a single spacing, colour is the eta, too; with a single eta as well, the order. Beyond
    eight values, colours and shapes repeat.
    """

    def __init__(self, study: Study):
        cells = [result.cell for result in study.results]
        self._values = {name: _in_order(name, map(of, cells)) for name, of in _DIMENSIONS.items()}
        several = [name for name, values in self._values.items() if len(values) > 1]
        self._coloured_by = several[0] if several else "spacing"

    def of(self, cell: Cell) -> Mark:
        at = {name: self._values[name].index(of(cell)) for name, of in _DIMENSIONS.items()}
        return Mark(at[self._coloured_by] % len(COLOURS), at["eta"] % len(SHAPES), cell.order == 1)

    def legend(self) -> dict[str, list[LegendEntry]]:
        """By "spacing", "eta" and "order": those in which cells differ. What does not is shown as
        it is in a plain mark."""
        return {
            name: [LegendEntry(value, self._plain(name, i, value)) for i, value in enumerate(values)]
            for name, values in self._values.items()
            if len(values) > 1
        }

    def _plain(self, name: str, i: int, value: str) -> Mark:
        colour = i % len(COLOURS) if name == self._coloured_by else _GREY
        return Mark(colour, i % len(SHAPES) if name == "eta" else 0, name != "order" or value == "1")


@dataclass(frozen=True)
class Point:
    """A result in a plot of a metric: ``x`` as the plot has it."""

    result: CellResult
    x: float
    measure: Measure
    mark: Mark


def points(study: Study, metric: str, x: Callable[[CellResult], float]) -> list[Point]:
    """Return all points of a plot, the front last, so that nothing covers it."""
    marks, front = Marks(study), study.pareto_front(metric)
    drawn = sorted(study.with_metric(metric), key=lambda result: any(result is one for one in front))
    return [Point(result, x(result), result.quality[metric], marks.of(result.cell)) for result in drawn]


def is_log(values: Sequence[float]) -> bool:
    """Return whether these values are easier to distinguish on a logarithmic axis."""
    return len(values) > 0 and min(values) > 0 and max(values) >= LOG_FROM * min(values)


def _in_order(name: str, values: Iterable[str]) -> list[str]:
    """Each once: spacings as they came, others by number, sigma-hat last."""
    different = list(dict.fromkeys(values))
    if name == "spacing":
        return different
    return sorted(
        different, key=lambda text: (text == "sigma-hat", float(text.split()[0]) if text != "sigma-hat" else 0.0, text)
    )
