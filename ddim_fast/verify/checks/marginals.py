"""The distribution of a run's samples, for data whose exact model has a closed form.

A point's coordinates are the channels: a batch ``(B, C, n)`` is B x n points of C coordinates, so
that small batches have many points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import torch
from scipy import special  # type: ignore[import-untyped]  # scipy has no types
from torch import Tensor

from ..truth import oracle, statistics
from ..truth.cases import Level, Model, Setting, StepCase
from ..truth.oracle import AnyLevel
from ..truth.statistics import Finding, Test
from ..truth.tolerances import to_numpy
from .base import CheckFailedError, Context, check
from .noise import RATE, TOLERANCE, hold
from .runs import level_of
from .update import of_kinds

ETAS = (0.0, 0.5, 1.0)


# --- Data with an exact model -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of normal distributions of diagonal covariance: weights ``(k,)``, means and
    std_devs ``(k, d)``."""

    weights: np.ndarray
    means: np.ndarray
    std_devs: np.ndarray

    def eps(self, points: np.ndarray, level: AnyLevel) -> np.ndarray:
        """Return E[eps | x_t] of points ``(n, d)`` in float64."""
        alpha, sigma = oracle.alpha_sigma(level)
        per_variance = 1 / ((alpha * self.std_devs) ** 2 + sigma**2)
        means = alpha * self.means
        log = points @ (means * per_variance).T - points**2 @ per_variance.T / 2
        log += np.log(self.weights) + np.log(per_variance).sum(1) / 2 - (means**2 * per_variance).sum(1) / 2
        share = np.exp(log - log.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        return sigma * (points * (share @ per_variance) - share @ (means * per_variance))

    def x0(self, points: np.ndarray, level: AnyLevel) -> np.ndarray:
        """Return E[x0 | x_t] of points ``(n, d)`` in float64."""
        alpha, sigma = oracle.alpha_sigma(level)
        if alpha == 0:
            return np.broadcast_to(self.weights @ self.means, points.shape)
        return (points - sigma * self.eps(points, level)) / alpha

    def cdf_along(self, direction: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Return the cumulative distribution of the points projected to a direction."""
        means, std_devs = self.means @ direction, np.sqrt(self.std_devs**2 @ direction**2)

        def cdf(x: np.ndarray) -> np.ndarray:
            return sum(w * special.ndtr((x - m) / s) for w, m, s in zip(self.weights, means, std_devs, strict=True))

        return cdf

    @property
    def dimensions(self) -> int:
        return self.means.shape[1]


@lru_cache
def mixture(dimensions: int) -> Mixture:
    """Return clusters of several sizes: always the same, because ``DISCRETISATION`` is measured on
    them."""
    rng = np.random.default_rng([2010, 2502, dimensions])
    count = 5
    means = rng.uniform(-1.5, 1.5, (count, dimensions))
    return Mixture(np.array([0.35, 0.25, 0.2, 0.12, 0.08]), means, rng.uniform(0.2, 0.6, (count, dimensions)))


def as_model(data: Mixture, setting: Setting) -> Model:
    """Return the exact model of the setting's prediction type, computed in float64 and rounded to
    the samples' dtype."""

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        level, points = level_of(setting, t), _points(x_t)
        x0, eps = data.x0(points, level), data.eps(points, level)
        return _samples(oracle.model_output(setting.prediction_type, x0, eps, level, setting.sigma_data), x_t)

    return model


# --- Runs of the subject and of the truth -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Run:
    """The clean points ``(n, d)`` of a run in float64, and its steps with the exact alpha_bar."""

    points: np.ndarray
    levels: tuple[Level, ...]


def run_of(context: Context, setting: Setting, model: Model, dimensions: int, count: int, batch: int = 16) -> Run:
    """Sample about ``count`` points from a new x_T.

    Raises:
        CheckFailedError: the samples have the wrong shape, or are not finite.
    """
    x_T = context.start(setting, batch, dimensions, -(-count // batch))
    called = []

    def watched(x_t: Tensor, t: Tensor) -> Tensor:
        called.append(float(t.reshape(-1)[0]))
        return model(x_t, t)

    x0 = _sampled(context, setting, watched, x_T)
    if x0.shape != x_T.shape:
        raise CheckFailedError(
            f"a run must give samples of the shape of x_T, {tuple(x_T.shape)}, got {tuple(x0.shape)}"
        )
    if not bool(torch.isfinite(x0).all()):
        raise CheckFailedError(f"the samples of a run must be finite, got NaN or infinity for {setting}")
    levels = true_levels(setting, context.subject.levels_seen(setting, called))
    return Run(_points(x0), levels)


def _sampled(context: Context, setting: Setting, model: Model, x_T: Tensor) -> Tensor:
    """Make a run, with noise given at each step where the subject draws none itself."""
    if setting.eta == 0 or context.offers("draws_noise"):
        return context.sample(setting, model, x_T.clone())
    x_t = x_T
    for index, level in enumerate(context.levels(setting)):
        output = setting.as_called(model)(*setting.model_input(level, x_t))
        x_t = context.step(StepCase(setting, index, x_t, output, noise=context.normal(*x_t.shape))).x_prev
    return x_t


def _points(x: Tensor) -> np.ndarray:
    found = to_numpy(x)
    return np.moveaxis(found, 1, -1).reshape(-1, found.shape[1])


def _samples(points: np.ndarray, like: Tensor) -> Tensor:
    """Return points ``(n, d)`` as a batch ``(B, d, ...)``."""
    batch, d, *rest = like.shape
    found = np.moveaxis(points.reshape(batch, *rest, d), -1, 1)
    return torch.from_numpy(np.ascontiguousarray(found)).to(like.dtype).to(like.device)


def true_levels(setting: Setting, levels: tuple[Level, ...]) -> tuple[Level, ...]:
    """Return the steps with the exact alpha_bar; that of clean data remains the subject's."""

    def exact(t: float, own: AnyLevel) -> AnyLevel:
        if t == setting.clean or setting.alpha_bars is not None:
            return own
        found = setting.level_at(t)
        return own if isinstance(found, float) and math.isnan(found) else found

    found = tuple(Level(v.t, v.t_prev, exact(v.t, v.level_t), exact(v.t_prev, v.level_prev)) for v in levels)
    # Clean data may have the noise level of timestep 0, where the subject's rounding can put it
    # below the exact one.
    return tuple(v._replace(level_prev=v.level_t) if v.alpha_bar_prev < v.alpha_bar_t else v for v in found)


def exact_run(
    data: Mixture, levels: tuple[Level, ...], count: int, setting: Setting, eta_scales: str, rng: np.random.Generator
) -> np.ndarray:
    """Sample points with these steps in float64, from a new x_T and new noise."""
    x_t = setting.start_scale(levels[0].level_t) * rng.standard_normal((count, data.dimensions))
    for level in levels:
        x_t, _ = oracle.textbook_step(
            "sample",
            x_t,
            data.x0(x_t, level.level_t),
            level.level_t,
            level.level_prev,
            eta=setting.eta,
            eta_scales=eta_scales,
            noise=rng.standard_normal(x_t.shape),
        )
    return x_t


def gaussian_after(
    data: Mixture, levels: tuple[Level, ...], setting: Setting, eta_scales: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the exact mean and standard deviation, ``(d,)`` each, after these steps from x_T.

    The exact x0 of N(mu, s^2) is linear in x_t, and so is a step: x_prev = a x_t + b + std_dev_t z.
    The mean becomes a mean + b, the variance a^2 variance + std_dev_t^2.
    """
    mu, s = data.means[0], data.std_devs[0]
    mean, variance = np.zeros_like(mu), np.full_like(mu, setting.start_scale(levels[0].level_t) ** 2)
    for level in levels:
        alpha, sigma = oracle.alpha_sigma(level.level_t)
        row = oracle.textbook_row("sample", level.level_t, level.level_prev, eta=setting.eta, eta_scales=eta_scales)
        of_x, of_x0 = oracle.fold(row)
        slope = alpha * s**2 / ((alpha * s) ** 2 + sigma**2)  # x0 = mu + slope (x_t - alpha mu)
        a, b = of_x + of_x0 * slope, of_x0 * (1 - slope * alpha) * mu
        mean, variance = a * mean + b, a**2 * variance + row["prev_noise"] ** 2
    return mean, np.sqrt(variance)


def settings_of(context: Context, steps: int) -> list[Setting]:
    """Return every eta with a prediction type each, on the first path, and each other path with an
    eta; in the full set, every eta with every prediction type."""
    first, *others = context.settings(num_inference_steps=steps)
    kinds = list(dict.fromkeys(one.prediction_type for one in of_kinds(context, first)))
    etas = context.etas(*ETAS)
    if context.full:
        every = [first.but(eta=eta, prediction_type=kind) for eta in etas for kind in kinds]
        return every + [one.but(eta=eta) for one in others for eta in etas]
    return [
        *(first.but(eta=eta, prediction_type=kinds[i % len(kinds)]) for i, eta in enumerate(etas)),
        *(one.but(eta=etas[-1 - i % len(etas)]) for i, one in enumerate(others)),
    ]


def _named(setting: Setting) -> str:
    return f"at eta = {setting.eta:g}, {setting.prediction_type}, schedule {setting.schedule}"


def _points_of(context: Context, setting: Setting, quick: int, full: int) -> int:
    """Return how many points are drawn: in the quick set, a quarter on the paths after the first."""
    return full if context.full else quick // (1 if setting.schedule == context.paths[0].schedule else 4)


# --- The checks -------------------------------------------------------------------------------------------------------


@check(
    "gaussian-marginals",
    proves="With the exact model of Gaussian data, samples have the Gaussian distribution that follows from the steps, at any eta.",
    source="equation 12 of arXiv 2010.02502 with the eps of N(mu, s^2), which is linear: a recursion of mean and variance in float64",
    tolerance=TOLERANCE,
    false_alarm_rate=RATE,
)
def gaussian_marginals(context: Context) -> None:
    tests: dict[str, Test] = {}
    for setting in settings_of(context, 20 if context.full else 5):
        d = 4
        data = Mixture(
            np.ones(1), context.rng.uniform(-1.5, 1.5, (1, d)), np.exp(context.rng.uniform(-1.5, 0.7, (1, d)))
        )
        run = run_of(context, setting, as_model(data, setting), d, _points_of(context, setting, 2**16, 2**18))
        mean, std_dev = gaussian_after(data, run.levels, setting, context.subject.eta_scales)
        white, named = (run.points - mean) / std_dev, _named(setting)
        for i in range(d):
            tests[f"of coordinate {i} (in standard deviations) {named}"] = partial(statistics.mean, white[:, i])
        tests[f"(of coordinates in standard deviations) {named}"] = partial(
            statistics.covariance, white, np.zeros(d), np.eye(d)
        )
        tests[f"of all coordinates {named}"] = partial(statistics.kolmogorov_smirnov, white, special.ndtr)
    hold(
        context,
        "samples from the exact model of N(mu, s^2) must have the mean and covariance of the exact recursion",
        tests,
    )


DISCRETISATION = {(0.0, 50): 0.018, (1.0, 50): 0.035, (0.0, 200): 0.006, (1.0, 200): 0.011}
"""By eta and steps: how far the distribution of exact runs on ``mixture(2)`` may be from that of
the data. It is the largest Kolmogorov-Smirnov distance along any of 64 directions, measured with
2^18 points or more, and a third more. The tests measure it again."""


ON_OTHER_PATHS = 1.5
"""How many times as far it may be on continuous paths (EDM's, with 50 steps at eta = 0, is 1.4)."""


def some_directions(context: Context, d: int) -> np.ndarray:
    """Return the directions along which distributions are compared."""
    return statistics.directions(context.rng, 64 if context.full else 16, d)


@check(
    "mixture-marginals",
    proves="With the exact model of a mixture of Gaussians, samples are distributed as those of float64 runs with the same steps.",
    source="equations 12 and 16 of arXiv 2010.02502; the score of a mixture of Gaussians has a closed form",
    tolerance=TOLERANCE,
    false_alarm_rate=RATE,
)
def mixture_marginals(context: Context) -> None:
    tests: dict[str, Test] = {}
    settings = settings_of(context, 20 if context.full else 5)
    first = [setting for setting in settings if setting.schedule == settings[0].schedule]
    chosen = [(settings[0], 2), (first[-1], 8), *((setting, 2) for setting in settings[len(first) :])]
    if context.full:
        chosen = [(setting, 2) for setting in settings] + [(setting, 8) for setting in settings]
    for setting, d in chosen:
        data = mixture(d)
        run = run_of(context, setting, as_model(data, setting), d, _points_of(context, setting, 2**15, 2**16))
        exact = exact_run(data, run.levels, len(run.points), setting, context.subject.eta_scales, context.rng)
        along = some_directions(context, d)
        tests[f"between {d}-D samples and those of float64, {_named(setting)},"] = partial(
            statistics.sliced_two, run.points, exact, along
        )
    hold(
        context,
        "samples from the exact model of a mixture must be distributed as those of a float64 run of the same steps",
        tests,
    )


@check(
    "data-marginals",
    proves="With many steps and the exact model of a mixture of Gaussians, samples have the distribution of the data.",
    source="section 4 and theorem 1 of arXiv 2010.02502: with the exact model and small steps, x_0 is distributed as the data",
    tolerance=TOLERANCE
    + "; and the bias of the discretisation, measured in float64 (``DISCRETISATION`` in checks/marginals.py)",
    needs="timesteps",
    any_order=True,
    false_alarm_rate=RATE,
)
def data_marginals(context: Context) -> None:
    tests: dict[str, Test] = {}
    data = mixture(2)
    for eta in context.etas(0.0, 1.0) if context.full else context.etas(0.0, 1.0)[-1:]:
        for setting in context.settings(eta=eta)[: None if context.full else 1]:
            setting = setting.but(num_inference_steps=200 if context.full else 50)
            bias = DISCRETISATION[eta, setting.steps] * (1.0 if setting.path is None else ON_OTHER_PATHS)
            run = run_of(context, setting, as_model(data, setting), 2, 2**16 if context.full else 2**14, batch=4)
            tests[f"from the data, {_named(setting)}, {setting.steps} steps,"] = partial(
                statistics.sliced, run.points, some_directions(context, 2), partial(_from_data, data, bias)
            )
    hold(context, "samples of many steps from the exact model of a mixture must be distributed as the data", tests)


def _from_data(data: Mixture, bias: float, projected: np.ndarray, direction: np.ndarray, rate: float) -> Finding:
    """Make the Kolmogorov-Smirnov test against the data, less the distance that discretisation may
    add (triangle inequality)."""
    found = statistics.kolmogorov_smirnov(projected, data.cdf_along(direction), rate)
    left = max(0.0, found.statistic - bias)
    return replace(
        found, threshold=found.threshold + bias, p_value=float(special.kolmogorov(math.sqrt(len(projected)) * left))
    )
