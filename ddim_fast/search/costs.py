"""The cost of each possible step: how far from a converged trajectory it ends.

The model is only called along the trajectories: a step is linear in x_t and the model's outputs,
which are kept at each candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.metrics import sample_distances
from ..plans.levels import level_of
from ..plans.plan import SamplingPlan
from .runs import Runs, State, after


@dataclass(frozen=True, eq=False)
class Reference:
    """Converged trajectories at K candidate timesteps.

    Attributes:
        timesteps: the candidates, decreasing.
        x_t: K + 1 tensors ``(B, C, ...)``: at each candidate, and at the end.
        model_outputs, x0: K tensors each: the model's output at each candidate, and the x0 that
            follows from it.
    """

    timesteps: tuple[float, ...]
    x_t: list[Tensor]
    model_outputs: list[Tensor]
    x0: list[Tensor]

    @property
    def converged(self) -> Tensor:
        return self.x_t[-1]


def reference(runs: Runs, plan: SamplingPlan, candidates: Sequence[float]) -> Reference:
    """Run a plan of order 2 with many steps, and return its states at the candidates, all of which
    it visits."""
    wanted, state = set(candidates), runs.first_state(plan)
    found = Reference(tuple(candidates), [], [], [])
    for step in plan.steps:
        m = runs.predict(state.x_t, step)
        state, before = after(state, step, m, plan.order), state
        if step.t in wanted and state.x0_last is not None:
            found.x_t.append(before.x_t)
            found.model_outputs.append(m)
            found.x0.append(state.x0_last)
    found.x_t.append(state.x_t)
    return found


@torch.no_grad()
def cost_table(found: Reference, plan: SamplingPlan, progress: Callable[[int], Any] = lambda steps: None) -> np.ndarray:
    """Return the costs of all steps between candidates, in the form that ``dynamic.best_timesteps``
    takes.

    The cost of a step from candidate i, at the converged x_t, to j is the root mean square
    difference of its result to the converged x_s, mean over samples, divided by alpha_s: an error
    in x_s is an error of that size in x0 if eps does not change.

    Args:
        plan: a plan over the candidates, which gives the order of the steps, their clipping and so
            on.
    """
    K = len(found.timesteps)
    if plan.order == 1:
        costs = np.full((K, K + 1), np.inf)
        for i in range(K):
            for j in range(i + 1, K + 1):
                costs[i, j] = _cost(found, plan, (i, j))
            progress(1)
        return costs
    costs = np.full((K + 1, K, K + 1), np.inf)
    for i in range(K):
        for j in range(i + 1, K + 1):
            costs[K, i, j] = _cost(found, plan, (i, j))
            for before in range(i):
                # A step to clean data is of first order, whatever came before it.
                costs[before, i, j] = costs[K, i, j] if j == K else _cost(found, plan, (before, i, j))
        progress(1)
    return costs


def _cost(found: Reference, plan: SamplingPlan, candidates: tuple[int, ...]) -> float:
    """Return the cost of the last step of a short run: from the last candidate but one to the last."""
    K = len(found.timesteps)
    *before, i, j = candidates
    visited = [*before, i] if j == K else [*before, i, j]
    short = replace(plan, timesteps=tuple(found.timesteps[k] for k in visited), model_timesteps=())
    step = short.steps[len(before)]
    state = State(found.x_t[i], found.x0[before[-1]] if before else None)
    landed = after(state, step, found.model_outputs[i], plan.order).x_t
    error = sample_distances(landed, found.x_t[j]).mean().item()
    return error / level_of(step.level_prev).alpha
