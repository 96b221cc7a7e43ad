"""The display of a running verification: in a terminal a growing table, elsewhere (CI logs, files)
a line for each check."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.spinner import Spinner
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from ...utils.html import plain_text
from ..checks import Check
from .report import CheckResult, Outcome, Report
from .write import again, counts, remedy, seconds_text, share_text, verdict

_STYLES = {
    Outcome.PASSED: "green",
    Outcome.FAILED: "bold red",
    Outcome.NOT_APPLICABLE: "dim",
    Outcome.SKIPPED: "yellow",
    Outcome.ERROR: "bold yellow",
}
_OF_EXIT = {0: "bold green", 1: "bold red", 2: "bold yellow", 3: "bold yellow"}
_LINES_KEPT_FREE = 9  # of the terminal's height, besides the rows of a growing table


class Display(Protocol):
    """The calls that a display gets, in this order."""

    def __enter__(self) -> Display: ...

    def __exit__(self, *exception: Any) -> None: ...

    def started(self, subject: int, one: Check) -> None:
        """Show that a check of subject 0, or of the second subject, runs now."""

    def finished(self, subject: int, result: CheckResult) -> None: ...

    def ended(self, reports: Sequence[Report], names: Sequence[str], written: Sequence[str]) -> None:
        """Show the result, after the display was left."""


def display_for(names: Sequence[str], checks: Sequence[Check], heading: str, quiet: bool) -> Display:
    """Return the display for standard output.

    Args:
        names: of the subjects.
        heading: what runs, in a few words.
        quiet: show failures only.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # for encodings that lack a character
    console = Console(highlight=False)
    if console.is_terminal:
        return Terminal(console, names, checks, heading, quiet)
    return Lines(names, checks, heading, quiet)


# --- Lines ------------------------------------------------------------------------------------------------------------


class Lines:
    """Plain text: a line for each check when it ends."""

    def __init__(self, names: Sequence[str], checks: Sequence[Check], heading: str, quiet: bool):
        self.names, self.checks, self.heading, self.quiet = names, checks, heading, quiet
        self._width = max([len(one.name) for one in checks] + [5])

    def __enter__(self) -> Lines:
        self._say(f"ddim-fast verify {' against '.join(self.names)}: {self.heading}")
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    def started(self, subject: int, one: Check) -> None:
        if subject and one is self.checks[0]:
            self._say(f"{self.names[subject]}:")

    def finished(self, subject: int, result: CheckResult) -> None:
        if result.cases:
            worst = share_text(result.worst)
            cases = "1 case" if result.cases == 1 else f"{result.cases} cases"
            said = f"{cases}, {f'worst {worst} of what is allowed, ' if worst else ''}{seconds_text(result.seconds)}"
        elif result.outcome in (Outcome.NOT_APPLICABLE, Outcome.SKIPPED):
            said = result.message
        else:
            said = seconds_text(result.seconds)
        self._say(f"  {result.outcome.value:<14}  {result.name:<{self._width}}  {said}")

    def ended(self, reports: Sequence[Report], names: Sequence[str], written: Sequence[str]) -> None:
        for title, result in _to_explain(reports):
            print(f"\n{result.outcome.value}: {title}\n")
            print(_indented(result.message))
            if result.code:
                print(f"\nPython that fails:\n\n{_indented(result.code)}")
        if self.quiet and reports[0].passed:
            return
        print()
        for report in reports:
            print(f"{verdict(report)} ({counts(report) or 'no check ran'}, {seconds_text(report.seconds)}).")
        if todo := remedy(reports[0]):
            print(todo)
        if command := again(reports[0], names[0]):
            print(f"  {command}")
        if written:
            print(f"Written: {', '.join(written)}")

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(plain_text(text), flush=True)


# --- A terminal -------------------------------------------------------------------------------------------------------


