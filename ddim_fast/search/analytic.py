"""Analytic-DPM (Bao et al. 2022, arXiv 2201.06503): how much noise a step should add, told from how large the model's eps is on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..schedule import NoiseSchedule
from ..timesteps import explicit_timesteps
from ..update import PREDICTION_TYPES
from .runs import Runs


@dataclass(frozen=True)
class MeanSquaredEps:
    """E |eps(x_t, t)|^2 / D at some timesteps, with D the number of elements: Gamma_t of the paper (equation 8, divided by 1 - alpha_bar_t).

    Between timesteps it is told by a straight line in t.

    Args:
        timesteps: decreasing.
        values: one each, from 0 to 1: eps is a conditional mean of noise of variance 1, so it is no larger.
    """

    timesteps: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.timesteps) != len(self.values) or not self.timesteps:
            raise ValueError(f"each timestep needs one value, got {len(self.timesteps)} and {len(self.values)}")
        if wrong := [value for value in self.values if not 0 <= value < float("inf")]:
            raise ValueError(f"mean squares of eps must be finite and not negative, got {wrong[0]}")

    def at(self, t: int) -> float:
        return float(np.interp(t, self.timesteps[::-1], self.values[::-1]))


@torch.inference_mode()
def measure_mean_squared_eps(
    runs: Runs,
    schedule: NoiseSchedule,
    x0: torch.Tensor,
    timesteps: Any,
    prediction_type: str,
) -> MeanSquaredEps:
    """Monte Carlo estimate over data ``x0`` ``(N, C, ...)``, each noised to each timestep by the noise of ``runs``."""
    timesteps = explicit_timesteps(timesteps, schedule.num_train_timesteps)
    values = []
    for t in timesteps:
        x_t = schedule.add_noise(x0, runs.x_T, t)
        at_t = PREDICTION_TYPES[prediction_type](schedule.alpha_bar(t))
        eps = at_t.eps_x * x_t + at_t.eps_m * runs.predict(x_t, t)
        values.append(eps.double().square().mean().item())
    return MeanSquaredEps(timesteps, tuple(values))
