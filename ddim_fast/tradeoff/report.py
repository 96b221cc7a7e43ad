"""The report of a study: one self-contained HTML page, PNG plots, CSV and JSON."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image

from ..utils.atomic_files import write_atomically
from ..utils.extras import missing
from ..utils.html import capital, plain_text, render_page
from . import plots, svg
from .cells import Cell
from .marks import COLOURS, HORIZONTALS, Marks, points
from .numbers import measure_text, number_text
from .paper import PAPER_FIDS, PAPER_SOURCE, PAPER_STEPS, ROWS, paper_table_of, row_text
from .race import Race, alternatives, as_data, races, reached_text, ways_to_apply
from .results import (
    CellResult,
    Measure,
    Metric,
    Recommendation,
    Study,
    describe,
    eta_text,
    json_text,
    order_text,
    way_of,
)
from .study import PICTURES
from .timing import remarks, spread_text

_IN_A_ROW = 10
"""Samples in a row of a cell's sample grid."""
_SIZES = {"wide": (900, 460), "narrow": (366, 380)}
"""Sizes of a plot on a desktop and on a phone, so that text keeps its size on both."""
_MOST_SMALL = 12  # characters of a digest on the page; the JSON has all of them


def check_libraries() -> None:
    """Raise ImportError if a library that the report needs is missing."""
    for name in ("jinja2", "matplotlib"):
        try:
            import_module(name)
        except ImportError:
            raise ImportError(missing("the report of a study", [name], "tradeoff")) from None


def write_report(study: Study, directory: Path) -> list[Path]:
    """Write ``report.html``, ``study.json``, ``cells.csv``, and PNG plots of each metric.

    Each file is written atomically.

    Args:
        directory: the study's, from which sample grids are read.

    Returns:
        The paths of the files, the page first.

    Raises:
        ImportError: matplotlib or jinja2 is missing; nothing was written.
        OSError: a file could not be written; an older file is left unchanged.
    """
    contents = {
        "report.html": html_text(study, directory).encode(),
        "study.json": json_text(study, time_to_quality=[as_data(race) for race in races(study)]).encode(),
        "cells.csv": csv_text(study).encode(),
    }
    for metric in study.metrics:
        contents[f"quality-against-time-{metric.name}.png"] = plots.quality_against_time(study, metric.name)
        contents[f"quality-against-calls-{metric.name}.png"] = plots.quality_against_calls(study, metric.name)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomically(directory / name, content)
    return [directory / name for name in contents]


# --- CSV --------------------------------------------------------------------------------------------------------------


def csv_text(study: Study) -> str:
    """Return a CSV table with a row for each cell.

    Each metric has its value, its standard error, and whether the cell is on the Pareto front.
    Unknown values are empty.
    """
    fronts = {metric.name: study.pareto_front(metric.name) for metric in study.metrics}
    columns = _csv_row(CellResult(Cell(1), 0, {}, 0.0, 0.0, 0), fronts)  # a dummy cell: a study may have none
    file = io.StringIO()
    writer = csv.DictWriter(file, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_csv_row(result, fronts) for result in study.results)
    return file.getvalue()


def _csv_row(result: CellResult, fronts: Mapping[str, list[CellResult]]) -> dict[str, Any]:
    cell = result.cell
    row = {
        "steps": cell.num_inference_steps,
        "spacing": plain_text(cell.timestep_spacing),
        "timesteps": "" if cell.timesteps is None else " ".join(map(str, cell.timesteps)),
        "eta": cell.eta if cell.scheduler is None else "",
        "eta_scales": cell.eta_scales,
        "sigma_hat": cell.sigma_hat,
        "order": order_text(cell),
        "model_timesteps": "" if cell.model_timesteps is None else " ".join(map(str, cell.model_timesteps)),
        "analytic_variance": cell.analytic_variance is not None,
        "scheduler": plain_text(cell.scheduler or ""),
        "samples": result.count,
        "calls": result.calls,
        "milliseconds": result.milliseconds,
        "model_ms": result.model_ms,
        "update_ms": result.update_ms,
        "batch_ms": " ".join(map(repr, result.batch_ms)),
        "peak_megabytes": result.peak_megabytes,
    }
    for name, front in fronts.items():
        measure = result.quality.get(name, Measure(math.nan))
        row |= {name: measure.value, f"{name}_error": measure.error, f"{name}_front": any(result is r for r in front)}
    return {name: _csv_value(value) for name, value in row.items()}


