"""The mean squared error of a model's eps, from which Analytic-DPM (arXiv 2201.06503) computes a
step's noise."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plans.levels import level_of
from ..plans.plan import SamplingPlan
from ..utils.devices import widened
from .runs import Runs


@torch.no_grad()
def measure_eps_residual(runs: Runs, plan: SamplingPlan, x0: Tensor) -> tuple[float, ...]:
    """Return ``E |eps - eps(x_t, t)|^2`` per element at each timestep of a plan, for
    ``DDIMSampler(analytic_variance=...)``.

    The mean is over ``x0`` with the noise of ``runs`` added.

    Args:
        x0: data ``(N, C, ...)``; without data, converged samples of the model from other noise.
    """
    values = []
    for step in plan.steps:
        level, at_t = level_of(step.level_t), plan.meaning_at(step.level_t)
        x_t = level.alpha * x0 + level.sigma * runs.start
        eps = at_t.eps_x * x_t + at_t.eps_m * runs.predict(x_t, step)
        values.append(widened(eps - runs.start).square().mean().item())
    return tuple(values)
