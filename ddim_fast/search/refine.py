"""Improve a list of timesteps by moving one timestep at a time, judged by whole runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..models.metrics import sample_distances
from ..plans.plan import SamplingPlan
from .runs import Runs, State


@dataclass(frozen=True)
class Candidate:
    """Timesteps to visit, strictly decreasing, and the model timestep of each step: whole numbers,
    which a ``Search`` turns into times where time is continuous.

    Args:
        model_timesteps: where none are given, the timesteps visited, so that candidates are equal
            where their runs are.
    """

    timesteps: tuple[int, ...]
    model_timesteps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_timesteps", self.model_timesteps or self.timesteps)

    @property
    def is_one_list(self) -> bool:
        """Whether the model is given the timesteps visited."""
        return self.model_timesteps == self.timesteps

    def first_difference(self, other: Candidate) -> int:
        """Return the number of the first step whose start, end or model timestep differs."""
        steps, others = (
            [*zip(c.timesteps, c.model_timesteps, (*c.timesteps[1:], -1), strict=True)] for c in (self, other)
        )
        same = [a == b for a, b in zip(steps, others, strict=False)]
        return next((k for k, equal in enumerate(same) if not equal), len(same))


@dataclass(eq=False)
class Refinement:
    """The state of a search: the best candidate so far, and the states of its run, which runs that
    differ later reuse.

    Args:
        plan_of: returns the plan of a candidate.
        converged: converged samples ``(N, C, ...)`` from the same noise.
        num_train_timesteps: T.
        budget: the number of steps that may be run: S for a whole run, S - k for one that differs
            from step k on.
        known: distances that an interrupted search has found, which are not run again.
        found: called with each candidate that was run, and its distance.
    """

    runs: Runs
    plan_of: Callable[[Candidate], SamplingPlan]
    converged: Tensor
    num_train_timesteps: int
    budget: int
    progress: Callable[[int], Any] = lambda steps: None
    known: Mapping[Candidate, float] = field(default_factory=dict)
    found: Callable[[Candidate, float], Any] = lambda candidate, distance: None
    _best: Candidate | None = None
    distance: float = float("inf")
    spent: int = 0
    tried: dict[Candidate, float] = field(default_factory=dict)
    _states: list[State] | None = None

    @property
    def best(self) -> Candidate:
        """The best candidate so far: there is one after the first ``offer``."""
        if self._best is None:
            raise RuntimeError("a refinement has a best candidate after the first offer, got none yet: offer one")
        return self._best

    def offer(self, candidate: Candidate) -> bool:
        """Try a candidate and keep it if it is the best so far. Return whether it was kept.

        A candidate that was tried before, or that the budget does not cover, is not run.
        """
        if candidate in self.tried:
            return False
        first = 0 if self._best is None else candidate.first_difference(self._best)
        steps = len(candidate.timesteps) - first
        if self.spent + steps > self.budget and self._best is not None:
            return False
        states, distance = None, self.known.get(candidate)
        if distance is None:
            if first and self._states is None:  # the best is one that is known
                self._states = self.runs.run(self.plan_of(self.best))
            states = self.runs.run(self.plan_of(candidate), first, self._states if first else None)
            distance = sample_distances(states[-1].x_t, self.converged).mean().item()
            self.found(candidate, distance)
        self.spent += steps
        self.progress(steps)
        self.tried[candidate] = distance
        if not distance < self.distance:
            return False
        self._best, self.distance, self._states = candidate, distance, states
        return True

    def refine(self) -> None:
        """Move the timesteps visited as long as that helps."""
        self._while_better(self._with_timestep_moved, 0.5)

    def refine_model_timesteps(self) -> None:
        """Move the model timesteps as long as that helps."""
        self._while_better(self._with_model_timestep_moved, 0.125)

    def _while_better(self, move: Callable[[int, int, float], Candidate | None], share: float) -> None:
        """Try large moves first, each repeated as long as it helps; then moves of half the size,
        down to 1."""
        while self.spent < self.budget:
            before = self.spent
            better = [self._move(move, k, share) for k in range(len(self.best.timesteps))]
            if not any(better):
                widest = max(self._gap(k) for k in range(len(self.best.timesteps)))
                if share * widest < 1:  # all moves were to neighbours
                    return
                share /= 2
            elif self.spent == before:
                return

    def _move(self, move: Callable[[int, int, float], Candidate | None], k: int, share: float) -> bool:
        """Move the k-th timestep one way as long as that helps, or else the other way. Return
        whether it helped."""
        for towards in (-1, 1):
            helped = False
            while (moved := move(k, towards, share)) is not None and self.offer(moved):
                helped = True
            if helped:
                return True
        return False

    def _around(self, k: int) -> tuple[int, int]:
        """Return the timesteps visited before and after the k-th, or the ends of the range."""
        t = (self.num_train_timesteps, *self.best.timesteps, -1)
        return t[k], t[k + 2]

    def _gap(self, k: int) -> int:
        above, below = self._around(k)
        return above - below

    def _with_timestep_moved(self, k: int, towards: int, share: float) -> Candidate | None:
        """Return the best candidate with its k-th timestep moved by a share of the room between its
        neighbours.

        None where there is no room. A model timestep of its own stays where it is.
        """
        t, (above, below) = self.best.timesteps, self._around(k)
        room = (above - t[k] if towards > 0 else t[k] - below) - 1
        moved = t[k] + towards * min(room, max(1, round(share * room)))
        if moved == t[k]:
            return None
        return Candidate((*t[:k], moved, *t[k + 1 :]), () if self.best.is_one_list else self.best.model_timesteps)

    def _with_model_timestep_moved(self, k: int, towards: int, share: float) -> Candidate | None:
        """Return the best candidate with its k-th model timestep moved by a share of the gap around
        the k-th timestep.

        None where that would leave the range.
        """
        t = self.best.model_timesteps
        moved = t[k] + towards * max(1, round(share * self._gap(k)))
        inside = 0 <= moved < self.num_train_timesteps
        return Candidate(self.best.timesteps, (*t[:k], moved, *t[k + 1 :])) if inside else None
