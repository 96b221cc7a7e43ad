"""What a check is, and what it is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..subjects.subject import Subject
from ..truth.cases import Level, Model, Observed, Setting, StepCase, StepResult


class CheckFailedError(Exception):
    """The subject is wrong.

    Args:
        message: the rule, what was found, what is allowed.
        code: the smallest failing case that was found, as Python that fails.
    """

    def __init__(self, message: str, code: str = ""):
        super().__init__(message)
        self.code = code


class CheckSkippedError(Exception):
    """This machine lacks something that the check needs; the message says what."""


class SubjectRaisedError(Exception):
    """The subject raised ``__cause__`` where it should have given a result."""


@dataclass(frozen=True)
class Check:
    """One thing that is verified.

    Args:
        name: lower case, with hyphens.
        proves: one sentence.
        source: where it is written: an equation of a paper, a standard.
        tolerance: how far a result may be off, and where that comes from.
        needs: features of the subject, without which the check does not apply.
        full_only: left out of the quick set.
        false_alarm_rate: the probability that a right subject fails, for checks of chance.
    """

    name: str
    proves: str
    source: str
    tolerance: str
    run: Callable[[Context], None]
    needs: frozenset[str] = frozenset()
    full_only: bool = False
    false_alarm_rate: float = 0.0


_NEW = object()
"""Asks for a source of noise made for the call. (None is a source, too: that of subjects which draw from torch's own generator.)"""

CHECKS: dict[str, Check] = {}
"""Every check by its name, in the order in which they run. ``checks`` fills it."""


def check(
    name: str,
    *,
    proves: str,
    source: str,
    tolerance: str,
    needs: str = "",
    full_only: bool = False,
    false_alarm_rate: float = 0.0,
) -> Callable[[Callable[[Context], None]], Callable[[Context], None]]:
    """Decorator: a function of a ``Context`` is a check. It returns if the subject is right, and raises ``CheckFailedError`` if not.

    Args:
        needs: features, separated by spaces.
    """

    def register(run: Callable[[Context], None]) -> Callable[[Context], None]:
        CHECKS[name] = Check(
            name, proves, source, tolerance, run, frozenset(needs.split()), full_only, false_alarm_rate
        )
        return run

    return register


@dataclass
class Context:
    """What a check works with: the subject, chance, and a place for what it measures.

    Attributes:
        rng: of this check alone; the same for the same seed.
        full: thorough rather than quick.
        cases, worst, details: what is reported, see ``report.CheckResult``.
    """

    subject: Subject
    rng: np.random.Generator
    full: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cases: int = 0
    worst: float = math.nan
    details: dict[str, Any] = field(default_factory=dict)

    def offers(self, *features: str) -> bool:
        return set(features) <= self.subject.features

    @property
    def few(self) -> bool:
        """Whether to look at few cases: in the quick set, where the subject is slow."""
        return self.subject.slow and not self.full

    def measured(self, share: float) -> None:
        """Count a case whose error was this share of what is allowed."""
        self.cases += 1
        self.worst = share if math.isnan(self.worst) else max(self.worst, share)

    def seed(self) -> int:
        return int(self.rng.integers(2**62))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return torch.from_numpy(scale * self.rng.standard_normal(shape)).to(dtype).to(self.device)

    # What the subject does, with its own errors told apart from those of a check.

    def step(self, case: StepCase) -> StepResult:
        with _subject(f"step {case.index} of {case.setting}"):
            return self.subject.step(case)

    def levels(self, setting: Setting) -> tuple[Level, ...]:
        with _subject(f"the timesteps of {setting}"):
            return self.subject.levels(setting)

    def source(self, batch_size: int, seed: int | None = None) -> Any:
        return self.subject.source(self.seed() if seed is None else seed, batch_size)

    def sample(self, setting: Setting, model: Model, x_T: Tensor, source: Any = _NEW) -> Tensor:
        with _subject(f"a run of {setting}"):
            return self.subject.sample(setting, model, x_T, self.source(len(x_T)) if source is _NEW else source)

    def observe(self, setting: Setting, model: Model, x_T: Tensor, source: Any = _NEW) -> list[Observed]:
        with _subject(f"a run of {setting}"):
            return self.subject.observe(setting, model, x_T, self.source(len(x_T)) if source is _NEW else source)

    def invert(self, setting: Setting, model: Model, x0: Tensor) -> Tensor:
        with _subject(f"the inversion of {setting}"):
            return self.subject.invert(setting, model, x0)


@contextmanager
def _subject(doing: str) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        raise SubjectRaisedError(f"{doing} raised {type(error).__name__}: {error}") from error
