"""``verify``: run the checks on a subject, one after the other."""

from __future__ import annotations

import copy
import inspect
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..plans.eta import OF_EQUATION_16
from ..plans.named import schedule_from_text
from ..utils.checks import check_choice, check_integer, refuse
from .checks import (
    CHECKS,
    Check,
    CheckFailedError,
    CheckSkippedError,
    Context,
    NotApplicableError,
    SubjectRaisedError,
)
from .reports.report import CheckResult, Outcome, Report
from .subjects.adapters import subject_of
from .subjects.subject import ARITHMETIC, Subject
from .truth.cases import PREDICTION_TYPES, Setting
from .truth.paths import PATHS, path_of

_OF_THE_PAPER = "the checks hold a sampler against equation 16 of the DDIM paper"
REQUIRED = ("observed-update",)
"""The checks that must have run by default: they apply to steps and to whole samplers."""


def verify(
    subject: Any,
    *,
    checks: Sequence[str] | None = None,
    full: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
    required: Sequence[str] | None = None,
    eta_scales: str | None = None,
    arithmetic: str | None = None,
    schedule: str | None = None,
    prediction_type: str | None = None,
    on_result: Callable[[CheckResult], None] | None = None,
) -> Report:
    """Verify a sampler against the DDIM paper, and return the report.

    Args:
        subject: a backend's name, ``"module:attribute"``, a ``Subject``, a scheduler, a step or a
            sampler: see ``adapters.ADAPTERS``.
        checks: names of checks, in any order; all by default.
        full: whether to run the full set, in minutes, or the quick one.
        seed: of all random numbers in the checks, 0 or more. A right subject passes with any seed.
        device: of the tensors.
        required: checks that must have run for the report to pass; ``checks`` by default, or
            ``REQUIRED``.
        eta_scales: what the subject's eta multiplies, one of ``plans.eta.OF_EQUATION_16``; as the
            subject says by default.
        arithmetic: how exact the subject must be, a key of ``subject.ARITHMETIC``; as the subject
            says by default.
        schedule: the noise path that the subject is verified on, "flow?shift=3" or "edm" with its
            parameters; as the subject says by default.
        prediction_type: what its models predict; the path's own by default.
        on_result: called with each result.

    Raises:
        ValueError, TypeError: an argument breaks a rule, or the subject has no known form.
            Exceptions of the subject are reported, not raised.
    """
    seed = check_integer("seed", seed, at_least=0)
    chosen = choose_checks(checks, full)
    required = tuple(checks or REQUIRED) if required is None else tuple(required)
    choose_checks(required or None, full=True)
    subject = prepared_subject(subject, device, eta_scales, arithmetic, schedule, prediction_type)
    results = []
    for one in chosen:
        results.append(run_check(one, subject, full, seed, torch.device(device)))
        if on_result is not None:
            on_result(results[-1])
    return report_of(subject, results, full=full, seed=seed, device=str(device), required=required)


def choose_checks(names: Iterable[str] | None, full: bool) -> list[Check]:
    """Return the checks with these names, in the order in which they run; by default all of the
    set.

    Raises:
        ValueError: a name is unknown.
    """
    if names is None:
        return [one for one in CHECKS.values() if full or not one.full_only]
    names = list(names)
    for name in names:
        check_choice("a check", name, CHECKS)
    return [one for one in CHECKS.values() if one.name in names]


def prepared_subject(
    value: Any,
    device: torch.device | str = "cpu",
    eta_scales: str | None = None,
    arithmetic: str | None = None,
    schedule: str | None = None,
    prediction_type: str | None = None,
) -> Subject:
    """Return the subject for a value, with these conventions instead of its own where they are
    given.

    Raises:
        ValueError, TypeError: a convention is unknown, or as ``subject_of`` raises.
    """
    if eta_scales is not None:
        check_choice("eta_scales", eta_scales, OF_EQUATION_16, _OF_THE_PAPER)
    if arithmetic is not None:
        check_choice("arithmetic", arithmetic, ARITHMETIC)
    subject = subject_of(value, device)
    if schedule is not None or prediction_type is not None:
        subject = subject.on_path(_path(schedule or subject.paths[0].schedule, prediction_type))
    if eta_scales is not None or arithmetic is not None:
        subject = copy.copy(subject)
        subject.eta_scales = eta_scales or subject.eta_scales
        subject.arithmetic = arithmetic or subject.arithmetic
    if "eta" in subject.features:
        check_choice("eta_scales", subject.eta_scales, OF_EQUATION_16, _OF_THE_PAPER)
    return subject


