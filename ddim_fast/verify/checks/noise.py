"""The noise of a run: normal, independent in every respect, and determined by the seed.

It is computed from the steps of runs at eta = 1, where both conventions of eta agree: z = (x_prev -
the deterministic part) / std_dev_t in float64, by equations 12 and 16, for the steps that add
enough noise to measure in float32. The model is exact for data N(0, 1), so that all samples stay
near 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import special  # type: ignore[import-untyped]  # scipy has no types

from ..truth import oracle, statistics
from ..truth.cases import Level, Model, Observed, Setting
from ..truth.statistics import Finding, Test
from ..truth.tolerances import to_numpy
from .base import CheckFailedError, Context, check
from .runs import level_of

LARGE = 0.1
"""The smallest std_dev_t that is measured, where sigma_t is at most 1: float32 then gives z to 1e-5, far below what any test
here can detect."""
SOURCE = "equations 12 and 16 of arXiv 2010.02502: z is standard Gaussian noise, independent of x_t, with new values for each step"
TOLERANCE = "a right subject fails once in 1e8 verifications: exact or bounded tests, the rate divided among them"
RATE = 1e-8
"""The false-alarm rate of each check of noise and of distributions."""


# --- Noise from runs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class NoisyStep:
    """The noise of one step, ``(B, C, H, W)`` in float64, and the samples before it."""

    level: Level
    x_t: np.ndarray
    z: np.ndarray


def setting_of(context: Context) -> Setting:
    """Return the setting of the runs."""
    return context.setting(num_inference_steps=20 if context.full else 5, eta=1.0)


def unit_model(setting: Setting) -> Model:
    """Return the exact model of data N(0, 1): (x0, eps) = (alpha, sigma) x_t / (alpha^2 +
    sigma^2)."""

    def model(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        level = level_of(setting, t)
        alpha, sigma = oracle.alpha_sigma(level)
        x0, eps = (np.float64(part / (alpha**2 + sigma**2)) for part in (alpha, sigma))
        return float(oracle.model_output(setting.prediction_type, x0, eps, level, setting.sigma_data)) * x_t

    return model


def watch(context: Context, shape: tuple[int, ...]) -> list[Observed]:
    """Make a run from a new x_T of this shape."""
    setting = setting_of(context)
    return context.observe(setting, unit_model(setting), context.start(setting, *shape))


def noise_of(context: Context, run: list[Observed]) -> list[NoisyStep]:
    """Return the noise of each step that adds enough to measure.

    Raises:
        CheckFailedError: no step does, or the noise is not finite.
    """
    found, setting = [], setting_of(context)
    for step in run:
        levels = step.level.level_t, step.level.level_prev
        std_dev_t = oracle.std_dev(*levels, 1.0)
        if not std_dev_t >= LARGE * max(1.0, oracle.alpha_sigma(levels[0]).sigma):
            continue
        x_t, output = to_numpy(step.x_t), to_numpy(step.model_output)
        more: dict[str, Any] = {"eta": 1.0, "noise": np.zeros_like(x_t), "sigma_data": setting.sigma_data}
        mean, _ = oracle.textbook_step(setting.prediction_type, x_t, output, *levels, **more)
        z = (to_numpy(step.x_prev) - mean) / std_dev_t
        if not np.isfinite(z).all():
            raise CheckFailedError(
                f"x_prev must be finite at eta = 1, got NaN or infinity after the step from t = {step.level.t:g}"
            )
        found.append(NoisyStep(step.level, x_t, z))
    if not found:
        pairs = ", ".join(f"{s.level.t:g} -> {s.level.t_prev:g}" for s in run)
        raise CheckFailedError(f"a run at eta = 1 must have steps that add noise, got the steps {pairs}")
    return found


def noise_of_at_least(context: Context, numbers: int, channels: int = 4, side: int = 32) -> np.ndarray:
    """Return at least this many numbers of noise, ``(steps, B, C, H, W)``, for any number of steps."""
    steps = len(noise_of(context, watch(context, (1, channels, 2, 2))))
    batch = max(2, -(-numbers // (steps * channels * side * side)))
    return np.stack([step.z for step in noise_of(context, watch(context, (batch, channels, side, side)))])


def hold(context: Context, rule: str, tests: dict[str, Test], rate: float = RATE) -> None:
    """Make all tests at their shares of the rate.

    Raises:
        CheckFailedError: some fail; the message has the rule and their findings.
    """
    found = statistics.every(tests, rate)
    for one in found:
        context.measured(one.share)
    wrong = sorted((one for one in found if not one.passed), key=lambda one: -one.share)
    if wrong:
        raise CheckFailedError(f"{rule}: {_listed(wrong)}")


def _listed(wrong: list[Finding]) -> str:
    more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    return "; ".join(map(str, wrong[:4])) + more


# --- The checks -------------------------------------------------------------------------------------------------------


@check(
    "noise-normal",
    proves="The noise that a step adds is standard normal: mean, variance, distribution, tails, in every channel and step.",
    source=SOURCE,
    tolerance=TOLERANCE + "; a variance 1 % off is detected in 2^21 numbers",
    needs="eta draws_noise",
    false_alarm_rate=RATE,
)
def noise_normal(context: Context) -> None:
    z = noise_of_at_least(context, 2**24 if context.full else 2**21)
    tests: dict[str, Test] = {
        "of all noise": partial(statistics.variance, z),
        "of noise": partial(statistics.mean, z),
        "": partial(statistics.kolmogorov_smirnov, z, special.ndtr),
        "of the noise": partial(statistics.skewness, z),
        "of noise (0 for a normal)": partial(statistics.kurtosis, z),
    }
    tests |= {f"(beyond {k})": partial(statistics.tails, z, float(k)) for k in (3, 4)}
    tests |= {f"in step {i}": partial(statistics.variance, z[i]) for i in range(len(z))}
    tests |= {f"in channel {c}": partial(statistics.variance, z[:, :, c]) for c in range(z.shape[2])}
    tests |= {f"over channel {c}": partial(statistics.mean, z[:, :, c]) for c in range(z.shape[2])}
    tests |= {
        "of a sample, the most unequal": partial(_group_variances, z.transpose(1, 0, 2, 3, 4).reshape(z.shape[1], -1)),
        "at a place, the most unequal": partial(_group_variances, z.reshape(-1, math.prod(z.shape[2:])).T),
    }
    hold(context, "the noise of each step must be standard normal", tests)


def _group_variances(rows: np.ndarray, rate: float) -> Finding:
    """Test the variance of each row, and return the worst finding."""
    if rows.shape[1] < 2:
        return statistics.variance(rows, rate)
    spread = np.mean(np.square(rows), axis=1)
    extremes = {int(np.argmin(spread)), int(np.argmax(spread))}
    found = statistics.worst_of(statistics.variance(rows[i], rate / len(rows)) for i in extremes)
    return found


@check(
    "noise-within-sample",
    proves="The noise of one element is independent of all others in the same sample: near it, in its row, in another channel.",
    source=SOURCE,
    tolerance=TOLERANCE + "; a correlation of 0.01 is detected",
    needs="eta draws_noise",
    false_alarm_rate=RATE,
)
def noise_within_sample(context: Context) -> None:
    z = noise_of_at_least(context, 2**22 if context.full else 2**20)
    steps, batch, channels, side, _ = z.shape
    rows = z.reshape(steps * batch, -1)
    lags = (1, 2, 3, 4, 8, 16, side, side + 1, side - 1, 2 * side, side * side)
    tests: dict[str, Test] = {f"within a sample ({k})": partial(statistics.lag, rows, k) for k in lags}
    tests |= {f"of sizes within a sample ({k})": partial(_lag_of_sizes, rows, k) for k in lags[:6]}
    tests["within a sample"] = partial(statistics.any_lag, rows)
    for a in range(channels):
        for b in range(a):
            one, other = z[:, :, a], z[:, :, b]
            tests[f"between channels {b} and {a}"] = partial(statistics.correlation, one, other)
    tests["of the sums of samples"] = partial(_variance_of_sums, rows)
    hold(context, "the noise of a sample's elements must be independent", tests)


def _lag_of_sizes(rows: np.ndarray, distance: int, rate: float) -> Finding:
    """Test the correlation of magnitudes: an element may depend on another in size and not in sign."""
    normal = _ranked_sizes(rows)
    return statistics.lag(normal, distance, rate)


def _ranked_sizes(rows: np.ndarray) -> np.ndarray:
    """Return |z| mapped to a standard normal distribution."""
    return special.ndtri(np.clip(special.erf(np.abs(rows) / math.sqrt(2)), 1e-12, 1 - 1e-12))


def _variance_of_sums(rows: np.ndarray, rate: float) -> Finding:
    """Test the sums of n independent numbers over sqrt(n), which are standard normal: a small
    common part adds up in them."""
    sums = rows.sum(axis=1) / math.sqrt(rows.shape[1] * np.mean(np.square(rows)))
    return statistics.variance(sums, rate)


@check(
    "noise-between-samples",
    proves="Each sample of a batch has its own noise: no two samples have equal, correlated or shifted noise.",
    source=SOURCE,
    tolerance=TOLERANCE
    + "; a correlation of 0.05 of any two samples, or a common part of 0.1 % of the variance, is detected",
    needs="eta draws_noise",
    false_alarm_rate=RATE,
)
def noise_between_samples(context: Context) -> None:
    shape = (256 if context.full else 64, 4, 32, 32)
    found = noise_of(context, watch(context, shape))
    rows = np.concatenate([step.z.reshape(shape[0], -1) for step in found], axis=1)
    first = found[0].z.reshape(1, -1)
    tests: dict[str, Test] = {
        "of a batch": partial(statistics.pairs, rows),
        "of the sums over the batch": partial(_variance_of_sums, rows.T),
        "over the whole batch": partial(statistics.any_lag, first),
    }
    hold(context, "the samples of a batch must have independent noise", tests)


@check(
    "noise-between-steps",
    proves="Each step draws new noise: none is used twice, and none depends on x_T or on the samples.",
    source=SOURCE,
    tolerance=TOLERANCE + "; a correlation of 0.02 is detected",
    needs="eta draws_noise",
    false_alarm_rate=RATE,
)
def noise_between_steps(context: Context) -> None:
    run = watch(context, (128 if context.full else 32, 4, 32, 32))
    found, x_T = noise_of(context, run), to_numpy(run[0].x_t)
    found = found[:12]
    names = [f"from t = {step.level.t:g}" for step in found]
    tests: dict[str, Test] = {}
    for i, step in enumerate(found):
        tests[f"of the noise {names[i]} with x_T"] = partial(statistics.correlation, step.z, x_T)
        if i or step.level != run[0].level:
            tests[f"of the noise {names[i]} with x_t"] = partial(statistics.correlation, step.z, step.x_t)
        for j in range(i):
            both = f"of the noise {names[j]} and {names[i]}"
            tests[both] = partial(statistics.correlation, found[j].z, step.z)
    for i in range(len(found) - 1):
        before, after = found[i].z, found[i + 1].z
        whole = (1, before.size)
        tests[f"of the noise {names[i]} and {names[i + 1]} at other places"] = partial(
            statistics.any_lag, before.reshape(whole), y=after.reshape(whole)
        )
    hold(context, "the steps of a run must have independent noise", tests)


@check(
    "noise-between-seeds",
    proves="The seed determines a run: the same seed gives the same bits, another seed gives independent noise.",
    source=SOURCE,
    tolerance="for the same seed none; for another, " + TOLERANCE,
    needs="eta draws_noise",
    false_alarm_rate=RATE,
)
def noise_between_seeds(context: Context) -> None:
    shape = (16, 4, 16, 16)
    setting = setting_of(context)
    x_T, model = context.start(setting, *shape), unit_model(setting)
    seed = context.seed() >> 31  # 31 bits, which every generator takes

    def run(seed: int) -> list[Observed]:
        return context.observe(setting, model, x_T, context.source(len(x_T), seed))

    one, neighbour, far, again = run(seed), run(seed + 1), run(seed ^ 0x5A5A5A5A), run(seed)
    if wrong := [a for a, b in zip(one, again, strict=True) if not torch.equal(a.x_prev, b.x_prev)]:
        apart = (len(wrong), len(one), wrong[0].level.t)
        raise CheckFailedError(
            "two runs with the same seed must give the same bits, got different ones after {} of {} steps, first after the step "
            "from t = {:g} (the seed goes to the generator or the seeds that the subject takes; where it takes neither, to "
            "torch's global generator)".format(*apart)
        )
    context.measured(0.0)
    runs = {f"seed {seed}": one, f"seed {seed + 1}": neighbour, f"seed {seed ^ 0x5A5A5A5A}": far}
    noise = {name: np.stack([step.z for step in noise_of(context, run)]) for name, run in runs.items()}
    names = list(noise)
    tests: dict[str, Test] = {}
    for i, name in enumerate(names):
        for other in names[:i]:
            tests[f"between {other} and {name}"] = partial(statistics.correlation, noise[name], noise[other])
    hold(context, "runs with different seeds must have independent noise", tests)