def _csv_value(value: Any) -> Any:
    """Return a value for the CSV: numbers in full precision, empty if not finite."""
    if isinstance(value, bool):
        return int(value)
    return "" if isinstance(value, float) and not math.isfinite(value) else value


# --- The page ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Quality:
    """A metric's value in the table."""

    text: str
    value: float | str
    on_front: bool
    is_best: bool
    within_error: bool


@dataclass(frozen=True)
class _Row:
    """A cell on the page."""

    number: int
    result: CellResult
    words: str
    eta: str
    order: str
    quality: dict[str, _Quality | None]
    picture: str | None


@dataclass(frozen=True)
class _MetricPlot:
    metric: Metric
    sizes: dict[str, dict[str, svg.Plot]]
    recommendation: Recommendation | None


def html_text(study: Study, directory: Path) -> str:
    """Return the HTML page.

    Args:
        directory: the study's. Only PNG files inside it are used as sample grids.

    Raises:
        ImportError: jinja2 is missing.
    """
    pictures = [_picture(directory, result.pictures) for result in study.results]
    rows = _rows(study, pictures)
    environment = _flat(study.settings.get("environment", {}))
    found, marks = races(study), Marks(study)
    by_id = {id(row.result): row for row in rows}
    return render_page(
        __package__,
        "tradeoff",
        {
            "number": number_text,
            "measure": measure_text,
            "path": svg.path_of,
            "spread": spread_text,
            "colour": lambda mark: COLOURS[mark.colour],
        },
        study=study,
        headline=_headline(study, found),
        races=found,
        how=ways_to_apply(study),
        alternatives=alternatives(study),
        reached=reached_text,
        horizontals=HORIZONTALS,
        remarks=remarks(study),
        metrics=study.metrics,
        rows=rows,
        row_of=lambda result: by_id[id(result)],
        choices=_choices(rows),
        plots=[_metric_plot(study, metric) for metric in study.metrics],
        legend=marks.legend(),
        mark_of=marks.of,
        strips=_strips(study, rows, pictures),
        paper=paper_table_of(study),
        paper_steps=PAPER_STEPS,
        paper_rows=ROWS,
        paper_fids=PAPER_FIDS,
        paper_source=PAPER_SOURCE,
        row_text=row_text,
        counts=_counts_text(study),
        settings=_flat({name: value for name, value in study.settings.items() if name != "environment"}),
        environment=environment,
        device=environment.get("processor") or environment.get("device"),
    )


def _headline(study: Study, found: list[Race]) -> str:
    recommendation = study.recommendation()
    if recommendation is not None:
        return str(recommendation)
    if found:
        return capital(str(found[0]))
    return "Only times were measured, no quality." if study.results else "Nothing was measured."


def _rows(study: Study, pictures: list[bytes | None]) -> list[_Row]:
    about = {
        m.name: (study.pareto_front(m.name), study.within_error(m.name), study.best(m.name)) for m in study.metrics
    }

    def quality(result: CellResult, name: str) -> _Quality | None:
        measure = result.quality.get(name)
        if measure is None:
            return None
        front, close, best = about[name]
        return _Quality(
            measure_text(measure),
            measure.value if math.isfinite(measure.value) else "",
            any(result is one for one in front),
            result is best,
            any(result is one for one in close),
        )

    return [
        _Row(
            number,
            result,
            describe(result.cell),
            eta_text(result.cell),
            order_text(result.cell),
            {name: quality(result, name) for name in about},
            None if picture is None else _data_uri(picture),
        )
        for number, (result, picture) in enumerate(zip(study.results, pictures, strict=True), 1)
    ]


def _choices(rows: list[_Row]) -> dict[str, list[str]]:
    """Return the filters of the table: the values of each column that has more than one."""
    values = {
        "spacing": [row.result.cell.timestep_spacing for row in rows],
        "eta": [row.eta for row in rows],
        "order": [row.order for row in rows],
        "steps": [str(row.result.cell.num_inference_steps) for row in rows],
    }
    return {name: list(dict.fromkeys(found)) for name, found in values.items() if len(set(found)) > 1}


