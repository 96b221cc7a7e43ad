"""The statistical tests: uniform p values, thresholds at the stated rate, wrong numbers detected."""

import math
from functools import partial

import numpy as np
import pytest
from scipy import special, stats

from ddim_fast.verify.truth import statistics

RATE = 1e-8
REPEATS = 400


def normals(rng, *shape):
    return rng.standard_normal(shape)


def cov_points(rng):
    factor = np.array([[1.0, 0, 0], [0.6, 1.3, 0], [-0.2, 0.4, 0.5]])
    return normals(rng, 500, 3) @ factor.T + [1.0, 2.0, 3.0], factor @ factor.T


UNIFORM = {
    "mean": lambda rng: partial(statistics.mean, 3 + 2 * normals(rng, 50), expected=3, std_dev=2),
    "variance": lambda rng: partial(statistics.variance, 1 + 3 * normals(rng, 50), expected=9, mean=1),
    "Kolmogorov-Smirnov": lambda rng: partial(statistics.kolmogorov_smirnov, normals(rng, 4000), special.ndtr),
    "correlation": lambda rng: partial(statistics.correlation, normals(rng, 30), normals(rng, 30)),
    "correlation with what is not normal": lambda rng: partial(
        statistics.correlation, normals(rng, 30), rng.uniform(0, 1, 30)
    ),
}
"""Tests whose p values are uniform under the null; the others' are at least as large."""

CONSERVATIVE = {
    "two samples": lambda rng: partial(statistics.kolmogorov_smirnov_two, normals(rng, 600), normals(rng, 600)),
    "tails": lambda rng: partial(statistics.tails, normals(rng, 3000), 2.0),
    "sliced": lambda rng: partial(
        statistics.sliced_two, normals(rng, 500, 3), normals(rng, 500, 3), statistics.directions(rng, 8, 3)
    ),
    "covariance": lambda rng: partial(_covariance, *cov_points(rng)),
    "pairs": lambda rng: partial(statistics.pairs, normals(rng, 6, 40)),
    "any lag": lambda rng: partial(statistics.any_lag, normals(rng, 3, 400)),
    "any lag of two": lambda rng: partial(statistics.any_lag, normals(rng, 3, 400), y=normals(rng, 3, 400)),
    "lag": lambda rng: partial(statistics.lag, normals(rng, 3, 400), 3),
    "skewness": lambda rng: partial(statistics.skewness, normals(rng, 4000)),
    "kurtosis": lambda rng: partial(statistics.kurtosis, normals(rng, 4000)),
    "together": lambda rng: partial(
        statistics.together, {str(i): partial(statistics.mean, normals(rng, 9)) for i in range(5)}
    ),
}


def _covariance(points, covariance, rate):
    return statistics.covariance(points, np.array([1.0, 2.0, 3.0]), covariance, rate)


def p_values(make, repeats=REPEATS):
    rng = np.random.default_rng(12345)
    return np.array([make(rng)(RATE).p_value for _ in range(repeats)])


