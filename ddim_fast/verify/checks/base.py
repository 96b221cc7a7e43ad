"""A check, its registration, and the context that it works in."""

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
from ..truth.cases import PREDICTION_TYPES, Level, Model, Observed, Setting, StepCase, StepResult


class CheckFailedError(Exception):
    """The subject is wrong.

    Args:
        message: the rule, what was found, what is allowed.
        code: the smallest failing case, as Python that fails.
    """

    def __init__(self, message: str, code: str = ""):
        super().__init__(message)
        self.code = code


class CheckSkippedError(Exception):
    """This machine lacks something that the check needs; the message says what."""


class NotApplicableError(Exception):
    """The check does not apply to the subject; the message says why."""


class SubjectRaisedError(Exception):
    """The subject raised ``__cause__`` instead of returning a result."""


@dataclass(frozen=True)
class Check:
    """One verified property.

    Args:
        name: lower case, with hyphens.
        proves: one sentence.
        source: an equation of a paper, or a standard.
        tolerance: how far a result may be off, and why.
        run: see ``check``.
        needs: the features of a subject without which the check does not apply.
        any_order: whether it applies to solvers whose steps are not equation 12, too.
        full_only: whether the quick set leaves it out.
        false_alarm_rate: of statistical checks: the probability that a right subject fails.
    """

    name: str
    proves: str
    source: str
    tolerance: str
    run: Callable[[Context], None]
    needs: frozenset[str] = frozenset()
    any_order: bool = False
    full_only: bool = False
    false_alarm_rate: float = 0.0


_NEW = object()
"""Asks for a new source of noise. (None is a source, too: that of subjects which draw from torch's
global generator.)"""

CHECKS: dict[str, Check] = {}
"""Every check by its name, in the order in which they run. The modules of this package fill it."""


def check(
    name: str,
    *,
    proves: str,
    source: str,
    tolerance: str,
    needs: str = "",
    any_order: bool = False,
    full_only: bool = False,
    false_alarm_rate: float = 0.0,
) -> Callable[[Callable[[Context], None]], Callable[[Context], None]]:
    """Register a function of a ``Context`` as a check.

    The function returns if the subject is right, and raises ``CheckFailedError`` if not.

    Args:
        needs: features, separated by spaces.
    """

    def register(run: Callable[[Context], None]) -> Callable[[Context], None]:
        CHECKS[name] = Check(
            name, proves, source, tolerance, run, frozenset(needs.split()), any_order, full_only, false_alarm_rate
        )
        return run

    return register


