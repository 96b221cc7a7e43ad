"""How far a result may be from float64: the only table of tolerances, in machine epsilons of the
type computed in.

An error is measured against the sum of the magnitudes of the result's terms, since rounding errors
scale with it: a result that is small by cancellation may have more wrong digits. 4 eps allow for
one rounding of each coefficient, product, sum and of the result, and little more. Half precision is
computed in float32 and rounded once: the result must be the correct rounding of a number that
float32 was allowed to give, and so is the correctly rounded exact result in nearly all elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from . import oracle

COMPUTED_IN = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
SCALED_EPS = {torch.float64: 8.0, torch.float32: 4.0}
SUM_ROUNDINGS = 16
SHARE_CORRECTLY_ROUNDED = 0.999
"""The share of the elements of a realistic half-precision step; the others are off by one unit in
the last place."""

ROUND = {
    torch.float64: lambda x: x,
    torch.float32: oracle.round_to_float32,
    torch.float16: oracle.round_to_float16,
    torch.bfloat16: oracle.round_to_bfloat16,
}
_TINIEST = {torch.float64: 5e-324, torch.float32: 2.0**-149}  # results this small have a fixed, not a relative, spacing


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return the tensor's values as float64."""
    return tensor.detach().cpu().to(torch.float64).numpy()


def allowed_error(dtype: torch.dtype, terms: np.ndarray) -> np.ndarray:
    """Return the largest error allowed before the result is rounded to half precision."""
    kind = COMPUTED_IN[dtype]
    return SCALED_EPS[kind] * (torch.finfo(kind).eps * terms + _TINIEST[kind])


def allowed_error_in_type(dtype: torch.dtype, terms: np.ndarray) -> np.ndarray:
    """Return the largest error allowed where everything is computed in the type itself, half
    precision too."""
    return SCALED_EPS[COMPUTED_IN[dtype]] * torch.finfo(dtype).eps * terms


def allowed_density_error(
    dtype: torch.dtype, deviation: np.ndarray, terms: np.ndarray, scale: float, offset: float
) -> np.ndarray:
    """Return the largest error allowed of a sum over the elements of scale * deviation^2 + offset,
    ``(B,)``.

    The sum has up to ``SUM_ROUNDINGS`` roundings between a square and the result: the levels of a
    tree, and what is done with its root.

    Args:
        deviation: x_prev - mean, ``(B, n)``; zeros where an element does not count.
        terms: the sum of the magnitudes of the mean's terms, ``(B, n)``; zeros as above.
        scale, offset: 1 / (2 std^2) and log(std) + log(2 pi) / 2; 0 for a divergence.
    """
    return density_error(COMPUTED_IN[dtype], deviation, allowed_error(dtype, terms), scale, offset)


def density_error(
    computed_in: torch.dtype,
    deviation: np.ndarray,
    mean_error: np.ndarray,
    scale: float,
    offset: float,
    std_error: float = 0.0,
) -> np.ndarray:
    """Return ``allowed_density_error`` where the mean may be off by ``mean_error``, ``(B, n)``, and
    the standard deviation by a relative ``std_error``."""
    eps = torch.finfo(computed_in).eps
    off = mean_error + eps * np.abs(deviation)
    of_deviations = (scale * (2 * np.abs(deviation) * off + off**2)).sum(1)
    rounded = of_deviations + eps * SUM_ROUNDINGS * (scale * deviation**2 + abs(offset)).sum(1)
    if std_error == 0:
        return rounded
    if std_error >= 1:
        return np.full(len(deviation), np.inf)
    of_scale = (1 - std_error) ** -2
    return of_scale * rounded + ((of_scale - 1) * scale * deviation**2 - math.log1p(-std_error)).sum(1)


def density_gradient_error(
    computed_in: torch.dtype,
    deviation: np.ndarray,
    mean_error: np.ndarray,
    factor: np.ndarray,
    std_error: float = 0.0,
    slope_error: float = 0.0,
) -> np.ndarray:
    """Return the largest error allowed of factor * (x_prev - mean), the gradient of a log-density,
    ``(B, n)``.

    Args:
        deviation, mean_error, std_error: those of ``density_error``.
        factor: the weight of the element, over the variance, times the slope of the mean; ``(B,
            n)``.
        slope_error: the relative error of that slope.
    """
    if std_error >= 1:
        return np.full(deviation.shape, np.inf)
    eps = torch.finfo(computed_in).eps
    of_factor = (1 + slope_error + SUM_ROUNDINGS * eps) / (1 - std_error) ** 2
    return np.abs(factor) * (of_factor * (mean_error + eps * np.abs(deviation)) + (of_factor - 1) * np.abs(deviation))


