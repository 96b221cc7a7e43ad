"""Statistical tests whose false-alarm rates are exact or bounded from above.

Each test takes numbers and ``rate``, the largest probability with which it may fail on correct
numbers. Where several tests are made together, each gets an equal share of the rate (Bonferroni):
``together``.

The rates in use are 1e-8 and less, where the usual normal approximations can be wrong by a large
factor. The docstring of each test says whether it is exact or a bound, and how many numbers it
needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy import special  # type: ignore[import-untyped]  # scipy has no types

Test = Callable[[float], "Finding"]
"""A test with its numbers bound: it takes a rate and returns its finding."""


@dataclass(frozen=True)
class Finding:
    """The result of a test.

    Args:
        what: what was measured, in words.
        found, expected: the measured quantity, and its value for correct numbers.
        statistic, threshold: how far it is off, and how far it may be off at this rate.
        p_value: the probability that correct numbers are at least as far off, or an upper bound of
            it.
    """

    what: str
    found: float
    expected: float
    statistic: float
    threshold: float
    p_value: float

    @property
    def passed(self) -> bool:
        """Whether the statistic is within the threshold; False for NaN."""
        return self.statistic <= self.threshold

    @property
    def share(self) -> float:
        """The statistic as a share of the threshold."""
        if math.isnan(self.statistic):
            return math.inf
        if self.threshold == 0:
            return 0.0 if self.statistic == 0 else math.inf
        return self.statistic / self.threshold

    def __str__(self) -> str:
        return (
            f"{self.what} is {self.found:.6g} where {self.expected:.6g} +- {self.threshold:.3g} is allowed "
            f"(p = {self.p_value:.2g})"
        )


# --- One set of numbers -----------------------------------------------------------------------------------------------


def mean(x: np.ndarray, rate: float, *, expected: float = 0.0, std_dev: float = 1.0) -> Finding:
    """Test the mean. Exact for independent normal numbers of this standard deviation."""
    x = _flat(x)
    found, per_error = float(x.mean()), math.sqrt(len(x)) / std_dev
    off = abs(found - expected)
    return Finding("the mean", found, expected, off, _normal(rate) / per_error, _normal_p(off * per_error))


def variance(x: np.ndarray, rate: float, *, expected: float = 1.0, mean: float = 0.0) -> Finding:
    """Test the variance (chi-square). Exact for independent normal numbers of this mean."""
    x = _flat(x)
    n, found = len(x), float(np.mean(np.square(x - mean))) / expected
    half = n / 2
    high = special.gammainccinv(half, rate / 2) / half - 1
    low = 1 - special.gammaincinv(half, rate / 2) / half
    sides = special.gammainc(half, half * found), special.gammaincc(half, half * found)
    p_value = min(1.0, 2 * float(min(sides)))
    threshold = high if found > 1 else low
    return Finding(
        "the variance", found * expected, expected, expected * abs(found - 1), float(expected * threshold), p_value
    )


def skewness(x: np.ndarray, rate: float) -> Finding:
    """Test the mean of the Hermite polynomial x^3 - 3 x, 0 for standard normal numbers.

    Needs 2^15 numbers or more, see ``_moment``.
    """
    x = _flat(x)
    return _moment("the third Hermite moment (skewness)", x * (x * x - 3), 6.0, rate)


def kurtosis(x: np.ndarray, rate: float) -> Finding:
    """Test the mean of the Hermite polynomial x^4 - 6 x^2 + 3, 0 for standard normal numbers.

    Needs 2^20 numbers or more, see ``_moment``.
    """
    square = np.square(_flat(x))
    return _moment("the fourth Hermite moment (excess kurtosis)", square * (square - 6) + 3, 24.0, rate)


def _moment(what: str, terms: np.ndarray, variance_of_one: float, rate: float) -> Finding:
    """Test the mean of independent terms, at an eighth of the rate.

    The eighth makes up for the normal approximation: by Cramer's theorem, the tail at z standard
    errors is exp(skewness z^3 / 6 ...) times the normal's. The terms of the fourth moment have
    skewness 14.7, the mean of 2^20 of them 0.0144: a factor of 2.2 at z = 6.9.
    """
    found, error = float(terms.mean()), math.sqrt(variance_of_one / len(terms))
    p_value = min(1.0, 8 * _normal_p(abs(found) / error))
    return Finding(what, found, 0.0, abs(found), _normal(rate / 8) * error, p_value)


def tails(x: np.ndarray, beyond: float, rate: float) -> Finding:
    """Test how many standard normal numbers lie beyond +-``beyond``. Binomial: exact, at most the
    rate."""
    x = _flat(x)
    n, chance = len(x), 2 * float(special.ndtr(-beyond))
    count, expected = int(np.count_nonzero(np.abs(x) > beyond)), n * chance
    below = np.arange(int(expected + 40 * math.sqrt(expected) + 100))
    low = int(np.count_nonzero(special.bdtr(below, n, chance) <= rate / 2))  # the fewest allowed
    high = int(np.count_nonzero(special.bdtrc(below, n, chance) > rate / 2))  # the most allowed
    sides = special.bdtr(count, n, chance), special.bdtrc(count - 1, n, chance) if count else 1.0
    threshold = high - expected if count > expected else expected - low
    off = math.inf if not np.isfinite(x).all() else abs(count - expected)
    what = f"the count of numbers beyond {beyond:g} standard deviations"
    return Finding(what, count, expected, off, max(threshold, 0.0), min(1.0, 2 * float(min(sides))))


def kolmogorov_smirnov(x: np.ndarray, cdf: Callable[[np.ndarray], np.ndarray], rate: float) -> Finding:
    """Test the largest distance between the numbers' distribution and ``cdf``.

    The threshold is that of Dvoretzky, Kiefer and Wolfowitz with Massart's constant (1990), a bound
    for any count. The p value is the asymptotic one.
    """
    x = np.sort(_flat(x))
    n, at = len(x), cdf(x)
    steps = np.arange(n + 1) / n
    distance = float(np.max(np.maximum(steps[1:] - at, at - steps[:-1]))) if np.isfinite(x).all() else math.nan
    return _distance("the Kolmogorov-Smirnov distance", distance, n, rate)


def kolmogorov_smirnov_two(x: np.ndarray, y: np.ndarray, rate: float) -> Finding:
    """Test the largest distance between the distributions of two sets of equal size.

    The threshold is a bound for 458 numbers or more each (Wei and Dudley, 2012).
    """
    x, y = np.sort(_flat(x)), np.sort(_flat(y))
    if len(x) != len(y):
        raise ValueError(f"both sets must have the same number of values, got {len(x)} and {len(y)}")
    both = np.concatenate([x, y])
    distance = np.max(np.abs(np.searchsorted(x, both, "right") - np.searchsorted(y, both, "right"))) / len(x)
    distance = float(distance) if np.isfinite(both).all() else math.nan
    return _distance("the Kolmogorov-Smirnov distance", distance, len(x) / 2, rate)


def _distance(what: str, distance: float, n: float, rate: float) -> Finding:
    threshold = math.sqrt(math.log(2 / rate) / (2 * n))
    return Finding(what, distance, 0.0, distance, threshold, float(special.kolmogorov(math.sqrt(n) * distance)))


# --- Several sets -----------------------------------------------------------------------------------------------------


def correlation(x: np.ndarray, y: np.ndarray, rate: float) -> Finding:
    """Test the correlation of two sets of mean 0 (Student's t).

    Exact if one of them consists of independent normal numbers and is independent of the other.
    """
    x, y = _flat(x), _flat(y)
    return _correlation(float(x @ y / math.sqrt((x @ x) * (y @ y) or math.nan)), len(x), rate)


def _correlation(r: float, n: int, rate: float, what: str = "the correlation") -> Finding:
    """Test a correlation: with known means, t = r sqrt((n - 1) / (1 - r^2)) has n - 1 degrees of
    freedom."""
    freedom = n - 1
    t = math.sqrt(freedom) * abs(r) / math.sqrt(max(1 - r * r, 1e-300))
    quantile = -float(special.stdtrit(freedom, rate / 2))
    threshold = quantile / math.sqrt(freedom + quantile**2)
    return Finding(what, r, 0.0, abs(r), threshold, 2 * float(special.stdtr(freedom, -t)))


def lag(rows: np.ndarray, distance: int, rate: float) -> Finding:
    """Test the correlation of each row's numbers with those ``distance`` places later."""
    return replace(
        correlation(rows[:, :-distance], rows[:, distance:], rate), what=f"the correlation at lag {distance}"
    )


def pairs(rows: np.ndarray, rate: float) -> Finding:
    """Test the largest correlation between any two rows; exact for each pair."""
    size = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    found = (rows / size[:, None]) @ (rows / size[:, None]).T
    upper = np.triu_indices(len(rows), 1)
    r = found[upper]
    worst = int(np.argmax(np.abs(r)))  # NaN, if there is any
    i, j = (int(index[worst]) for index in upper)
    one = _correlation(float(r[worst]), rows.shape[1], rate / len(r), f"the correlation of number {i} with number {j}")
    return replace(one, p_value=min(1.0, len(r) * one.p_value))


def any_lag(x: np.ndarray, rate: float, y: np.ndarray | None = None) -> Finding:
    """Test the largest correlation of the rows ``(B, n)`` of ``x`` with themselves or with those of
    ``y``, at every lag up to n / 2.

    A sum of 2^15 products or more is treated as normal: the excess kurtosis of a product of
    normals, 6, falls to 2e-4 in the sum, which raises the probability at 8 standard errors by 3 %.
    """
    rows, n = x.shape
    x = x / math.sqrt(np.mean(np.square(x)) or math.nan)
    size = 2 ** math.ceil(math.log2(1.5 * n + 1))  # what wraps around lies beyond n / 2
    one = np.fft.rfft(x, size)
    if y is None:
        lags, other = np.arange(1, n // 2 + 1), one
    else:
        lags = np.arange(-(n // 2), n // 2 + 1)
        other = np.fft.rfft(y / math.sqrt(np.mean(np.square(y)) or math.nan), size)
    sums = np.fft.irfft(np.einsum("ij,ij->j", one.conj(), other), size)[lags]
    errors = np.sqrt(rows * (n - np.abs(lags)))
    worst = int(np.argmax(np.abs(sums) / errors))
    z = float(abs(sums[worst]) / errors[worst])
    found = float(sums[worst] / errors[worst] ** 2)
    return Finding(
        f"the correlation at lag {lags[worst]} (the largest of {len(lags)})",
        found,
        0.0,
        abs(found),
        _normal(rate / len(lags)) / errors[worst],
        min(1.0, len(lags) * _normal_p(z)),
    )


def covariance(points: np.ndarray, means: np.ndarray, covariance: np.ndarray, rate: float) -> Finding:
    """Test every entry of the covariance of normal points ``(n, d)``, whitened by its Cholesky
    factor. Exact."""
    white = np.linalg.solve(np.linalg.cholesky(np.asarray(covariance)), (points - means).T)
    d = len(white)
    tests: dict[str, Test] = {f"of whitened coordinate {i}": partial(variance, white[i]) for i in range(d)}
    if d == 1:
        return together(tests, rate)
    share = (d - 1) / (d + 1)  # the share of the entries off the diagonal
    halves = [(together(tests, rate * (1 - share)), 1 - share), (pairs(white, rate * share), share)]
    worst, part = max(halves, key=lambda half: half[0].share)
    return replace(worst, p_value=min(1.0, worst.p_value / part))


def directions(rng: np.random.Generator, count: int, d: int) -> np.ndarray:
    """Return directions of length 1, ``(count, d)``: the axes, then random ones."""
    found = rng.standard_normal((count, d))
    found[:d] = np.eye(d)[:count]
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def sliced(
    points: np.ndarray, along: np.ndarray, test: Callable[[np.ndarray, np.ndarray, float], Finding], rate: float
) -> Finding:
    """Make ``test(projected, direction, rate)`` on the points ``(n, d)`` projected to each
    direction of ``(k, d)``."""
    tests: dict[str, Test] = {
        f"along {np.array2string(one, precision=3)}": partial(test, points @ one, one) for one in along
    }
    return together(tests, rate)


def sliced_two(x: np.ndarray, y: np.ndarray, along: np.ndarray, rate: float) -> Finding:
    """Make ``kolmogorov_smirnov_two`` on the projections of both sets."""
    return sliced(x, along, lambda projected, one, r: kolmogorov_smirnov_two(projected, y @ one, r), rate)


# --- Many tests -------------------------------------------------------------------------------------------------------


def every(tests: dict[str, Test], rate: float) -> list[Finding]:
    """Make each test at its share of the rate; its name is added to what it measured."""
    found = []
    for name, test in tests.items():
        one = test(rate / len(tests))
        found.append(replace(one, what=f"{one.what} {name}".rstrip()))
    return found


def together(tests: dict[str, Test], rate: float) -> Finding:
    """Make all tests and return the worst finding. Together they fail with at most the rate."""
    worst = worst_of(every(tests, rate))
    return replace(worst, p_value=min(1.0, len(tests) * worst.p_value))


def worst_of(findings: Iterable[Finding]) -> Finding:
    """Return the finding that is furthest off, as a share of its threshold."""
    return max(findings, key=lambda one: one.share)


def _flat(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float64).reshape(-1)


def _normal(rate: float) -> float:
    """Return the number of standard errors exceeded on either side with this probability."""
    return -float(special.ndtri(rate / 2))


def _normal_p(z: float) -> float:
    return 2 * float(special.ndtr(-z))
