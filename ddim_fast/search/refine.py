"""A list of timesteps made better by moving one timestep at a time, judged by whole runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..metrics import sample_distances
from ..plan import SamplingPlan
from .runs import Runs, State


@dataclass
class Refinement:
    """The state of a search: the best list so far, with the states of its run, from which a change of a later step can go on.

    Args:
        plan_of: the plan of a list of timesteps.
        converged: ``(N, C, ...)``, where many steps lead.
        budget: how many steps may be tried in all: a run of S steps costs S, one that differs from step k on S - k.
    """

    runs: Runs
    plan_of: Callable[[tuple[int, ...]], SamplingPlan]
    converged: Tensor
    budget: int
    progress: Callable[[int], Any] = lambda steps: None
    timesteps: tuple[int, ...] = ()
    distance: float = float("inf")
    spent: int = 0
    tried: dict[tuple[int, ...], float] = field(default_factory=dict)
    _states: list[State] = field(default_factory=list)

    def offer(self, timesteps: tuple[int, ...]) -> bool:
        """Try a list; keep it if it is the best so far. False, too, where there is no budget left, or it was tried before."""
        if timesteps in self.tried:
            return False
        same = 0
        while (
            self._states and same < min(len(timesteps), len(self.timesteps)) and timesteps[same] == self.timesteps[same]
        ):
            same += 1
        # A step is the same only if the next timestep is, too.
        first = max(same - 1, 0)
        steps = len(timesteps) - first
        if self.spent + steps > self.budget and self._states:
            return False
        states = self.runs.run(self.plan_of(timesteps), first, self._states if first else None)
        self.spent += steps
        self.progress(steps)
        distance = sample_distances(states[-1].x_t, self.converged).mean().item()
        self.tried[timesteps] = distance
        if not distance < self.distance:
            return False
        self.timesteps, self.distance, self._states = timesteps, distance, states
        return True

    def refine(self, num_train_timesteps: int) -> None:
        """Move timesteps while that helps: far ones first, then half as far, down to neighbours."""
        share = 0.5
        while self.spent < self.budget:
            before = self.spent
            better = [self.offer(moved) for moved in self._moves(share, num_train_timesteps)]
            if not any(better):
                if self._smallest(share):
                    return
                share /= 2
            elif self.spent == before:
                return

    def _moves(self, share: float, num_train_timesteps: int) -> Iterator[tuple[int, ...]]:
        """Lists that differ from the best in one timestep, the last first: that costs the fewest steps."""
        for k in reversed(range(len(self.timesteps))):
            for towards in (-1, 1):
                t = self.timesteps
                above = t[k - 1] if k else num_train_timesteps
                below = t[k + 1] if k + 1 < len(t) else -1
                room = (above - t[k] if towards > 0 else t[k] - below) - 1
                moved = t[k] + towards * min(room, max(1, round(share * room)))
                if moved != t[k]:
                    yield (*t[:k], moved, *t[k + 1 :])

    def _smallest(self, share: float) -> bool:
        """Whether every move was by one timestep already."""
        gaps = [a - b for a, b in zip(self.timesteps, (*self.timesteps[1:], -1), strict=True)]
        return share * max(gaps) < 1
