"""A noise level: how much of the clean data and how much noise a sample holds.

x = alpha x0 + sigma eps, with eps standard normal. Every Gaussian path is a curve of such pairs:
variance preserving (alpha^2 + sigma^2 = 1), flow matching (alpha + sigma = 1), variance exploding
(alpha = 1). Nothing here knows a schedule or a timestep.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class NoiseLevel(NamedTuple):
    """A level (alpha, sigma): a sample there is alpha x0 + sigma eps.

    Attributes:
        alpha: the weight of the clean data, 0 or more. 0 is pure noise (zero terminal SNR).
        sigma: the standard deviation of the noise, 0 or more. 0 is clean data.
    """

    alpha: float
    sigma: float

    @classmethod
    def of_alpha_bar(cls, alpha_bar: float) -> NoiseLevel:
        """Return the variance-preserving level (sqrt(alpha_bar), sqrt(1 - alpha_bar)).

        Raises:
            ValueError: ``alpha_bar`` is outside [0, 1].
        """
        if not 0 <= alpha_bar <= 1:
            raise ValueError(
                f"alpha_bar must lie in [0, 1], got {alpha_bar}: for another path pass NoiseLevel(alpha, sigma)"
            )
        return cls(math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))

    @property
    def alpha_bar(self) -> float:
        """The share of the clean data in the variance, alpha^2 / (alpha^2 + sigma^2): the alpha_bar
        of the variance-preserving level with the same signal-to-noise ratio."""
        return 1 / (1 + (self.sigma / self.alpha) ** 2) if self.alpha else 0.0

    @property
    def half_log_snr(self) -> float:
        """log(alpha / sigma), the lambda of DPM-Solver (arXiv 2206.00927): minus infinity for pure
        noise, infinity for clean data."""
        if self.sigma == 0:
            return math.inf
        return math.log(self.alpha) - math.log(self.sigma) if self.alpha else -math.inf

    def is_noisier_than(self, other: NoiseLevel) -> bool:
        """Return whether the signal-to-noise ratio here is below that of ``other``."""
        return self.alpha * other.sigma < other.alpha * self.sigma


CLEAN = NoiseLevel(1.0, 0.0)
"""Clean data."""

AnyLevel = NoiseLevel | float
"""A level; or a number, which is the alpha_bar of a variance-preserving one."""


def level_of(level: AnyLevel) -> NoiseLevel:
    """Return the level that is meant: of a number, the variance-preserving one with this
    alpha_bar."""
    return level if isinstance(level, NoiseLevel) else NoiseLevel.of_alpha_bar(level)


def as_text(level: AnyLevel) -> str:
    """Return a level as errors name it, in the caller's terms."""
    if isinstance(level, NoiseLevel):
        return f"alpha = {level.alpha:.6g}, sigma = {level.sigma:.6g}"
    return f"alpha_bar = {level:.6g}"
