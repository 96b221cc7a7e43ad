"""``verify``: the checks, one after the other, on a subject."""

from __future__ import annotations

import copy
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..plans.coefficients import ETA_SCALES
from .checks import CHECKS, Check, CheckFailedError, CheckSkippedError, Context, SubjectRaisedError
from .reports.report import CheckResult, Outcome, Report
from .subjects.adapters import subject_of
from .subjects.subject import ARITHMETIC, Subject

REQUIRED = ("observed-update",)
"""What must have run, unless told otherwise: it applies to steps and to whole samplers."""


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
    on_result: Callable[[CheckResult], None] | None = None,
) -> Report:
    """Hold a sampler against the DDIM paper.

    Args:
        subject: a backend's name, ``"module:attribute"``, a ``Subject``, a scheduler, a step or a sampler: see ``adapters.ADAPTERS``.
        checks: names of checks, in any order; all if none.
        full: thorough, in minutes; otherwise quick.
        seed: of all that is random in the checks. Another seed asks other questions; right subjects pass with any.
        device: where the tensors are.
        required: checks that must have run for the report to pass; ``REQUIRED`` if none, or all of ``checks``.
        eta_scales, arithmetic: what the subject is held to, keys of ``update.ETA_SCALES`` and ``subject.ARITHMETIC``; its own if none.
        on_result: called with each result as it comes.

    Raises:
        ValueError, TypeError: an argument breaks a rule, or the subject has no form that is known. What a subject raises is in the report.
    """
    chosen = choose_checks(checks, full)
    required = tuple(checks or REQUIRED) if required is None else tuple(required)
    choose_checks(required or None, full=True)
    subject = prepared_subject(subject, device, eta_scales, arithmetic)
    results = []
    for one in chosen:
        results.append(run_check(one, subject, full, seed, torch.device(device)))
        if on_result is not None:
            on_result(results[-1])
    return report_of(subject, results, full=full, seed=seed, device=str(device), required=required)


def choose_checks(names: Iterable[str] | None, full: bool) -> list[Check]:
    """The checks of these names, in the order in which they run; all of the set if none.

    Raises:
        ValueError: a name is unknown.
    """
    if names is None:
        return [one for one in CHECKS.values() if full or not one.full_only]
    names = list(names)
    if unknown := [name for name in names if name not in CHECKS]:
        raise ValueError(f"checks are {', '.join(CHECKS)}, got {unknown[0]!r}")
    return [one for one in CHECKS.values() if one.name in names]


def prepared_subject(
    value: Any, device: torch.device | str = "cpu", eta_scales: str | None = None, arithmetic: str | None = None
) -> Subject:
    """The subject that a value is, held to these conventions; to its own where none is given.

    Raises:
        ValueError, TypeError: a convention is unknown, or see ``subject_of``.
    """
    for name, given, known in (("eta_scales", eta_scales, ETA_SCALES), ("arithmetic", arithmetic, ARITHMETIC)):
        if given is not None and given not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")
    subject = subject_of(value, device)
    if eta_scales is not None or arithmetic is not None:
        subject = copy.copy(subject)
        subject.eta_scales = eta_scales or subject.eta_scales
        subject.arithmetic = arithmetic or subject.arithmetic
    return subject


def report_of(subject: Subject, results: Sequence[CheckResult], **more: Any) -> Report:
    conventions = {"eta scales": subject.eta_scales, "arithmetic": subject.arithmetic}
    if not subject.ends_clean:
        conventions["last step"] = "to alpha_bar_0, not to clean data"
    return Report(subject.name, tuple(results), tuple(sorted(subject.features)), conventions, **more)


def run_check(one: Check, subject: Subject, full: bool, seed: int, device: torch.device) -> CheckResult:
    """One check on one subject. Whatever is raised becomes a result."""
    if lacking := sorted(one.needs - subject.features):
        return result_of(one, Outcome.NOT_APPLICABLE, f"the subject does not offer {', '.join(lacking)}")
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
    except CheckSkippedError as error:
        outcome, message = Outcome.SKIPPED, str(error)
    except Exception:
        outcome, message = Outcome.ERROR, f"the check itself went wrong:\n{traceback.format_exc()}"
    if outcome is Outcome.PASSED and context.cases == 0:
        outcome, message = Outcome.ERROR, "the check looked at nothing: it must count its cases"
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
    """A check's result, with what is written about the check."""
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
    """Python that repeats a check which has no smaller case."""
    name = getattr(subject, "backend", subject.name)
    held = [f"{c}={getattr(subject, c)!r}" for c in ("eta_scales", "arithmetic") if c in vars(subject)]
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
    """What a check draws from torch's and NumPy's global generators leaves no trace."""
    numpy_state = np.random.get_state()  # noqa: NPY002 (that of others, kept)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002 (put back)
