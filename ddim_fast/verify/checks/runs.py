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
from ..truth.cases import Level, Setting, StepCase
from ..truth.tolerances import to_numpy
from .judge import truth


class GaussianModel:
    """The exact eps of data that are N(mean, std_dev^2) in each dimension: linear in x_t, smooth in
    t.

    Args:
        levels: the steps of the run, from which the alpha_bar of each timestep is taken.
        mean, std_dev: of the data.
    """

    def __init__(self, levels: Sequence[Level], mean: float = 0.3, std_dev: float = 0.5):
        self.mean, self.std_dev = mean, std_dev
        self._alpha_bars = {round(level.t): level.alpha_bar_t for level in levels}
        self._alpha_bars |= {round(level.t_prev): level.alpha_bar_prev for level in levels}

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        slope, offset = self.line(self._alpha_bar(float(t.reshape(-1)[0])))
        return (slope * x_t.double() + offset).to(x_t.dtype)

    def line(self, alpha_bar: float) -> tuple[float, float]:
        """Return (slope, offset) of eps = slope * x_t + offset."""
        spread = math.sqrt(1 - alpha_bar)
        slope = spread / (alpha_bar * self.std_dev**2 + spread**2)
        return slope, -slope * math.sqrt(alpha_bar) * self.mean

    def x_t(self, normals: Tensor, alpha_bar: float) -> Tensor:
        """Return the samples at a noise level whose standard scores are ``normals``; the exact flow
        keeps the scores."""
        std_dev = math.sqrt(alpha_bar * self.std_dev**2 + 1 - alpha_bar)
        return (math.sqrt(alpha_bar) * self.mean + std_dev * normals.double()).to(normals.dtype)

    def _alpha_bar(self, t: float) -> float:
        found = self._alpha_bars.get(round(t))
        if found is None:
            known = ", ".join(map(str, sorted(self._alpha_bars, reverse=True)))
            raise ValueError(f"the model must be called at the timesteps of the run ({known}), got {t:g}")
        return found


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
        slope, offset = model.line(level.alpha_bar_t)
        m = (slope * x.double() + offset).to(x.dtype)
        true = truth(subject, StepCase(setting, index, x, m), level)
        of_x, of_m = oracle.fold(oracle.textbook_row("epsilon", level.alpha_bar_t, level.alpha_bar_prev))
        # The error so far, the two roundings of the model's output, those of the step, and the two
        # of its result.
        off = abs(of_x + of_m * slope) * off + abs(of_m) * eps * np.abs(to_numpy(m)) + true.allowed
        end = true.exact.x_prev
        off = off + eps * np.abs(end)
        x = torch.from_numpy(end).to(x_T.device, x_T.dtype)
    return Run(end, off)


__all__ = ["GaussianModel", "Run", "float64_run"]
