"""A report as one HTML file that needs no network and no other file; sortable, filterable, for
screens of any width."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup
from pygments import highlight  # type: ignore[import-untyped]  # pygments has no types
from pygments.formatters import HtmlFormatter  # type: ignore[import-untyped]  # pygments ships no types
from pygments.lexers import PythonLexer  # type: ignore[import-untyped]  # pygments ships no types

from ...utils.html import plain_text, render_page
from .report import CheckResult, Outcome, Report
from .write import again, counts, remedy, seconds_text, share_text, verdict

_GRAVEST_FIRST = (Outcome.FAILED, Outcome.ERROR, Outcome.SKIPPED, Outcome.NOT_APPLICABLE, Outcome.PASSED)
_VERDICTS = {0: "right", 1: "wrong", 2: "not verified", 3: "not shown"}


def html_text(report: Report, against: Report | None = None, name: str | None = None) -> str:
    """Return the page.

    Args:
        against: the report on a second subject, shown beside the first.
        name: of the subject, as given on the command line.
    """
    return render_page(
        __package__,
        "verify",
        {"share": share_text, "seconds": seconds_text, "python": _coloured},
        report=report,
        against=against,
        rows=[_row(report, result, against) for result in report.results],
        counts=counts,
        verdict=verdict(report),
        verdict_word=_VERDICTS[report.exit_code],
        remedy=remedy(report),
        again=again(report, name),
        against_verdict=verdict(against) if against else "",
        outcomes=[o for o in _GRAVEST_FIRST if report.of(o) or (against and against.of(o))],
    )


def _row(report: Report, result: CheckResult, against: Report | None) -> dict[str, Any]:
    other = next((r for r in against.results if r.name == result.name), None) if against else None
    return {
        "result": result,
        "other": other,
        "required": result.name in report.required,
        "missing": result.name in report.missing,
        "sort_outcome": _GRAVEST_FIRST.index(result.outcome),
        "sort_worst": -1.0 if math.isnan(result.worst) else min(result.worst, 1e300),
        "level": _tenths(result.worst),
        "shown": [r for r in (result, other) if r is not None],
    }


def _tenths(share: float) -> int:
    """Return the length of a bar, 0 to 10."""
    return 0 if math.isnan(share) else math.ceil(10 * min(share, 1.0))


def _coloured(code: str) -> Markup:
    """Return Python with syntax highlighting, escaped by pygments."""
    return Markup(highlight(plain_text(code), PythonLexer(), HtmlFormatter(nowrap=True)))