@pytest.mark.parametrize("name", UNIFORM)
def test_p_values_of_right_numbers_are_uniform(name):
    assert stats.kstest(p_values(UNIFORM[name]), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("name", CONSERVATIVE)
def test_p_values_of_right_numbers_are_not_smaller_than_uniform(name):
    found = p_values(CONSERVATIVE[name])
    assert (
        stats.kstest(found, "uniform", alternative="greater").pvalue > 1e-3
    )  # a distribution function above x: too small


@pytest.mark.parametrize("name", [*UNIFORM, *CONSERVATIVE])
@pytest.mark.parametrize("rate", [0.3, 0.03])
def test_the_rate_of_failures_is_the_stated_one(name, rate):
    """Not larger than stated by 4 standard errors; and not zero, where it is exact."""
    rng = np.random.default_rng(99)
    make = (UNIFORM | CONSERVATIVE)[name]
    failed = sum(not make(rng)(rate).passed for _ in range(REPEATS))
    error = math.sqrt(REPEATS * rate * (1 - rate))
    assert failed <= REPEATS * rate + 4 * error
    assert name not in UNIFORM or failed >= REPEATS * rate - 4 * error


@pytest.mark.parametrize("rate", [1e-3, 1e-8, 1e-12])
@pytest.mark.parametrize("name", [n for n in UNIFORM if n != "Kolmogorov-Smirnov"])
def test_thresholds_agree_with_p_values(name, rate):
    """A statistic at the threshold has the stated rate as its p value."""
    rng = np.random.default_rng(4)
    one = UNIFORM[name](rng)(rate)
    moved = {
        "mean": lambda: statistics.mean(np.full(50, 3 + one.threshold), rate, expected=3, std_dev=2),
        "variance": lambda: statistics.variance(
            np.full(50, math.sqrt(9 + statistics.variance(np.full(50, 9.0), rate, expected=9).threshold)),
            rate,
            expected=9,
        ),
    }.get(name)
    p = moved().p_value if moved else statistics._correlation(one.threshold, 30, rate).p_value
    assert p == pytest.approx(rate, rel=1e-6)


def test_the_tail_count_has_the_exact_bounds():
    n, beyond, rate = 100_000, 3.0, 1e-4
    chance = 2 * stats.norm.sf(beyond)
    allowed = [
        k
        for k in range(150, 400)
        if statistics.tails(np.concatenate([np.full(k, 4.0), np.zeros(n - k)]), beyond, rate).passed
    ]
    right = [
        k for k in range(150, 400) if min(stats.binom.cdf(k, n, chance), stats.binom.sf(k - 1, n, chance)) > rate / 2
    ]
    assert allowed == right


def scaled_channel(rng):
    z = normals(rng, 2**14, 4)
    z[:, 1] *= 1.1
    return z


WRONG = {
    "a mean of 0.01": lambda rng: partial(statistics.mean, normals(rng, 2**20) + 0.01),
    "a variance 1 % too large": lambda rng: partial(statistics.variance, normals(rng, 2**21) * math.sqrt(1.01)),
    "a variance 1 % too small": lambda rng: partial(statistics.variance, normals(rng, 2**21) * math.sqrt(0.99)),
    "uniform": lambda rng: partial(
        statistics.kolmogorov_smirnov, rng.uniform(-1, 1, 2**16) * math.sqrt(3), special.ndtr
    ),
    "uniform: kurtosis": lambda rng: partial(statistics.kurtosis, rng.uniform(-1, 1, 2**16) * math.sqrt(3)),
    "skewed": lambda rng: partial(statistics.skewness, (rng.exponential(size=2**16) - 1)),
    "tails cut at 3": lambda rng: partial(statistics.tails, np.clip(normals(rng, 2**20), -3, 3), 4.0),
    "heavy tails": lambda rng: partial(statistics.tails, rng.standard_t(20, 2**20), 4.0),
    "two distributions": lambda rng: partial(
        statistics.kolmogorov_smirnov_two, normals(rng, 2**15), normals(rng, 2**15) + 0.1
    ),
    "a correlation of 0.01": lambda rng: partial(_correlated, normals(rng, 2, 2**20), 0.01),
    "one pair of many": lambda rng: partial(statistics.pairs, _with_equal(normals(rng, 20, 2**10))),
    "an echo at lag 777": lambda rng: partial(statistics.any_lag, _echo(normals(rng, 4, 2**14), 777, 0.1)),
    "another's echo": lambda rng: partial(_other_echo, normals(rng, 4, 2**14)),
    "one channel 10 % wider": lambda rng: partial(
        lambda x, rate: statistics.covariance(x, np.zeros(4), np.eye(4), rate), scaled_channel(rng)
    ),
    "clusters that axes do not show": lambda rng: partial(_only_oblique, rng),
}


def _correlated(xy, r, rate):
    return statistics.correlation(xy[0], r * xy[0] + math.sqrt(1 - r * r) * xy[1], rate)


def _with_equal(rows):
    rows[17] = rows[3]
    return rows


def _echo(rows, lag, size):
    return rows + size * np.roll(rows, lag, axis=1)


def _other_echo(rows, rate):
    return statistics.any_lag(
        rows, rate, y=0.9 * normals(np.random.default_rng(0), *rows.shape) + 0.1 * np.roll(rows, 5, 1)
    )


def _only_oblique(rng, rate):
    """Normal along each axis, correlated only obliquely."""
    x = normals(rng, 2**14)
    y = np.where(np.abs(x) < 1, x, -x)
    return statistics.sliced_two(np.stack([x, y], 1), normals(rng, 2**14, 2), statistics.directions(rng, 16, 2), rate)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(name):
    found = WRONG[name](np.random.default_rng(7))(RATE)
    assert not found.passed
    assert found.share > 1
    assert found.p_value < RATE


@pytest.mark.parametrize(
    "test",
    [
        statistics.mean,
        statistics.variance,
        statistics.skewness,
        statistics.kurtosis,
        partial(statistics.tails, beyond=3.0),
        lambda x, rate: statistics.kolmogorov_smirnov(x, special.ndtr, rate),
        lambda x, rate: statistics.kolmogorov_smirnov_two(x, x[::-1], rate),
        lambda x, rate: statistics.correlation(x, x[::-1], rate),
        lambda x, rate: statistics.pairs(x.reshape(4, -1), rate),
        lambda x, rate: statistics.any_lag(x.reshape(4, -1), rate),
        lambda x, rate: statistics.covariance(x.reshape(-1, 2), np.zeros(2), np.eye(2), rate),
    ],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on NaN and infinity, which are the point
def test_what_is_not_finite_fails(test, bad):
    x = normals(np.random.default_rng(0), 4096)
    x[5] = bad
    found = test(x, rate=RATE)
    assert not found.passed
    assert found.share == math.inf


def test_equal_counts_only():
    with pytest.raises(ValueError, match="the same number of values"):
        statistics.kolmogorov_smirnov_two(np.zeros(3), np.zeros(4), 0.1)


def test_a_finding_says_what_is_allowed():
    found = statistics.mean(np.array([1.0, 3.0]), 0.05)
    assert str(found) == "the mean is 2 where 0 +- 1.39 is allowed (p = 0.0047)"