def worst_share(error: np.ndarray, allowed: np.ndarray) -> tuple[float, tuple[int, ...]]:
    """Return the largest error as a share of what is allowed (infinity for NaN), and its index.

    The arrays must not be empty.
    """
    share = np.asarray(error / allowed)
    share = np.where(np.isfinite(share), share, np.inf)
    place = tuple(int(i) for i in np.unravel_index(np.argmax(share), share.shape))
    return float(share[place]), place


def assert_near(actual: torch.Tensor, exact: np.ndarray, terms: np.ndarray, what: str = "result") -> None:
    """Raise AssertionError unless each element is as near to the finite ``exact`` as its type
    allows."""
    assert_within(actual, exact, allowed_error(actual.dtype, terms), what)


def assert_within(actual: torch.Tensor, exact: np.ndarray, allowed: np.ndarray, what: str = "result") -> None:
    """Raise AssertionError unless each element is the rounding of a number within ``allowed`` of
    ``exact``."""
    got, rounded = to_numpy(actual), ROUND[actual.dtype]
    lowest, highest = (rounded(bound).reshape(exact.shape) for bound in (exact - allowed, exact + allowed))
    wrong = ~((lowest <= got) & (got <= highest))  # NaN is wrong, too
    if wrong.any():
        off = np.where(np.isfinite(got), np.abs(got - exact) - allowed, np.inf)
        i = np.unravel_index(np.argmax(np.where(wrong, off, -np.inf)), wrong.shape)
        raise AssertionError(
            f"{what}: {wrong.sum()} of {wrong.size} elements too far from float64; worst at {tuple(map(int, i))}: "
            f"got {float(got[i])!r}, exact {float(exact[i])!r}, allowed {float(lowest[i])!r} to {float(highest[i])!r}"
        )


def share_correctly_rounded(actual: torch.Tensor, exact: np.ndarray, terms: np.ndarray) -> float:
    """Return the share of elements that are the correctly rounded exact result.

    Where that lies half-way between two numbers, as far as float64 can tell, both are. On paths
    whose levels are simple fractions that is so for one element in a hundred: 3 / 44, a step of
    flow matching with a shift of 3, times every eleventh number of float16 is a short binary one.

    Args:
        terms: the sum of the magnitudes of the terms of ``exact``.
    """
    got, rounded = to_numpy(actual), ROUND[actual.dtype]
    unknown = allowed_error(torch.float64, terms)
    lowest, highest = (rounded(bound).reshape(exact.shape) for bound in (exact - unknown, exact + unknown))
    return float(np.mean((got == lowest) | (got == highest)))


