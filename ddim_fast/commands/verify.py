"""``ddim-fast verify``."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import textwrap
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..utils.atomic_files import check_writable
from ..utils.extras import missing
from .choices import BACKENDS, OF_EQUATION_16
from .interruption import NOTHING, interruption, name_of

NEEDED = ("scipy", "rich", "jinja2")
_REPORT = click.Path(path_type=Path)


class _CouldNotRunError(click.ClickException):
    """The subject could not be verified: exit code 2."""

    exit_code = 2


@dataclass
class _Request:
    """The options of the command."""

    subject: str | None
    against: str | None
    device: str
    full: bool
    check: tuple[str, ...]
    require: tuple[str, ...]
    seed: int
    timeout: float | None
    eta_scales: str | None
    arithmetic: str | None
    schedule: str | None
    prediction_type: str | None
    junit: Path | None
    json: Path | None
    html: Path | None
    list_: bool
    golden: bool
    quiet: bool
    left: str = NOTHING
    """What there is on disk, in words."""


@click.command()
@click.argument("subject", required=False)
@click.option("--against", metavar="SUBJECT", help="Also run the checks on a second subject, shown beside the first.")
@click.option(
    "--device", default="cpu", show_default=True, metavar="DEVICE", help="Device of the tensors: cpu, cuda or cuda:1."
)
@click.option(
    "--quick/--full",
    "quick",
    default=True,
    show_default=True,
    help="Run the quick set (seconds) or the full set (minutes).",
)
@click.option("--check", multiple=True, metavar="NAME", help="Run only this check; may be repeated.")
@click.option(
    "--require",
    multiple=True,
    metavar="NAME",
    help="Exit with 3 unless this check ran; may be repeated.  [default: observed-update, or the checks of --check]",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Seed of all random numbers in the checks. A correct sampler passes with any.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="Time limit per check.  [default: 300, with --full 1800]",
)
@click.option(
    "--eta-scales",
    type=click.Choice(OF_EQUATION_16),
    help="What the subject's eta multiplies; the paper's is std_dev.  [default: what the subject states]",
)
@click.option(
    "--arithmetic",
    type=click.Choice(("exact", "float32")),
    help="Required precision of coefficients: exact (float64) or float32.  [default: what the subject states]",
)
@click.option(
    "--schedule",
    metavar="NAME",
    help='Noise path of a step or a sampler: "flow?shift=3", "edm", "ve", "vp", ...  [default: what the subject states]',
)
@click.option("--prediction-type", metavar="TYPE", help="What models predict there.  [default: the path's own]")
@click.option("--junit", type=_REPORT, metavar="FILE.xml", help="Write JUnit XML, which CI systems display.")
@click.option("--json", type=_REPORT, metavar="FILE.json", help="Write the complete report as JSON.")
@click.option("--html", type=_REPORT, metavar="FILE.html", help="Write the report as one HTML file.")
@click.option("--list", "list_", is_flag=True, help="List the checks: what each proves, its source, its tolerance.")
@click.option("--golden", is_flag=True, help="Run only the comparison with the recorded runs.")
@click.option("--quiet", is_flag=True, help="Print failures only.")
@click.pass_context
def verify(context: click.Context, quick: bool, **options: Any) -> None:
    """Verify any DDIM sampler, or one of flow matching or EDM, against the paper.

    \b
    SUBJECT is one of
      cpu, triton, reference  a backend of this package; by default the one that
                              runs here. triton needs no GPU: its machine code
                              is executed on the CPU.
      MODULE:ATTRIBUTE        imported from this folder or an installed package:
        a scheduler             a class or object with set_timesteps and step;
                                a class may have options: Class?name=value&...
        a step                  step(x_t, model_output, alpha_bar_t,
                                     alpha_bar_prev, ...)
                                or with t, t_prev or sigma_t, sigma_prev
        a sampler               sample(model, x_T, ...)
        a Subject               of ddim_fast.verify: a custom adapter

    The subject runs in a separate process: a crash or a hang costs only the
    check that caused it.

    \b
    Examples:
      ddim-fast verify                                  this package
      ddim-fast verify diffusers:DDIMScheduler --full   diffusers, the full set
      ddim-fast verify diffusers:FlowMatchEulerDiscreteScheduler
      ddim-fast verify mine:loop --schedule flow        on flow matching's path
      ddim-fast verify mine:step --check update         one check, of mine.py
      ddim-fast verify mine:step --against cpu          next to a correct one
      ddim-fast verify mine:step --junit report.xml     in a CI job
      ddim-fast verify --list                           list the checks

    \b
    Exit codes:
      0  it is right
      1  it is wrong: each failure is shown with Python code that reproduces it
      2  it was not fully verified: no such subject, a crash, a timeout
      3  a required check was skipped, or does not apply
      130  Ctrl-C or SIGTERM: the reports have what was found until then
    """
    request = _Request(full=not quick, **options)
    with interruption(lambda: f"{request.left}; the same command again begins anew"):
        code = _code(request)
    context.exit(code)


def _code(request: _Request) -> int:
    try:
        return _verify(request)
    except click.ClickException:
        raise
    except BrokenPipeError:  # the reader of the output has closed it
        return 2
    except Exception:  # 1 would mean that the subject is wrong
        click.echo(f"ddim-fast verify itself raised an error:\n{traceback.format_exc()}", err=True)
        return 2


def _verify(request: _Request) -> int:
    """Validate all options, run the checks, and return the exit code."""
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise _CouldNotRunError(missing("verify", lacking, "verify"))
    if request.list_:
        _list_checks()
        return 0
    from ..utils.checks import usable_device
    from ..verify.isolate import SubjectRefusedError

    try:
        checks, required = _chosen_checks(request)
        usable_device(request.device)
        _check_outputs(request)
    except ValueError as error:
        raise _CouldNotRunError(str(error)) from error
    names = [request.subject or _backend_here(request.device)]
    names += [request.against] if request.against is not None else []
    try:
        code, interrupted = _run(request, names, checks, required)
    except SubjectRefusedError as error:
        _write(request, names, [_refused(request, names[0], required, str(error))])
        raise _CouldNotRunError(str(error)) from error
    except KeyboardInterrupt as ended:  # while the subject was imported
        _write(request, names, [_refused(request, names[0], required, name_of(ended))])
        raise
    if interrupted is not None:
        raise interrupted
    return code


def _run(
    request: _Request, names: list[str], checks: Sequence[Any], required: tuple[str, ...]
) -> tuple[int, KeyboardInterrupt | None]:
    """Run the checks, and write and show the reports; return the exit code, and what interrupted it."""
    from ..verify.isolate import IsolatedSubject
    from ..verify.reports.show import display_for

    count = "1 check" if len(checks) == 1 else f"{len(checks)} checks"
    heading = f"{count}, {'full' if request.full else 'quick'}, seed {request.seed}, on {request.device}"
    display = display_for(names, checks, heading, request.quiet)
    results: list[list[Any]] = [[] for _ in names]
    interrupted: KeyboardInterrupt | None = None
    with contextlib.ExitStack() as stack:
        # Import all subjects first, so that one that cannot be imported is reported at once.
        subjects = [stack.enter_context(_isolated(IsolatedSubject, request, name)) for name in names]
        try:
            with display:
                for number, subject in enumerate(subjects):
                    for one in checks:
                        display.started(number, one)
                        results[number].append(subject.run(one))
                        display.finished(number, results[number][-1])
        except KeyboardInterrupt as ended:
            interrupted = ended
    ended_by = "" if interrupted is None else name_of(interrupted)
    reports = [
        subject.report(found, required=required, complete=len(found) == len(checks), ended_by=ended_by)
        for subject, found in zip(subjects, results, strict=True)
    ]
    written = _write(request, names, reports)
    display.ended(reports, names, written)
    return reports[0].exit_code, interrupted


def _isolated(isolated: Any, request: _Request, name: str) -> Any:
    return isolated(
        name,
        full=request.full,
        seed=request.seed,
        device=request.device,
        eta_scales=request.eta_scales,
        arithmetic=request.arithmetic,
        schedule=request.schedule,
        prediction_type=request.prediction_type,
        timeout=request.timeout,
    )


# --- Options ----------------------------------------------------------------------------------------------------------


def _chosen_checks(request: _Request) -> tuple[list[Any], tuple[str, ...]]:
    """Return the checks to run, and the names of the required ones."""
    from ..verify.run import REQUIRED, choose_checks

    if request.golden and request.check:
        raise ValueError("--golden and --check must not be combined, got both: leave out one")
    named = ("golden",) if request.golden else request.check
    checks = choose_checks(named or None, request.full)
    required = request.require or named or REQUIRED
    choose_checks(required, full=True)
    if left_out := [name for name in required if name not in [one.name for one in checks]]:
        raise ValueError(f"{left_out[0]} is required but would not run: add it with --check, or use --full")
    return checks, tuple(dict.fromkeys(required))


def _check_outputs(request: _Request) -> None:
    paths = [path for path in (request.junit, request.json, request.html) if path is not None]
    for path in paths:
        check_writable("a report", path)
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("each report needs its own file, got one name twice: rename one")


def _backend_here(device: str) -> str:
    """Return the name of the backend that runs steps on this device."""
    from ..verify.subjects.backends import reasons_against

    return next(name for name in BACKENDS if not reasons_against(name, device))


def _list_checks() -> None:
    from ..verify.checks import CHECKS

    paragraph = textwrap.TextWrapper(
        min(shutil.get_terminal_size().columns, 110),
        initial_indent="  ",
        subsequent_indent="    ",
        break_on_hyphens=False,
        break_long_words=False,
    )
    for one in CHECKS.values():
        only = " (only with --full)" if one.full_only else ""
        click.echo(click.style(one.name, bold=True) + only)
        lines = {"": one.proves, "tolerance": one.tolerance, "source": one.source}
        lines["applies to"] = f"subjects that offer {', '.join(sorted(one.needs))}" if one.needs else "every subject"
        if one.false_alarm_rate:
            lines["false alarms"] = f"{one.false_alarm_rate:g} of correct subjects"
        for title, text in lines.items():
            click.echo(paragraph.fill(f"{title}: {text}" if title else text))
        click.echo()


# --- Reports ----------------------------------------------------------------------------------------------------------


def _refused(request: _Request, name: str, required: tuple[str, ...], why: str) -> Any:
    """Return an empty report, so that an earlier one is not mistaken for this run's."""
    from ..verify.reports.report import Report

    return Report(
        name,
        (),
        full=request.full,
        seed=request.seed,
        device=request.device,
        required=required,
        complete=False,
        ended_by=why,
    )


def _write(request: _Request, names: list[str], reports: list[Any]) -> list[str]:
    """Write the requested reports, and return their paths."""
    from ..verify.reports.write import json_text, junit_text, write_text
    from ..verify.reports.write_html import html_text

    against = reports[1] if len(reports) > 1 else None
    texts = {
        request.junit: lambda: junit_text(reports[0]),
        request.json: lambda: json_text(reports[0], against),
        request.html: lambda: html_text(reports[0], against, names[0]),
    }
    wanted = {path: text for path, text in texts.items() if path is not None}
    try:
        for path, text in wanted.items():
            write_text(path, text())
    except OSError as error:
        raise _CouldNotRunError(f"a report could not be written: {error}") from error
    written = [str(path) for path in wanted]
    if written:
        request.left = f"what was found so far is in {' and '.join(written)}"
    return written
