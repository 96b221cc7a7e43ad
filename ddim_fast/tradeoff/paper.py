"""A study compared with table 1 of the DDIM paper: its numbers, ours in the same layout, and which
trends agree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise

from ..plans.eta import PAPER, told_apart
from .cells import PAPER_ETAS, PAPER_STEPS, Cell
from .results import CellResult, Measure, Metric, Study, overlap

SIGMA_HAT = "sigma-hat"
Row = float | str
"""An eta, or ``SIGMA_HAT``."""
ROWS: tuple[Row, ...] = (*PAPER_ETAS, SIGMA_HAT)

PAPER_FIDS: dict[Row, dict[int, float]] = {
    0.0: dict(zip(PAPER_STEPS, (13.36, 6.84, 4.67, 4.16, 4.04), strict=True)),
    0.2: dict(zip(PAPER_STEPS, (14.04, 7.11, 4.77, 4.25, 4.09), strict=True)),
    0.5: dict(zip(PAPER_STEPS, (16.66, 8.35, 5.25, 4.46, 4.29), strict=True)),
    1.0: dict(zip(PAPER_STEPS, (41.07, 18.36, 8.01, 5.78, 4.73), strict=True)),
    SIGMA_HAT: dict(zip(PAPER_STEPS, (367.43, 133.37, 32.72, 9.99, 3.17), strict=True)),
}
"""FID by row and S, from Song, Meng, Ermon 2020, arXiv 2010.02502, table 1, CIFAR10 (32 x 32)."""
PAPER_SOURCE = "Song, Meng, Ermon 2020 (arXiv 2010.02502), table 1, CIFAR10 32 x 32"

_COLLAPSE = 2.0
"""A row collapses if its distance is at least this many times that of the best row."""


@dataclass(frozen=True)
class Statement:
    """A trend in the paper's numbers, and whether ours agree."""

    text: str
    agrees: bool


@dataclass(frozen=True)
class PaperTable:
    """Our numbers in the paper's layout.

    Args:
        results: by row and S; cells that were not measured are missing.
        spacing: the timestep spacing of all these cells.
    """

    metric: Metric
    spacing: str
    results: dict[tuple[Row, int], CellResult]

    def measure(self, row: Row, steps: int) -> Measure | None:
        """Return the number of a cell; None if it was not measured."""
        result = self.results.get((row, steps))
        return None if result is None else result.quality[self.metric.name]

    def statements(self) -> list[Statement]:
        """Return which trends agree, over the cells that were measured."""
        return [*self._order_of_rows(), *self._gain_by_steps(), *self._sigma_hat()]

    # Each yields nothing where missing cells leave nothing to compare.

    def _order_of_rows(self) -> Iterator[Statement]:
        for S in PAPER_STEPS:
            rows = sorted((r for r in ROWS if (r, S) in self.results), key=lambda r: PAPER_FIDS[r][S])
            if len(rows) < 2:
                continue
            wrong = [(a, b) for a, b in combinations(rows, 2) if self._is_better((b, S), (a, S))]
            listed = " < ".join(row_text(row) for row in rows)
            if not wrong:
                yield Statement(f"At S = {S} the rows come in the paper's order, {listed}, up to our error bars.", True)
            else:
                found = ", ".join(f"{row_text(b)} is better than {row_text(a)}" for a, b in wrong)
                yield Statement(f"At S = {S} the paper's order is {listed}; here {found}.", False)

    def _gain_by_steps(self) -> Iterator[Statement]:
        for row in ROWS:
            steps = [S for S in PAPER_STEPS if (row, S) in self.results]
            if len(steps) < 2:
                continue
            worse = [(a, b) for a, b in pairwise(steps) if self._is_better((row, a), (row, b))]
            if not worse:
                yield Statement(
                    f"{row_text(row)}: more steps are never worse, as in the paper, up to our error bars.", True
                )
            else:
                found = ", ".join(f"S = {b} is worse than S = {a}" for a, b in worse)
                yield Statement(f"{row_text(row)}: in the paper every further step helps; here {found}.", False)

    def _sigma_hat(self) -> Iterator[Statement]:
        few, many = min(PAPER_STEPS), max(PAPER_STEPS)
        rows = [row for row in ROWS if (row, few) in self.results]
        if SIGMA_HAT in rows and len(rows) > 1 and self.metric.better == "lower":
            best = min(self._value(row, few) for row in rows)
            times = self._value(SIGMA_HAT, few) / best if best > 0 else float("inf")
            paper = PAPER_FIDS[SIGMA_HAT][few] / min(PAPER_FIDS[row][few] for row in rows)
            agrees = (times >= _COLLAPSE) == (paper >= _COLLAPSE)
            verb = "collapses" if times >= _COLLAPSE else "does not collapse"
            yield Statement(
                f"At S = {few} sigma-hat {verb}: it is {times:.3g} times the best row's here, {paper:.3g} times in the paper.",
                agrees,
            )
        rows = [row for row in ROWS if (row, many) in self.results]
        if SIGMA_HAT in rows and len(rows) > 1:
            better = [row_text(row) for row in rows if self._is_better((row, many), (SIGMA_HAT, many))]
            if not better:
                yield Statement(
                    f"At S = {many} no row is better than sigma-hat, as in the paper, up to our error bars.", True
                )
            else:
                yield Statement(
                    f"At S = {many} sigma-hat is the paper's best row; here {' and '.join(better)} "
                    f"{'is' if len(better) == 1 else 'are'} better.",
                    False,
                )

    def _value(self, row: Row, steps: int) -> float:
        return self.results[row, steps].quality[self.metric.name].value

    def _is_better(self, a: tuple[Row, int], b: tuple[Row, int]) -> bool:
        """Return whether our number at a beats the one at b by more than the error bars."""
        one, other = (self.results[place].quality[self.metric.name] for place in (a, b))
        return self.metric.cost(one.value) < self.metric.cost(other.value) and not overlap(one, other)


def row_text(row: Row) -> str:
    return row if isinstance(row, str) else f"eta {row:.1f}"


def paper_table_of(study: Study) -> PaperTable | None:
    """Return our numbers in the paper's layout; None if a row is empty.

    They are those of the first metric that has every row, in the spacing that fills most cells. Of
    equals, the paper's spacing wins.
    """
    found = []
    for metric in study.metrics:
        results = [(place, r) for r in study.with_metric(metric.name) if (place := _place(r.cell)) is not None]
        for spacing in dict.fromkeys(r.cell.timestep_spacing for _, r in results):
            cells = {place: r for place, r in reversed(results) if r.cell.timestep_spacing == spacing}
            if {row for row, _ in cells} == set(ROWS):
                found.append(PaperTable(metric, spacing, cells))
        if found:
            return max(found, key=lambda table: (len(table.results), table.spacing == "quad"))
    return None


def _place(cell: Cell) -> tuple[Row, int] | None:
    """Return a cell's row and column in the table; None if it is not part of it."""
    row = SIGMA_HAT if cell.sigma_hat else cell.eta
    own = (cell.timesteps, cell.model_timesteps, cell.analytic_variance, cell.history_weights)
    plain = (
        cell.order == 1
        and own == (None, None, None, None)
        and told_apart(cell.eta_scales, cell.eta) == (PAPER, cell.eta)
    )
    return (
        (row, cell.num_inference_steps) if plain and row in ROWS and cell.num_inference_steps in PAPER_STEPS else None
    )