# --- Subjects with float32 coefficients -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """All values that a computation can have when each operation is rounded to relative precision
    ``eps``."""

    low: float
    high: float
    eps: float

    @classmethod
    def exact(cls, value: float, eps: float) -> Interval:
        return cls(value, value, eps)

    def _rounded(self, *ends: float) -> Interval:
        low, high = min(ends), max(ends)
        return Interval(low - abs(low) * self.eps, high + abs(high) * self.eps, self.eps)

    def __add__(self, other: Interval) -> Interval:
        return self._rounded(self.low + other.low, self.high + other.high)

    def __sub__(self, other: Interval) -> Interval:
        return self._rounded(self.low - other.high, self.high - other.low)

    def __mul__(self, other: Interval) -> Interval:
        ends = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        return self._rounded(*ends)

    def __truediv__(self, other: Interval) -> Interval:
        if other.low <= 0 <= other.high:
            return Interval(-math.inf, math.inf, self.eps)
        ends = [a / b for a in (self.low, self.high) for b in (other.low, other.high)]
        return self._rounded(*ends)

    def sqrt(self) -> Interval:
        """Return the square root; values below 0, which only rounding can give, count as 0."""
        return self._rounded(math.sqrt(max(self.low, 0.0)), math.sqrt(max(self.high, 0.0)))

    @property
    def spread(self) -> float:
        return self.high - self.low


def _level_interval(level: oracle.AnyLevel, off: float, eps: float) -> tuple[Interval, Interval, Interval]:
    """Return all values that alpha, sigma and sigma^2 of a level can have."""
    if isinstance(level, oracle.NoiseLevel):
        alpha_off = 0.0 if level.alpha in (0.0, 1.0) else off
        sigma = Interval(level.sigma * (1 - off), level.sigma * (1 + off), eps)
        return Interval(max(level.alpha - alpha_off, 0.0), level.alpha + alpha_off, eps), sigma, sigma * sigma
    bar = Interval(level * (1 - off), min(level * (1 + off), 1.0), eps)
    variance = Interval.exact(1.0, eps) - bar
    return bar.sqrt(), variance.sqrt(), variance


def coefficient_spread(
    prediction_type: str,
    level_t: oracle.AnyLevel,
    level_prev: oracle.AnyLevel,
    eta: float,
    use_clipped_model_output: bool,
    eps: float,
    level_eps: tuple[float, float] = (0.0, 0.0),
    sigma_data: float = 0.5,
) -> dict[str, float]:
    """Return how far each column of a row may be off, where ``oracle.textbook_row`` is evaluated
    with relative precision ``eps``.

    Args:
        eta: the paper's, which scales the standard deviation.
        level_eps: the relative errors of the two alpha_bars themselves, or of sigma; alpha, where
            it is not given by sigma, is 1 or off by as much in absolute terms.
        sigma_data: of the prediction type "edm".
    """
    one, zero = Interval.exact(1.0, eps), Interval.exact(0.0, eps)
    signal, noise, _ = _level_interval(level_t, level_eps[0], eps)
    signal_prev, noise_prev, variance_prev = _level_interval(level_prev, level_eps[1], eps)
    total, both, data = signal * signal + noise * noise, signal + noise, Interval.exact(sigma_data**2, eps)
    edm = noise * noise + signal * signal * data
    columns = {
        "epsilon": lambda: (one / signal, zero - noise / signal, zero, one),
        "sample": lambda: (zero, one, one / noise, zero - signal / noise),
        "v_prediction": lambda: (signal / total, zero - noise / total, noise / total, signal / total),
        "flow": lambda: (one / both, zero - noise / both, one / both, signal / both),
        "score": lambda: (one / signal, noise * noise / signal, zero, zero - noise),
        "edm": lambda: (
            signal * data / edm,
            noise * data.sqrt() / edm.sqrt(),
            noise / edm,
            zero - signal * data.sqrt() / edm.sqrt(),
        ),
    }[prediction_type]()
    if prediction_type == "v_prediction" and not isinstance(level_t, oracle.NoiseLevel):
        columns = signal, zero - noise, noise, signal
    eps_0 = zero
    if use_clipped_model_output:
        columns, eps_0 = (*columns[:2], one / noise, zero), zero - signal / noise
    variance = zero
    if eta:
        if isinstance(level_t, oracle.NoiseLevel) or isinstance(level_prev, oracle.NoiseLevel):
            kept = signal * noise_prev / (signal_prev * noise)
            share = one - kept * kept
        else:
            bar_t, bar_prev = (
                Interval(value * (1 - off), min(value * (1 + off), 1.0), eps)
                for value, off in zip((level_t, level_prev), level_eps, strict=True)
            )
            share = (one - bar_t / bar_prev) / (one - bar_t)
        variance = Interval.exact(eta**2, eps) * (variance_prev * share)
    direction = (variance_prev - variance).sqrt()
    names = ("x0_x", "x0_m", "eps_x", "eps_m", "eps_0", "prev_x0", "prev_eps", "prev_noise")
    found = (*columns, eps_0, signal_prev, direction, variance.sqrt())
    return {name: value.spread for name, value in zip(names, found, strict=True)}


def spread_of_result(
    row: dict[str, float],
    spread: dict[str, float],
    x_t: np.ndarray,
    m: np.ndarray,
    z: np.ndarray,
    result: oracle.Result,
) -> np.ndarray:
    """Return how far x_prev may be off, where each column of its row is off by its spread."""
    x_t, m, z = (np.abs(np.asarray(a, np.float64)) for a in (x_t, m, z))
    of_x0 = spread["x0_x"] * x_t + spread["x0_m"] * m
    x0, eps_size = (
        result.x0_terms,
        abs(row["eps_x"]) * x_t + abs(row["eps_m"]) * m + abs(row["eps_0"]) * result.x0_terms,
    )
    of_eps = spread["eps_x"] * x_t + spread["eps_m"] * m + spread["eps_0"] * x0 + abs(row["eps_0"]) * of_x0
    return (
        spread["prev_x0"] * x0
        + abs(row["prev_x0"]) * of_x0
        + spread["prev_eps"] * eps_size
        + abs(row["prev_eps"]) * of_eps
        + spread["prev_noise"] * z
    )
