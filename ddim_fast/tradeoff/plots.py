"""Plots of a study as PNG files, drawn by matplotlib: quality against time and against calls."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..utils.extras import missing
from ..utils.html import capital, plain_text
from .marks import COLOURS, HORIZONTALS, SHAPES, Horizontal, Mark, Marks, Point, is_log, points
from .results import METRICS, CellResult, Study, way_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHAPES = dict(zip(SHAPES, "os^DvpP*", strict=True))
_INK, _QUIET, _LINE = "#1a2029", "#5c6675", "#e2e6ec"
_INCHES, _DPI = (8.0, 5.0), 160


def quality_against_time(study: Study, metric: str) -> bytes:
    """Return a PNG plot of a metric against the time per sample.

    It has error bars, and a line along the Pareto front.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the study has no such metric.
    """
    return _plot(study, metric, HORIZONTALS["time"], _front)


def quality_against_calls(study: Study, metric: str) -> bytes:
    """Return a PNG plot of a metric against the number of model calls.

    It has error bars, and a line for each way to sample.
    """
    return _plot(study, metric, HORIZONTALS["calls"], _ways)


def _plot(study: Study, metric: str, horizontal: Horizontal, draw_lines: Callable[..., None]) -> bytes:
    drawn, x = points(study, metric, horizontal), horizontal.of
    if not drawn:
        raise ValueError(f"metric must be one that the study has: {[m.name for m in study.metrics]}, got {metric!r}")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(missing("the plot of a study", ["matplotlib"], "tradeoff")) from error

    # Names may contain dollar signs and must not be parsed as formulas.
    with rc_context({"text.parse_math": False, "axes.edgecolor": _QUIET, "axes.labelcolor": _INK, "font.size": 10}):
        figure = Figure(_INCHES, layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        draw_lines(axes, study, metric, x)
        for point in drawn:
            _draw(axes, point)
        axes.set(
            xscale="log" if is_log([p.x for p in drawn]) else "linear",
            yscale="log" if is_log([p.measure.value for p in drawn]) else "linear",
            xlabel=horizontal.title,
            ylabel=f"{capital(METRICS[metric].title)} ({METRICS[metric].better} is better)",
        )
        _keep_values_in_sight(axes, [p.measure.value for p in drawn])
        for one in (axes.xaxis, axes.yaxis):
            _plain_numbers(one)
        axes.grid(color=_LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", colors=_QUIET)
        if draw_lines is _front:
            _label(axes, study, metric, x)
        axes.set_title(_short(study.model), loc="left", fontsize=11, color=_INK)
        _legend(axes, study)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    return file.getvalue()


def _draw(axes: Axes, point: Point) -> None:
    """Draw a point with its error bar."""
    style = _style(point.mark)
    axes.errorbar(
        point.x,
        point.measure.value,
        point.measure.error if math.isfinite(point.measure.error) else None,
        None if point.reach is None else [[max(0.0, point.x - point.reach[0])], [max(0.0, point.reach[1] - point.x)]],
        ecolor=style["color"],
        elinewidth=1,
        capsize=2.5,
        linestyle="",
        zorder=3,
        **style,
    )


def _style(mark: Mark) -> dict[str, Any]:
    colour = COLOURS[mark.colour]
    return dict(
        marker=_SHAPES[SHAPES[mark.shape]],
        color=colour,
        markerfacecolor=colour if mark.filled else "white",
        markeredgecolor=colour,
        markeredgewidth=1.6,
        markersize=7,
    )


def _front(axes: Axes, study: Study, metric: str, x: Callable[[CellResult], float]) -> None:
    front = study.pareto_front(metric)
    axes.plot([x(r) for r in front], [r.quality[metric].value for r in front], color=_QUIET, linewidth=1.2, zorder=1)


def _label(axes: Axes, study: Study, metric: str, x: Callable[[CellResult], float]) -> None:
    """Write the model calls beside the points of the front, where they overlap no other label."""
    placed: list[Any] = []
    for result in reversed(study.pareto_front(metric)):
        point = (x(result), result.quality[metric].value)
        at = axes.transData.transform(point)
        if all(abs(at[0] - other[0]) > 32 or abs(at[1] - other[1]) > 20 for other in placed):
            placed.append(at)
            axes.annotate(
                str(result.calls),
                point,
                xytext=(0, -15 if METRICS[metric].better == "lower" else 9),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=_QUIET,
            )


def _ways(axes: Axes, study: Study, metric: str, x: Callable[[CellResult], float]) -> None:
    marks = Marks(study)
    ways: dict[tuple[Any, ...], list[CellResult]] = {}
    for result in study.with_metric(metric):
        ways.setdefault(way_of(result.cell), []).append(result)
    for results in ways.values():
        results.sort(key=x)
        colour = COLOURS[marks.of(results[0].cell).colour]
        axes.plot(
            [x(r) for r in results],
            [r.quality[metric].value for r in results],
            color=colour,
            linewidth=1,
            alpha=0.6,
            zorder=1,
        )


def _keep_values_in_sight(axes: Axes, values: list[float]) -> None:
    """Limit a logarithmic axis to the values: error bars may reach far, or below 0."""
    if axes.get_yscale() == "log":
        room = (max(values) / min(values)) ** 0.1
        axes.set_ylim(min(values) / room, max(values) * room)


def _plain_numbers(one: Any) -> None:
    """Label an axis with plain numbers: 20, not 2 x 10^1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    if one.get_scale() == "log":
        one.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=10))
        one.set_minor_locator(NullLocator())


def _legend(axes: Axes, study: Study) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", label=_short(f"{name} {entry.value}", 30), **_style(entry.mark))
        for name, entries in Marks(study).legend().items()
        for entry in entries
    ]
    if handles:
        axes.figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)


def _short(text: str, most: int = 40) -> str:
    text = plain_text(text)
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