@dataclass
class Context:
    """What a check works with: the subject, random numbers, and a record of what is measured.

    Attributes:
        rng: a generator for this check alone; the same for the same seed.
        full: whether the full set runs, rather than the quick one.
        device: of the tensors.
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
        """Return whether the subject has all of these features."""
        return set(features) <= self.subject.features

    @property
    def few(self) -> bool:
        """Whether to make few cases: in the quick set, where the subject is slow."""
        return self.subject.slow and not self.full

    def measured(self, share: float) -> None:
        """Count a case whose error was this share of what is allowed."""
        self.cases += 1
        self.worst = share if math.isnan(self.worst) else max(self.worst, share)

    def seed(self) -> int:
        """Draw a seed."""
        return int(self.rng.integers(2**62))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Draw normal numbers of standard deviation ``scale``."""
        return torch.from_numpy(scale * self.rng.standard_normal(shape)).to(dtype).to(self.device)

    @property
    def paths(self) -> tuple[Setting, ...]:
        """The settings that checks start from, one for each noise path: ``Subject.paths``, with a
        prediction type that the subject takes."""
        offered = [kind for kind in PREDICTION_TYPES if self.offers(kind)]
        return tuple(
            one if one.prediction_type in offered or not offered else one.but(prediction_type=offered[0])
            for one in self.subject.paths
        )

    def setting(self, **options: Any) -> Setting:
        """Return a setting on the first path."""
        return self.paths[0].but(**options)

    def settings(self, **options: Any) -> list[Setting]:
        """Return a setting on each path."""
        return [one.but(**options) for one in self.paths]

    def etas(self, *wanted: float) -> tuple[float, ...]:
        """Return those of these etas that the subject takes."""
        if not self.offers("eta"):
            return tuple(eta for eta in wanted if eta == 0)
        return tuple(eta for eta in wanted if not self.subject.etas or eta in self.subject.etas)

    def start(self, setting: Setting, *shape: int) -> Tensor:
        """Draw the x_T of a run."""
        if setting.starts_at_unit_scale:  # a sampler that chooses its own timesteps does not say them
            return self.normal(*shape)
        return self.normal(*shape, scale=setting.start_scale(self.levels(setting)[0].level_t))

    # The subject's methods. Its exceptions become SubjectRaisedError, so that they differ from
    # those of a check.

    def step(self, case: StepCase) -> StepResult:
        """Call ``Subject.step``."""
        with _as_subject_raised(f"step {case.index} of {case.setting}"):
            return self.subject.step(case)

    def step_with_log_prob(self, case: StepCase) -> tuple[Tensor, Tensor]:
        """Call ``Subject.step_with_log_prob``; return x_prev and its log-probability.

        Raises:
            SubjectRaisedError: the subject has returned None, too.
        """
        with _as_subject_raised(f"the log-probability of step {case.index} of {case.setting}"):
            x_prev, log_prob = self.subject.step_with_log_prob(case)
            if log_prob is None:
                raise ValueError("this step has no log-probability: it is None")
        return x_prev, log_prob

    def log_prob(self, case: StepCase, x_prev: Tensor) -> Tensor:
        """Call ``Subject.log_prob``."""
        with _as_subject_raised(f"the log-probability of a given x_prev under step {case.index} of {case.setting}"):
            return self.subject.log_prob(case, x_prev)

    def levels(self, setting: Setting) -> tuple[Level, ...]:
        """Call ``Subject.levels``."""
        with _as_subject_raised(f"the timesteps of {setting}"):
            return self.subject.levels(setting)

    def source(self, batch_size: int, seed: int | None = None) -> Any:
        """Call ``Subject.source`` with this seed, or with a new one."""
        return self.subject.source(self.seed() if seed is None else seed, batch_size)

    def sample(self, setting: Setting, model: Model, x_T: Tensor, source: Any = _NEW) -> Tensor:
        """Call ``Subject.sample`` with a model of (x_t, t), whatever the sampler tells it, and a new
        source of noise unless one is given."""
        with _as_subject_raised(f"a run of {setting}"):
            return self.subject.sample(
                setting, setting.as_called(model), x_T, self.source(len(x_T)) if source is _NEW else source
            )

    def sample_as_called(self, setting: Setting, model: Model, x_T: Tensor) -> Tensor:
        """Call ``Subject.sample`` with a model that gets what the sampler gives it."""
        with _as_subject_raised(f"a run of {setting}"):
            return self.subject.sample(setting, model, x_T, self.source(len(x_T)))

    def observe(self, setting: Setting, model: Model, x_T: Tensor, source: Any = _NEW) -> list[Observed]:
        """Call ``Subject.observe`` with a model of (x_t, t), with a new source of noise unless one is given."""
        with _as_subject_raised(f"a run of {setting}"):
            return self.subject.observe(
                setting, setting.as_called(model), x_T, self.source(len(x_T)) if source is _NEW else source
            )

    def invert(self, setting: Setting, model: Model, x0: Tensor) -> Tensor:
        """Call ``Subject.invert``."""
        with _as_subject_raised(f"the inversion of {setting}"):
            return self.subject.invert(setting, setting.as_called(model), x0)


@contextmanager
def _as_subject_raised(doing: str) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        raise SubjectRaisedError(f"{doing} raised {type(error).__name__}: {error}") from error
