"""Search for a whole solver, from the timesteps that a search has found: choose where to begin,
fit, and keep what an interrupted search needs to go on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..generation.settings import model_digest
from ..plans.plan import SamplingPlan
from ..utils.atomic_files import write_atomically
from ..utils.files import read_json
from .fit import Fit
from .refine import Candidate
from .request import Search
from .runs import Progress, Runs
from .solver import Plans, Solver

FITTED = "fitted coefficients"
"""The name of the fitted solver among the scores."""
NOT_NEARER = 0.99
"""A fitted solver is kept where its distance on the validation noise is at most this share of the
textbook's, so that noise of the search does not become a file of coefficients."""
_FORMAT = "ddim_fast search"
_SECONDS_BETWEEN_WRITES = 5.0


@dataclass(frozen=True)
class FittedSolver:
    """A fitted solver, and what is known of it.

    Attributes:
        began: where the fit began, in words.
        seen, validated: its distance to converged samples on the noise of the fit and of the
            validation.
        textbook: the distance of the start on the validation noise.
        rounding: the distance that rounding alone may leave.
    """

    solver: Solver
    plan: SamplingPlan
    began: str
    iterations: int
    seen: float
    validated: float
    textbook: float
    rounding: float

    @property
    def gained(self) -> bool:
        return self.validated <= NOT_NEARER * self.textbook - self.rounding


class Checkpoint:
    """What a search has found so far, in a file beside its result; None: nowhere.

    Raises:
        ValueError: the file is of another search.
    """

    def __init__(self, path: Path | None, search: Search):
        self.path, self.settings = path, "" if path is None else _digest(search)
        self.content: dict[str, Any] = {}
        self._written = time.monotonic()
        if path is None or not path.exists():
            return
        found = read_json(path)
        if not isinstance(found, dict) or found.get("format") != _FORMAT or found.get("search") != self.settings:
            raise ValueError(f"{path} must be of this search to be resumed, and is of another one: remove it")
        self.content = found

    def save(self, **more: Any) -> None:
        self.content |= more
        self.write()

    def write(self) -> None:
        if self.path is not None:
            content = {"format": _FORMAT, "search": self.settings, **self.content}
            write_atomically(self.path, json.dumps(content, indent=1).encode())
        self._written = time.monotonic()

    @property
    def known(self) -> dict[Candidate, float]:
        """The distances of the candidates that were run."""
        tried = self.content.get("tried", ())
        return {Candidate(tuple(visited), tuple(told)): distance for visited, told, distance in tried}

    def add(self, candidate: Candidate, distance: float) -> None:
        """Keep the distance of a candidate: in the file within seconds."""
        tried = self.content.setdefault("tried", [])
        tried.append([list(candidate.timesteps), list(candidate.model_timesteps), distance])
        if time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES:
            self.write()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def fit_solver(
    search: Search,
    runs: Runs,
    converged: Tensor,
    candidate: Candidate,
    checkpoint: Checkpoint,
    progress: Progress,
    say: Callable[[str], Any],
) -> FittedSolver:
    """Fit a solver that begins with the timesteps of ``candidate``.

    Args:
        runs, converged: the noise of the fit, and converged samples from it.
    """
    plans = Plans(
        lambda candidate, order: search.plan_of(candidate, order),
        lambda candidate, weights: search.plan_of(candidate, history_weights=weights),
    )
    unseen = search.runs(search.refine_count, search.seed + 2, progress)
    validation = unseen, search.converged(unseen)

    def done(iteration: int, fit: Fit) -> None:
        say(f"fitting, iteration {iteration}: {fit.validated:.4f}")
        assert fit.current is not None
        assert fit.best is not None
        checkpoint.save(
            current=_as_json(fit.current),
            best=_as_json(fit.best),
            iteration=iteration,
            damping=fit.damping,
            idle=fit.idle,
            moves_times=fit.moves_times,
            ended=fit.ended,
        )

    fit = Fit(
        runs,
        plans,
        converged,
        search.num_timesteps,
        validation,
        search.model_timesteps,
        search.fit_iterations,
        done,
    )
    converging, times = search.converging_plan(candidate), search.times(candidate.timesteps)
    starts = {
        "order 2": plans.textbook(candidate, 2),
        "order 3": plans.textbook(candidate, 3),
        "row by row": fit.rows(candidate, converging, times),
    }
    began = fit.start(list(starts.values()))
    textbook = fit.validation_distance(starts["order 2"])
    if "current" in checkpoint.content:
        saved = checkpoint.content
        for name in ("iteration", "damping", "idle", "moves_times", "ended"):
            setattr(fit, name, saved[name])
        best = _of_json(saved["best"])
        fit.consider(best, fit.trace(best))
        start = _of_json(saved["current"])
    else:
        start = began
    best = fit.fit(start)
    name = next(name for name, solver in starts.items() if solver == began)
    return FittedSolver(best, plans.of(best), name, fit.iteration, fit.seen, fit.validated, textbook, fit.rounding)


def _as_json(solver: Solver) -> dict[str, Any]:
    candidate = solver.candidate
    return {
        "timesteps": list(candidate.timesteps),
        "model_timesteps": list(candidate.model_timesteps),
        "deviations": [list(pair) for pair in solver.deviations],
    }


def _of_json(saved: Mapping[str, Any]) -> Solver:
    candidate = Candidate(tuple(saved["timesteps"]), tuple(saved["model_timesteps"]))
    return Solver(candidate, tuple((last, last_2) for last, last_2 in saved["deviations"]))


def _digest(search: Search) -> str:
    """Return a digest of everything that a search depends on."""
    known = {f.name: getattr(search, f.name) for f in fields(search) if f.name not in ("model", "schedule", "device")}
    if search.conditioning is not None:
        known["conditioning"] = search.conditioning.settings()
    model = search.model
    known["model"] = model_digest(model) if isinstance(model, nn.Module) else type(model).__qualname__
    known["schedule"] = search.schedule.digest
    return hashlib.sha256(repr(sorted(known.items())).encode()).hexdigest()
