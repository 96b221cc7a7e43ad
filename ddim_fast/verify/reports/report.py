"""What a verification found: data, and its JSON."""

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
"""Of the JSON's form."""


class Outcome(str, Enum):
    """What became of a check."""

    PASSED = "passed"
    FAILED = "failed"  # the subject is wrong
    NOT_APPLICABLE = "not applicable"  # the subject does not offer what is checked
    SKIPPED = "skipped"  # this machine lacks something
    ERROR = "error"  # the check could not end: a crash, a timeout, an error of its own


@dataclass(frozen=True)
class CheckResult:
    """One check's outcome.

    Args:
        name, proves, source, tolerance: of the check, see ``checks.Check``.
        message: why it did not pass; empty where it did.
        cases: how many were looked at.
        worst: the largest error found, as a share of what is allowed; NaN where nothing is measured so.
        code: the smallest failing case that was found, as Python that fails.
        details: numbers of this check's own.
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
    """All results, and what they were found with.

    Args:
        required: names of checks that must have run.
        complete: False where the run was ended before its last check.
        ended_by: what ended it.
        made_at: when, UTC, as ISO 8601 has it.
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
        return [result for result in self.results if result.outcome is outcome]

    @property
    def missing(self) -> list[str]:
        """Required checks that did not run."""
        ran = {r.name for r in self.results if r.outcome not in (Outcome.NOT_APPLICABLE, Outcome.SKIPPED)}
        return [name for name in self.required if name not in ran]

    @property
    def exit_code(self) -> int:
        """0: right. 1: wrong. 2: it could not run to its end. 3: something that was required was skipped."""
        if not self.complete or not self.results:
            return 2
        if self.of(Outcome.FAILED):
            return 1
        if self.of(Outcome.ERROR):
            return 2
        return 3 if self.missing else 0

    @property
    def seconds(self) -> float:
        """That all checks took."""
        return sum(result.seconds for result in self.results)

    @property
    def passed(self) -> bool:
        return self.exit_code == 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: no NaN, no infinity."""
        data = {"report_version": REPORT_VERSION, "exit_code": self.exit_code, "missing": self.missing} | asdict(self)
        return _plain(data)


def versions() -> dict[str, str]:
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
