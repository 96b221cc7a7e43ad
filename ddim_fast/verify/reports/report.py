"""The data of a report, and its form as JSON."""

from __future__ import annotations

import math
import platform
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from enum import Enum
from typing import Any

import numpy as np
import torch

from ..._version import __version__

REPORT_VERSION = 1
"""The version of the JSON's form."""


class Outcome(str, Enum):
    """The outcome of a check."""

    PASSED = "passed"
    FAILED = "failed"  # the subject is wrong
    NOT_APPLICABLE = "not applicable"  # the subject does not offer what is checked
    SKIPPED = "skipped"  # this machine lacks something that the check needs
    ERROR = "error"  # the check did not finish: a crash, a timeout, an error of its own


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Args:
        name, proves, source, tolerance, false_alarm_rate: of the check, see ``checks.Check``.
        message: why it did not pass; empty where it did.
        cases: how many cases were made.
        worst: the largest error, as a share of what is allowed; NaN where none was measured.
        code: the smallest failing case, as Python that fails.
        details: further numbers of this check.
    """

    name: str
    outcome: Outcome
    message: str = ""
    cases: int = 0
    worst: float = math.nan
    seconds: float = 0.0
    code: str = ""
    proves: str = ""
    source: str = ""
    tolerance: str = ""
    false_alarm_rate: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All results on a subject, and how they were obtained.

    Args:
        required: names of checks that must have run.
        complete: whether the last check was reached.
        ended_by: what ended the run before that.
        made_at: UTC, in ISO 8601.
    """

    subject: str
    results: tuple[CheckResult, ...]
    features: tuple[str, ...] = ()
    conventions: dict[str, str] = field(default_factory=dict)
    full: bool = False
    seed: int = 0
    device: str = "cpu"
    required: tuple[str, ...] = ()
    complete: bool = True
    ended_by: str = ""
    versions: dict[str, str] = field(default_factory=lambda: versions())
    made_at: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"))

    def of(self, outcome: Outcome) -> list[CheckResult]:
        """Return the results with this outcome."""
        return [result for result in self.results if result.outcome is outcome]

    @property
    def missing(self) -> list[str]:
        """The required checks that did not run."""
        ran = {r.name for r in self.results if r.outcome not in (Outcome.NOT_APPLICABLE, Outcome.SKIPPED)}
        return [name for name in self.required if name not in ran]

    @property
    def exit_code(self) -> int:
        """0: right. 1: wrong. 2: not verified to the end. 3: a required check did not run."""
        if not self.complete or not self.results:
            return 2
        if self.of(Outcome.FAILED):
            return 1
        if self.of(Outcome.ERROR):
            return 2
        return 3 if self.missing else 0

    @property
    def seconds(self) -> float:
        """The time of all checks."""
        return sum(result.seconds for result in self.results)

    @property
    def passed(self) -> bool:
        """Whether the exit code is 0."""
        return self.exit_code == 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, None for NaN and infinity."""
        data = {"report_version": REPORT_VERSION, "exit_code": self.exit_code, "missing": self.missing} | asdict(self)
        return _plain(data)


def versions() -> dict[str, str]:
    """Return the versions of this package, its dependencies and the machine."""
    return {
        "ddim_fast": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Outcome):
        return value.value
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