class Terminal:
    """Colours, and during the run a growing table with the running check below it."""

    def __init__(self, console: Console, names: Sequence[str], checks: Sequence[Check], heading: str, quiet: bool):
        self.console, self.names, self.checks, self.heading, self.quiet = console, names, checks, heading, quiet
        self._results: list[dict[str, CheckResult]] = [{} for _ in names]
        self._running: tuple[int, str, float] | None = None
        self._began = time.monotonic()
        self._spinner = Spinner("dots", style="cyan")
        # Where colours are forced without a terminal, nothing is animated.
        animated = console.file.isatty() and not console.is_dumb_terminal and not quiet
        self._live = (
            Live(console=console, get_renderable=self._now, refresh_per_second=8, transient=True) if animated else None
        )

    def __enter__(self) -> Terminal:
        if not self.quiet:
            self.console.print(Text(f"ddim-fast verify {' against '.join(self.names)}", "bold"), soft_wrap=True)
            self.console.print(Text(f"{self.heading}\n", "dim"))
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*exception)

    def started(self, subject: int, one: Check) -> None:
        self._running = subject, one.name, time.monotonic()

    def finished(self, subject: int, result: CheckResult) -> None:
        self._running = None
        self._results[subject][result.name] = result

    def ended(self, reports: Sequence[Report], names: Sequence[str], written: Sequence[str]) -> None:
        out, first = self.console, reports[0]
        if not self.quiet:
            out.print(self.table([one.name for one in self.checks if one.name in self._results[0]]))
            self._why_not_run(reports)
        for title, result in _to_explain(reports):
            self._explain(title, result)
        if self.quiet and first.passed:
            return
        out.print()
        for report in reports:
            mark = "✓" if report.passed else "✗"
            out.print(Text(f"{mark} {verdict(report)}", _OF_EXIT[report.exit_code]))
            out.print(Text(f"  {counts(report) or 'no check ran'}, {seconds_text(report.seconds)}", "dim"))
        if todo := remedy(first):
            out.print(Text(f"\n{todo}"))
        if command := again(first, names[0]):
            out.print(Text(f"  {command}", "bold"), soft_wrap=True)
        if written:
            out.print(Text(f"Written: {', '.join(written)}", "dim"))

    def table(self, names: Sequence[str]) -> Table:
        """Return the table of these checks."""
        table = Table(box=None, pad_edge=False, expand=False, header_style="dim", padding=(0, 2, 0, 0))
        table.add_column("check", no_wrap=True)
        if len(self.names) == 1:
            table.add_column("outcome", no_wrap=True)
            table.add_column("cases", justify="right", no_wrap=True)
            table.add_column("worst / allowed", justify="right", no_wrap=True)
            table.add_column("time", justify="right", no_wrap=True)
        else:
            for name in self.names:
                table.add_column(Text(plain_text(name)), overflow="fold", max_width=20)
                table.add_column("worst", justify="right", no_wrap=True)
                table.add_column("time", justify="right", no_wrap=True)
        for name in names:
            table.add_row(Text(name), *self._cells(name))
        return table

    def _cells(self, name: str) -> list[Text]:
        cells = []
        for results in self._results:
            result = results.get(name)
            if result is None:
                cells += [Text("")] * 3
                continue
            style = _STYLES[result.outcome]
            numbers = [share_text(result.worst), seconds_text(result.seconds)]
            if len(self.names) == 1:
                numbers.insert(0, str(result.cases))
            shown = numbers if result.cases or result.seconds else [""] * len(numbers)
            short = len(self.names) > 1 and result.outcome is Outcome.NOT_APPLICABLE
            cells.append(Text("n/a" if short else result.outcome.value, style))
            cells += [
                Text(number, "red" if i == len(shown) - 2 and result.worst > 1 else "")
                for i, number in enumerate(shown)
            ]
        return cells

    def _now(self) -> RenderableType:
        """Return what is shown during the run: the last rows that fit, a progress bar, the running
        check."""
        done = sum(len(results) for results in self._results)
        total = len(self.checks) * len(self.names)
        bar = Table.grid(padding=(0, 1))
        self._spinner.update(text=Text(self._running_text()))
        bar.add_row(
            ProgressBar(total=total, completed=done, width=24), f"{done}/{total}", _elapsed(self._began), self._spinner
        )
        rows = [one.name for one in self.checks if any(one.name in results for results in self._results)]
        return Group(self.table(rows[-max(self.console.height - _LINES_KEPT_FREE, 3) :]), Text(""), bar)

    def _running_text(self) -> str:
        if self._running is None:
            return "starting" if not self._results[0] else ""
        subject, name, began = self._running
        of = f" on {plain_text(self.names[subject])[:20]}" if len(self.names) > 1 else ""
        return f"{name}{of} {_elapsed(began)}"

    def _why_not_run(self, reports: Sequence[Report]) -> None:
        """Show each reason for not running once, with the checks that it concerns."""
        for report in reports:
            reasons: dict[str, list[str]] = {}
            for result in (*report.of(Outcome.NOT_APPLICABLE), *report.of(Outcome.SKIPPED)):
                reasons.setdefault(result.message, []).append(result.name)
            for reason, checks in reasons.items():
                of = f"{report.subject}: " if len(reports) > 1 else ""
                self.console.print(Padding(Text(plain_text(f"{of}{reason}: {', '.join(checks)}"), "dim"), (0, 0, 0, 2)))

    def _explain(self, title: str, result: CheckResult) -> None:
        out, style = self.console, _STYLES[result.outcome]
        out.print()
        out.print(Rule(Text(plain_text(f"{result.outcome.value}: {title}"), style), style=style, align="left"))
        out.print(Text(plain_text(result.message.strip())), soft_wrap=False)
        if result.code:
            out.print(Text("\nPython that fails:\n", "dim"))
            # Without line breaks, so that it can be copied.
            code = Syntax("", "python", theme="ansi_dark", background_color="default").highlight(
                plain_text(result.code)
            )
            out.print(code, soft_wrap=True, end="")


def _to_explain(reports: Sequence[Report]) -> list[tuple[str, CheckResult]]:
    """Return the results that need an explanation, each with a title, of the first subject and then
    of the second."""
    found = []
    for report in reports:
        for result in report.results:
            missing = result.name in report.missing
            if result.outcome in (Outcome.FAILED, Outcome.ERROR) or missing:
                title = f"{result.name}, which is required" if missing else result.name
                found.append((title if len(reports) == 1 else f"{title}, {report.subject}", result))
    return found


def _elapsed(began: float) -> str:
    return seconds_text(time.monotonic() - began)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in plain_text(text.strip()).splitlines())
