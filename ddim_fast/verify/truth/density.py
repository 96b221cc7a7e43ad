"""The Gaussian that a stochastic step draws x_prev from, in float64: its log-density, and the
derivative of that by the model's output.

Equation 12 of arXiv 2010.02502 draws x_prev from N(mean, std^2), where the mean is what the step
computes before it adds the noise. Training by policy gradients (arXiv 2305.13301, 2409.00588,
2505.05470) takes the logarithm of its density.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import oracle

HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)
REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda each: each.mean(1),
    "sum": lambda each: each.sum(1),
}
"""Over the elements of a sample, ``(B, n)`` to ``(B,)``."""


@dataclass(frozen=True, eq=False)
class Gaussian:
    """The distribution of x_prev.

    Attributes:
        mean: ``(B, n)``.
        terms: the sums of the magnitudes of the mean's terms, ``(B, n)``: see ``tolerances``.
        std: the standard deviation, above 0.
    """

    mean: np.ndarray
    terms: np.ndarray
    std: float

    def log_density(self, x_prev: np.ndarray) -> np.ndarray:
        """Return the logarithm of the density of each element, ``(B, n)``."""
        return -0.5 * ((x_prev - self.mean) / self.std) ** 2 - math.log(self.std) - HALF_LOG_2_PI

    def log_prob(self, x_prev: np.ndarray, reduction: str) -> np.ndarray:
        """Return the log-probability of each sample, ``(B,)``; ``reduction`` is a key of
        ``REDUCTIONS``."""
        return REDUCTIONS[reduction](self.log_density(x_prev))

    def with_std(self, std: float) -> Gaussian:
        """Return the distribution with this standard deviation in the place of its own."""
        return replace(self, std=std)


def gaussian(
    row: dict[str, float], x_t: np.ndarray, model_output: np.ndarray, min_std: float = 0.0, **more: Any
) -> Gaussian | None:
    """Return the distribution of x_prev by a row of coefficients; None where it has no density,
    since the step adds no noise.

    Args:
        row: see ``oracle.row_step``.
        x_t, model_output: ``(B, ...)``.
        min_std: the least standard deviation that the density is taken with.
        more: of ``oracle.row_step``.
    """
    std = max(row["prev_noise"], min_std)
    if std == 0:
        return None
    mean = oracle.row_step(row | {"prev_noise": 0.0}, x_t, model_output, **more)
    return Gaussian(flat(mean.x_prev), flat(mean.terms), std)


def flat(values: np.ndarray) -> np.ndarray:
    """Return samples ``(B, ...)`` as ``(B, n)``."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


STEP = 1e-3
"""Of finite differences in the model's output: the log-density is a polynomial of second degree in
it, so central differences have no error of their own, but where x0 reaches its bound in between."""


def slopes(
    row: dict[str, float], x_t: np.ndarray, model_output: np.ndarray, x_prev: np.ndarray, min_std: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the derivatives of each element's log-density and mean by the model's output, by
    finite differences, and whether they exist: x0 is clear of its bound. ``(B, n)`` each.

    The step has a density.
    """
    at = {}
    for way in (-1, 0, 1):
        found = gaussian(row, x_t, model_output + way * STEP, min_std)
        assert found is not None
        at[way] = found
    density = (at[1].log_density(x_prev) - at[-1].log_density(x_prev)) / (2 * STEP)
    ahead, behind = at[1].mean - at[0].mean, at[0].mean - at[-1].mean
    clear = np.abs(ahead - behind) <= 1e-12 * (1 + at[0].terms)
    return density, (ahead + behind) / (2 * STEP), clear
