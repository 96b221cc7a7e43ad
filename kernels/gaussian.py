"""The Gaussian that a stochastic step samples from: N(mean, std^2) of each element, where x_prev =
mean + prev_noise * z.

    log N(x_prev; mean, std^2) = -(scale * (x_prev - mean)^2 + offset)       of one element
    KL(N(mean, std^2), N(mean_ref, std^2)) = scale * (mean_ref - mean)^2
    scale = 1 / (2 std^2),   offset = log(std) + log(2 pi) / 2

``docs/LOG_PROB.md`` says what is summed in which order.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..utils.checks import check_number

REDUCTIONS = ("mean", "sum")
"""Over the elements of a sample."""
BLOCK = 2048
"""Elements of a sample whose squares are summed in float32, by a tree."""
COLUMNS = 128
"""Sums of blocks that are added side by side, in float64."""
_LEAST, _LARGEST = 2.0**-60, 2.0**60  # of std: its square and its inverse are float32 numbers, with room


def std_of_density(prev_noise: float, min_std: float | None) -> float:
    """Return the standard deviation of the density: the step's own, or ``min_std`` if that is
    more."""
    return max(abs(prev_noise), min_std or 0.0)


def has_density(prev_noise: float, min_std: float | None) -> bool:
    """Return whether a step that adds noise of this standard deviation has a density."""
    return _LEAST <= std_of_density(prev_noise, min_std) <= _LARGEST


def scale_and_offset(prev_noise: float, min_std: float | None) -> tuple[float, float]:
    """Return (scale, offset) of the formulas above; the step has a density."""
    std = std_of_density(prev_noise, min_std)
    return 0.5 / (std * std), math.log(std) + 0.5 * math.log(2 * math.pi)


def mean_square(log_prob: Tensor, scale: float | Tensor, offset: float | Tensor) -> Tensor:
    """Return the mean of (x_prev - mean)^2 that a log-probability holds beside its constants, where it
    is a mean over the elements, ``(B,)``."""
    return (log_prob + offset) / -scale


def check_min_std(min_std: float | None) -> None:
    """Raise TypeError or ValueError unless ``min_std`` is None or a positive number."""
    if min_std is not None:
        check_number("min_std", min_std, above=0, remedy="None for the step's own standard deviation alone")


def check_density(prev_noise: float, min_std: float | None) -> None:
    """Raise ValueError where a step has no density, or one out of float32's reach."""
    check_min_std(min_std)
    if has_density(prev_noise, min_std):
        return
    if std_of_density(prev_noise, min_std) == 0:
        raise ValueError(
            "the density of a step needs a standard deviation above 0, got prev_noise = 0 (this step adds no noise: eta "
            "is 0, or it ends at clean data): pass min_std, the least standard deviation that the density is taken with, "
            "or leave this step out"
        )
    raise ValueError(
        f"the density of a step needs a standard deviation from 2**-60 to 2**60, got prev_noise = {prev_noise} and "
        f"min_std = {min_std}: change the noise level, or min_std"
    )