def _metric_plot(study: Study, metric: Metric) -> _MetricPlot:
    below = metric.better == "lower"
    sizes = {}
    for name, horizontal in HORIZONTALS.items():
        drawn, front = points(study, metric.name, horizontal), study.pareto_front(metric.name, horizontal.of)
        sizes[name] = {size: svg.plot(drawn, front, *area, below) for size, area in _SIZES.items()}
    return _MetricPlot(metric, sizes, study.recommendation(metric.name))


def _counts_text(study: Study) -> str:
    """Describe the number of samples of each cell, with a warning if cells differ in it."""
    counts: dict[int, int] = {}
    for result in study.results:
        counts[result.count] = counts.get(result.count, 0) + 1
    if not counts:
        return ""
    usual = max(counts, key=lambda count: (counts[count], count))
    others = [result for result in study.results if result.count != usual]
    text = f"Each cell has {_samples(usual)}"
    if not others:
        return f"{text}."
    listed = "; ".join(f"{describe(result.cell)}: {result.count:,}" for result in others)
    return f"{text}, except {listed}. Distances are not closely comparable between different numbers of samples."


def _samples(count: int) -> str:
    return "1 sample" if count == 1 else f"{count:,} samples"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested settings, keyed by their path; shorten digests."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name} ")
        elif value is not None:
            text = " x ".join(map(str, value)) if isinstance(value, list) else str(value)
            label = f"{prefix}{name}".replace("_", " ")
            found[label] = text[:_MOST_SMALL] if name == "sha256" else text
    return found


# --- Pictures ---------------------------------------------------------------------------------------------------------


_LARGEST_PICTURE = 1 << 28
"""Bytes of a file that the page takes in: twice those of 30 pictures of 1024 x 1024 pixels."""


def _picture(directory: Path, name: str | None) -> bytes | None:
    """Read a PNG file of the study's directory; return None for any other file or place."""
    if name is None:
        return None
    try:
        path = (directory / name).resolve()
        if not path.is_relative_to(directory.resolve()) or not path.is_file() or path.stat().st_size > _LARGEST_PICTURE:
            return None
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.verify()  # its checksums
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()  # its pixels
    except (OSError, ValueError, RuntimeError):  # no path, or one of links that go in a circle
        return None
    except (SyntaxError, Image.DecompressionBombError):  # Pillow's, of a file that is no PNG, is broken, or huge
        return None
    return content


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


@dataclass(frozen=True)
class _Strip:
    """The first samples of cells that differ only in their number of steps."""

    words: str
    rows: list[tuple[_Row, str]]
    is_open: bool


def _strips(study: Study, rows: list[_Row], pictures: list[bytes | None]) -> list[_Strip]:
    """Return a strip for each way to sample that has sample grids for several step counts.

    The strip of the recommended cell is open.
    """
    recommendation = study.recommendation()
    ways: dict[tuple[str, ...], list[tuple[_Row, bytes]]] = {}
    for row, picture in zip(rows, pictures, strict=True):
        if picture is not None:
            ways.setdefault(way_of(row.result.cell), []).append((row, picture))
    strips = {}
    for way, members in ways.items():
        members.sort(key=lambda member: member[0].result.cell.num_inference_steps)
        if len({row.result.cell.num_inference_steps for row, _ in members}) > 1:
            strips[way] = [(row, _first_row(picture, row.result.count)) for row, picture in members]
    opened = None if recommendation is None else way_of(recommendation.chosen.cell)
    if opened not in strips:
        opened = next(iter(strips), None)
    ordered = sorted(strips, key=lambda way: way != opened)
    return [_Strip(", ".join(way), strips[way], way == opened) for way in ordered]


def _first_row(png: bytes, count: int) -> str:
    """Return the first row of a cell's sample grid as a data URI.

    The height divided by the number of rows, rounded up, contains the whole first row.
    """
    rows = math.ceil(min(count, PICTURES) / _IN_A_ROW)
    image = Image.open(io.BytesIO(png))
    file = io.BytesIO()
    image.crop((0, 0, image.width, math.ceil(image.height / rows))).save(file, "PNG")
    return _data_uri(file.getvalue())