def _path(schedule: str, prediction_type: str | None) -> Setting:
    """Return the setting of a path by its name.

    Raises:
        TypeError, ValueError: it is unknown, or the prediction type is.
    """
    schedule_from_text(schedule)  # refuses wrong names and values
    try:
        path = path_of(schedule)
    except TypeError:
        known = ", ".join(inspect.signature(PATHS[schedule.partition("?")[0]]).parameters)
        refuse(
            f"a schedule to verify on has the parameters {known}", schedule, "leave out those that only choose times"
        )
    own = "epsilon" if path is None else path.prediction_type
    if prediction_type is not None:
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    return Setting(schedule=schedule, prediction_type=prediction_type or own)


def report_of(subject: Subject, results: Sequence[CheckResult], **more: Any) -> Report:
    """Return these results as a report on the subject; ``more`` are further fields of the report."""
    conventions = {"eta scales": subject.eta_scales, "arithmetic": subject.arithmetic}
    if not subject.ends_clean:
        conventions["last step"] = "to alpha_bar_0, not to clean data"
    if "log_prob" in subject.features:
        least = f", with a standard deviation of at least {subject.min_std}" if subject.min_std else ""
        conventions["log-probability"] = f"{subject.log_prob_reduction} over the elements{least}"
    if subject.paths != (Setting(),):
        conventions["paths"] = ", ".join(path.name for path in subject.paths)
    return Report(subject.name, tuple(results), tuple(sorted(subject.features)), conventions, **more)


def run_check(one: Check, subject: Subject, full: bool, seed: int, device: torch.device) -> CheckResult:
    """Run one check on a subject. Every exception becomes a result."""
    if lacking := sorted(one.needs - subject.features):
        return result_of(one, Outcome.NOT_APPLICABLE, f"the subject does not offer {', '.join(lacking)}")
    if subject.order != 1 and not one.any_order:
        return result_of(one, Outcome.NOT_APPLICABLE, f"the subject is a solver of order {subject.order}, not DDIM")
    rng = np.random.default_rng([seed, zlib.crc32(one.name.encode())])
    context = Context(subject, rng, full, device)
    began = time.perf_counter()
    code = ""
    try:
        with _own_random_state():
            one.run(context)
        outcome, message = Outcome.PASSED, ""
    except CheckFailedError as error:
        outcome, message, code = Outcome.FAILED, str(error), error.code
    except SubjectRaisedError as error:
        outcome, message = Outcome.FAILED, str(error)
    except NotApplicableError as error:
        outcome, message = Outcome.NOT_APPLICABLE, str(error)
    except CheckSkippedError as error:
        outcome, message = Outcome.SKIPPED, str(error)
    except Exception:
        outcome, message = Outcome.ERROR, f"the check itself raised an error:\n{traceback.format_exc()}"
    if outcome is Outcome.PASSED and context.cases == 0:
        outcome, message = Outcome.ERROR, "the check made no case: it must count its cases"
    if outcome is Outcome.FAILED and not code:
        code = _again(one, subject, full, seed)
    return result_of(
        one,
        outcome,
        message,
        cases=context.cases,
        worst=context.worst,
        seconds=time.perf_counter() - began,
        code=code,
        details=context.details,
    )


def result_of(one: Check, outcome: Outcome, message: str, **more: Any) -> CheckResult:
    """Return a check's result, with the description of the check."""
    return CheckResult(
        one.name,
        outcome,
        message,
        proves=one.proves,
        source=one.source,
        tolerance=one.tolerance,
        false_alarm_rate=one.false_alarm_rate,
        **more,
    )


def _again(one: Check, subject: Subject, full: bool, seed: int) -> str:
    """Return Python that repeats a check that has no smaller case."""
    name = getattr(subject, "backend", subject.name)
    held = [f"{c}={getattr(subject, c)!r}" for c in ("eta_scales", "arithmetic") if c in vars(subject)]
    if subject.named_path is not None:
        held += [f"{c}={getattr(subject.named_path, c)!r}" for c in ("schedule", "prediction_type")]
    options = ", ".join([f"checks=[{one.name!r}]", f"full={full}", f"seed={seed}", *held])
    return "\n".join(
        [
            "from ddim_fast.verify import verify",
            "",
            f"report = verify({name!r}, {options})",
            "assert report.passed, report.results[0].message",
        ]
    )


@contextmanager
def _own_random_state():
    """Restore the state of torch's and NumPy's global generators after a check."""
    numpy_state = np.random.get_state()  # noqa: NPY002 (others use the global one)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002 (likewise)
