"""A list of timesteps made better by moving one timestep at a time, judged by whole runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..models.metrics import sample_distances
from ..plans.plan import SamplingPlan
from .runs import Runs, State


@dataclass(frozen=True)
class Candidate:
    """Timesteps to visit, strictly decreasing, and what the model is told at each; None: those very timesteps."""

    timesteps: tuple[int, ...]
    model_timesteps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.model_timesteps == self.timesteps:  # one way to say it: candidates are equal where their runs are
            object.__setattr__(self, "model_timesteps", None)

    @property
    def told(self) -> tuple[int, ...]:
        return self.timesteps if self.model_timesteps is None else self.model_timesteps

    def first_difference(self, other: Candidate) -> int:
        """The number of the first step that is not the same in both: it goes somewhere else, or the model is told something else."""
        steps, others = ([*zip(c.timesteps, c.told, (*c.timesteps[1:], -1), strict=True)] for c in (self, other))
        same = [a == b for a, b in zip(steps, others, strict=False)]
        return next((k for k, equal in enumerate(same) if not equal), len(same))


@dataclass
class Refinement:
    """The state of a search: the best candidate so far, with the states of its run, from which a change of a later step can go on.

    Args:
        plan_of: the plan of a candidate.
        converged: ``(N, C, ...)``, where many steps lead.
        num_train_timesteps: T.
        budget: how many steps may be tried in all: a run of S steps costs S, one that differs from step k on S - k.
    """

    runs: Runs
    plan_of: Callable[[Candidate], SamplingPlan]
    converged: Tensor
    num_train_timesteps: int
    budget: int
    progress: Callable[[int], Any] = lambda steps: None
    best: Candidate | None = None
    distance: float = float("inf")
    spent: int = 0
    tried: dict[Candidate, float] = field(default_factory=dict)
    _states: list[State] = field(default_factory=list)

    def offer(self, candidate: Candidate) -> bool:
        """Try a candidate; keep it if it is the best so far. False, too, where there is no budget left, or it was tried before."""
        if candidate in self.tried:
            return False
        first = 0 if self.best is None else candidate.first_difference(self.best)
        steps = len(candidate.timesteps) - first
        if self.spent + steps > self.budget and self.best is not None:
            return False
        states = self.runs.run(self.plan_of(candidate), first, self._states if first else None)
        self.spent += steps
        self.progress(steps)
        distance = sample_distances(states[-1].x_t, self.converged).mean().item()
        self.tried[candidate] = distance
        if not distance < self.distance:
            return False
        self.best, self.distance, self._states = candidate, distance, states
        return True

    def refine(self) -> None:
        """Move the timesteps visited while that helps."""
        self._while_better(self._visit, 0.5)

    def refine_model_timesteps(self) -> None:
        """Move what the model is told while that helps."""
        self._while_better(self._tell, 0.125)

    def _while_better(self, move: Callable[[int, int, float], Candidate | None], share: float) -> None:
        """Far moves first, each again while it helps; then half as far, down to neighbours."""
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
        """Move the k-th one way while that helps, or else the other way. Whether it did."""
        for towards in (-1, 1):
            helped = False
            while (moved := move(k, towards, share)) is not None and self.offer(moved):
                helped = True
            if helped:
                return True
        return False

    def _around(self, k: int) -> tuple[int, int]:
        """The timesteps visited before and after the k-th, or the ends of the range."""
        t = (self.num_train_timesteps, *self.best.timesteps, -1)
        return t[k], t[k + 2]

    def _gap(self, k: int) -> int:
        above, below = self._around(k)
        return above - below

    def _visit(self, k: int, towards: int, share: float) -> Candidate | None:
        """The best candidate with the k-th timestep moved by a share of the room that its neighbours leave; None where there is none."""
        t, (above, below) = self.best.timesteps, self._around(k)
        room = (above - t[k] if towards > 0 else t[k] - below) - 1
        moved = t[k] + towards * min(room, max(1, round(share * room)))
        return None if moved == t[k] else Candidate((*t[:k], moved, *t[k + 1 :]), self.best.model_timesteps)

    def _tell(self, k: int, towards: int, share: float) -> Candidate | None:
        """The best candidate with what the model is told in the k-th step moved by a share of the gap between the neighbours."""
        told = self.best.told
        moved = told[k] + towards * max(1, round(share * self._gap(k)))
        inside = 0 <= moved < self.num_train_timesteps
        return Candidate(self.best.timesteps, (*told[:k], moved, *told[k + 1 :])) if inside else None
