"""What the checks of whole runs share: a model whose exact flow is known, and the float64 result of
a run with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..subjects.subject import Subject
from ..truth import oracle
from ..truth.cases import Level, Setting, StepCase, nearest
from ..truth.oracle import AnyLevel
from ..truth.tolerances import to_numpy
from .base import CheckFailedError
from .judge import row_of, truth


def level_of(setting: Setting, t: Tensor) -> AnyLevel:
    """Return the exact level of the timestep that a model is called with.

    Raises:
        CheckFailedError: there is no such timestep.
    """
    timestep = float(t.reshape(-1)[0])
    if setting.alpha_bars is not None:
        return setting.levels()[len(setting.alpha_bars) - 1 - round(timestep)].level_t
    last = setting.num_train_timesteps - 1 if setting.path is None else setting.path.first
    if not 0 <= timestep <= last * (1 + 1e-5):
        raise CheckFailedError(f"the model must be called with timesteps in [0, {last:g}], got {timestep:g}")
    return setting.level_at(round(timestep) if setting.path is None and not setting.divided else min(timestep, last))


class GaussianModel:
    """The exact model of data that are N(mean, std_dev^2) in each dimension, of the setting's
    prediction type: linear in x_t, smooth in t.

    Args:
        setting: of the run.
        levels: its steps, from which the level of each timestep is taken.
        mean, std_dev: of the data.
    """

    def __init__(self, setting: Setting, levels: Sequence[Level], mean: float = 0.3, std_dev: float = 0.5):
        self.setting, self.mean, self.std_dev = setting, mean, std_dev
        self._levels = {level.t_prev: level.level_prev for level in levels} | {
            level.t: level.level_t for level in levels
        }

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        slope, offset = self.line(self._levels[nearest(list(self._levels), float(t.reshape(-1)[0]))])
        return (slope * x_t.double() + offset).to(x_t.dtype)

    def line(self, level: AnyLevel) -> tuple[float, float]:
        """Return (slope, offset) of the model's output = slope * x_t + offset."""

        def output(x_t: float) -> float:
            alpha, sigma = oracle.alpha_sigma(level)
            share = alpha * self.std_dev**2 / (alpha**2 * self.std_dev**2 + sigma**2)
            x0 = self.mean + share * (x_t - alpha * self.mean)
            eps = sigma * (x_t - alpha * self.mean) / (alpha**2 * self.std_dev**2 + sigma**2)
            kind = self.setting.prediction_type
            return float(oracle.model_output(kind, np.float64(x0), np.float64(eps), level, self.setting.sigma_data))

        return output(1.0) - output(0.0), output(0.0)

    def x_t(self, normals: Tensor, level: AnyLevel) -> Tensor:
        """Return the samples at a noise level whose standard scores are ``normals``; the exact flow
        keeps the scores."""
        alpha, sigma = oracle.alpha_sigma(level)
        std_dev = math.hypot(alpha * self.std_dev, sigma)
        return (alpha * self.mean + std_dev * normals.double()).to(normals.dtype)


class Run(NamedTuple):
    """The end of a run at eta = 0 in float64, and how far from it rounding may take a subject."""

    x_0: np.ndarray
    allowed: np.ndarray


def float64_run(subject: Subject, setting: Setting, levels: Sequence[Level], model: GaussianModel, x_T: Tensor) -> Run:
    """Make a run at eta = 0 with the oracle.

    Samples and model outputs are rounded to the type of ``x_T`` in each step; ``allowed`` includes
    that.
    """
    eps = torch.finfo(x_T.dtype).eps
    x, off = x_T, np.zeros(x_T.shape)
    end = to_numpy(x_T)
    for index, level in enumerate(levels):
        slope, offset = model.line(level.level_t)
        m = (slope * x.double() + offset).to(x.dtype)
        true = truth(subject, StepCase(setting, index, x, m), level)
        of_x, of_m = oracle.fold(row_of(subject, setting, level))
        # The error so far, the two roundings of the model's output, those of the step, and the two
        # of its result.
        off = abs(of_x + of_m * slope) * off + abs(of_m) * eps * np.abs(to_numpy(m)) + true.allowed
        if setting.input_scale(level.t) != 1:  # rounded, and so is what the model makes of it
            off = off + 2 * eps * np.abs(of_m * slope * to_numpy(x))
        end = true.exact.x_prev
        off = off + eps * np.abs(end)
        x = torch.from_numpy(end).to(x_T.device, x_T.dtype)
    return Run(end, off)


__all__ = ["GaussianModel", "Run", "float64_run", "level_of"]
