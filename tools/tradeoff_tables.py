"""Write the tables of docs/TRADEOFF.md from what was measured: docs/paper_table*.json,
docs/search.json, docs/race*.json and docs/transfer.json.

    ddim-fast tradeoff --paper-table -n 2000 --threads 1 --out table1          # hours
    python tools/tradeoff_tables.py take table1/study.json docs/paper_table.json
    python tools/solver_transfer.py fashion docs/transfer.json
    python tools/tradeoff_tables.py write

A test checks that the page matches the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import click

from ddim_fast.tradeoff import Study, read_json, write_json
from ddim_fast.tradeoff.cells import PAPER_STEPS
from ddim_fast.tradeoff.numbers import measure_text
from ddim_fast.tradeoff.paper import PAPER_FIDS, PAPER_SOURCE, ROWS, paper_table_of, row_text
from ddim_fast.tradeoff.results import CellResult, Measure, describe
from ddim_fast.utils.files import read_json_object

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "TRADEOFF.md"


@click.group(help=__doc__.split("\n\n")[0])
def main() -> None: ...


@main.command()
@click.argument("study", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def take(study: Path, out: Path) -> None:
    """Copy a study's numbers, without its images."""
    write_json(read_json(study), out)


@main.command()
def write() -> None:
    """Write the tables into the page."""
    PAGE.write_text(page_text(PAGE.read_text()))


def page_text(text: str) -> str:
    """Return the page with its tables regenerated."""
    for name, table in TABLES.items():
        block = f"<!-- {name}: begin -->\n{table(DOCS / f'{name}.json')}\n<!-- {name}: end -->"
        pattern = rf"<!-- {name}: begin -->.*?<!-- {name}: end -->"
        text, found = re.subn(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"{PAGE} must have one pair of markers for {name}, got {found}: restore them")
    return text


def paper_table(study: Study) -> str:
    """Return table 1 of the DDIM paper, with our numbers and its own, and which trends agree."""
    table = paper_table_of(study)
    steps = [S for S in PAPER_STEPS if any((row, S) in table.results for row in ROWS)]
    head = "| | " + " | ".join(f"S = {S}" for S in steps) + " |\n|---|" + "---|" * len(steps)
    ours = [
        f"| {row_text(row)} | " + " | ".join(measure_text(table.measure(row, S)) or "–" for S in steps) + " |"
        for row in ROWS
    ]
    theirs = [f"| {row_text(row)} | " + " | ".join(f"{PAPER_FIDS[row][S]:.2f}" for S in steps) + " |" for row in ROWS]
    counts = {S: {table.results[row, S].count for row in ROWS if (row, S) in table.results} for S in steps}
    listed = ", ".join(f"{'/'.join(f'{n:,}' for n in sorted(counts[S]))} at {S}" for S in steps)
    notes = "".join(f" {note}." for note in study.notes)
    agreed = "\n".join(f"- {'agrees' if s.agrees else '**differs**'}: {s.text}" for s in table.statements())
    return (
        f"{table.metric.title}, {table.spacing} spacing; samples: {listed}.{notes}\n\n{head}\n" + "\n".join(ours)
        + f"\n\nFID, {PAPER_SOURCE}:\n\n{head}\n" + "\n".join(theirs) + f"\n\n{agreed}"
    )  # fmt: skip


def cells_table(study: Study) -> str:
    """Return a table of all cells of a study, fewest steps first."""
    metrics = study.metrics
    head = (
        "| | model calls | " + " | ".join(metric.title for metric in metrics) + " |\n|---|---|" + "---|" * len(metrics)
    )
    lines = []
    for result in study.results:
        values = [measure_text(result.quality.get(metric.name)) or "–" for metric in metrics]
        lines.append(f"| {describe(result.cell)} | {result.calls} | " + " | ".join(values) + " |")
    return f"{study.results[0].count:,} samples each:\n\n{head}\n" + "\n".join(lines)


FITTED = "**fitted solver**"


def race_table(study: Study) -> str:
    """Return a table of each metric of a race: contenders by numbers of steps."""
    counts = sorted({result.cell.num_inference_steps for result in study.results})
    names = list(dict.fromkeys([FITTED, *(_contender(result) for result in study.results)]))
    found = {(_contender(result), result.cell.num_inference_steps): result for result in study.results}
    tables = []
    for metric in study.metrics:
        if metric.name not in ("distance", "frechet"):
            continue
        lines = [f"| {metric.title} | " + " | ".join(f"{count} steps" for count in counts) + " |"]
        lines.append("|---|" + "---|" * len(counts))
        for name in names:
            cells = [found.get((name, count)) for count in counts]
            values = [None if cell is None else cell.quality.get(metric.name) for cell in cells]
            lines.append(f"| {name} | " + " | ".join(measure_text(value) or "–" for value in values) + " |")
        tables.append("\n".join(lines))
    return f"{study.results[0].count:,} samples each:\n\n" + "\n\n".join(tables)


def _contender(result: CellResult) -> str:
    cell = result.cell
    if cell.history_weights is not None:
        return FITTED
    if cell.scheduler is not None:
        return cell.timestep_spacing
    return "DDIM at the solver's timesteps" if cell.timesteps is not None else f"DDIM, {cell.timestep_spacing} spacing"


def transfer_table(path: Path) -> str:
    """Return a table of what fitted solvers do where they were not fitted."""
    found = read_json_object(path)
    solvers = found["solvers"]
    lines = ["| | " + " | ".join(solvers) + " |", "|---|" + "---|" * len(solvers)]
    for row in found["rows"]:
        values = [measure_text(Measure(**row[name])) for name in solvers]
        lines.append(f"| {row['setting']} | " + " | ".join(values) + " |")
    return f"{found['count']} samples, distance to converged:\n\n" + "\n".join(lines)


def of_study(table: Callable[[Study], str]) -> Callable[[Path], str]:
    return lambda path: table(read_json(path))


TABLES: dict[str, Callable[[Path], str]] = {
    "paper_table": of_study(paper_table),
    "paper_table_trailing": of_study(paper_table),
    "search": of_study(cells_table),
    "race": of_study(race_table),
    "race_scenes": of_study(race_table),
    "transfer": transfer_table,
}

if __name__ == "__main__":
    main()
