"""The amount of noise that a step adds: equation 16, the two conventions of eta, and DDPM."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from ..truth import oracle, statistics
from ..truth.cases import Level, Observed, Setting, StepCase
from ..truth.tolerances import to_numpy, worst_share
from .base import CheckFailedError, Context, check
from .judge import Verdict, code_of, judge, truth, verdict
from .runs import level_of
from .update import TOLERANCE, random_step, settings_of, some_steps, with_sizes

RATE = 1e-8
"""The false-alarm rate of each statistical check here, divided among its tests."""
FEW_SIZES = ((1, 1), (2, 1, 3, 5), (2, 129))
DRAWN = (4, 2**14)
"""The shape of the noise that is measured: enough to detect a variance that is 4 % off."""


@check(
    "update-with-noise",
    proves="A step with noise is equation 12 with the std_dev_t of equation 16, for every prediction type.",
    source="equations 12 and 16 of arXiv 2010.02502",
    tolerance=TOLERANCE,
    needs="step eta given_noise",
)
def update_with_noise(context: Context) -> None:
    explain = partial(_other_convention, context)
    for eta in context.etas(float(context.rng.uniform(0.3, 1)), 1.0):
        for setting, shape in with_sizes(context, settings_of(context, eta), FEW_SIZES):
            for index in some_steps(context, setting):
                judge(context, random_step(context, setting, index, shape), explain)


def _other_convention(context: Context, case: StepCase, found: Verdict) -> str:
    """Return a hint where the case is right in the other convention of eta."""
    subject = context.subject
    other = copy.copy(subject)
    other.eta_scales = "std_dev" if subject.eta_scales == "variance" else "variance"
    level = subject.levels(case.setting)[case.index]
    right = verdict(other, case, level, case, subject.step(case.copied())).share <= 1
    return _declare(other.eta_scales) if right and case.setting.eta not in (0, 1) else ""


def _declare(eta_scales: str) -> str:
    what = {
        "variance": "the variance of the noise is scaled by eta",
        "std_dev": "the standard deviation is scaled by eta",
    }
    paper = {"variance": ", where in equation 16 the standard deviation is", "std_dev": ", as in equation 16"}
    return (
        f"This is right in the other convention: {what[eta_scales]}{paper[eta_scales]}. "
        f'If that is meant, declare it: eta_scales="{eta_scales}".'
    )


# --- The two conventions of eta ---------------------------------------------------------------------------------------


@check(
    "eta-convention",
    proves="The noise has the standard deviation of equation 16 in the declared convention: eta scales it, or its variance.",
    source="equation 16 of arXiv 2010.02502; with eta scaling the variance: eta_variance = eta**2",
    tolerance="given noise: 4 eps, and the errors of float32 coefficients; drawn noise: its variance within the chi-square bounds",
    needs="eta",
    false_alarm_rate=RATE,
)
def eta_convention(context: Context) -> None:
    settings = [
        setting
        for eta in context.etas(*((0.1, 0.25, 0.5, 0.8) if context.full else (0.25, 0.5))) or context.etas(1.0)
        for setting in context.settings(num_inference_steps=5, eta=eta)
    ]
    if context.offers("step", "given_noise"):
        for setting in settings:
            for index, level in enumerate(context.levels(setting)):
                _given_noise(context, setting, index, level)
    if context.offers("draws_noise"):
        if context.offers("step", "given_noise"):  # which has shown how much each path adds
            settings = [setting for setting in settings if setting.schedule == context.paths[0].schedule]
        steps = [one for setting in settings for one in _pure_noise(context, setting)]
        for setting, one in steps:
            _drawn_noise(context, setting.eta, one, RATE / len(steps))


def _given_noise(context: Context, setting: Setting, index: int, level: Level) -> None:
    """Check a step from x_t = 0 with a model output of 0: x_prev is the noise alone."""
    zero = torch.zeros(2, 16, dtype=torch.float32, device=context.device)
    noise = context.normal(2, 16)
    case = StepCase(setting, index, zero, zero.clone(), noise)
    result = context.step(case.copied())
    found = verdict(context.subject, case, level, case, result)
    context.measured(found.share)
    if not found.share <= 1:
        scale = to_numpy(result.x_prev) / to_numpy(noise)
        message = _wrong_std_dev(context, setting.eta, level, float(np.median(scale)), 1e-3)
        raise CheckFailedError(message, code_of(context.subject, case, found))


def _pure_noise(context: Context, setting: Setting) -> Iterator[tuple[Setting, Observed]]:
    """Yield steps that draw their noise, with a model output that means eps = 0: x_prev is the
    scaled x_t and noise, in either convention."""

    def model(level: Level, x: torch.Tensor) -> torch.Tensor:
        alpha, x0 = oracle.alpha_sigma(level.level_t).alpha, to_numpy(x)
        x0 = x0 / alpha if alpha else x0
        output = oracle.model_output(setting.prediction_type, x0, 0 * x0, level.level_t, setting.sigma_data)
        return torch.from_numpy(output).to(x)

    x_t = torch.zeros(DRAWN, dtype=torch.float32, device=context.device)
    for one in drawn_steps(context, setting, model, x_t):
        if one.level.alpha_bar_t < one.level.alpha_bar_prev < 1:  # the last step of some schedulers goes nowhere
            yield setting, one


def _drawn_noise(context: Context, eta: float, one: Observed, rate: float) -> None:
    level = one.level
    alpha_t, alpha_prev = (oracle.alpha_sigma(a).alpha for a in (level.level_t, level.level_prev))
    left = to_numpy(one.x_prev) - (alpha_prev / alpha_t if alpha_t else 0.0) * to_numpy(one.x_t)
    expected = std_dev_of(context, level, eta)
    found = statistics.variance(left / expected, rate)
    context.measured(found.share)
    if not found.passed:
        measured = math.sqrt(found.found) * expected
        raise CheckFailedError(_wrong_std_dev(context, eta, level, measured, 2 * found.threshold))


def std_dev_of(context: Context, level: Level, eta: float) -> float:
    """Return std_dev_t by equation 16, in the subject's convention."""
    return oracle.std_dev(level.level_t, level.level_prev, eta, context.subject.eta_scales)


def _wrong_std_dev(context: Context, eta: float, level: Level, measured: float, near: float) -> str:
    levels = level.level_t, level.level_prev
    expected = std_dev_of(context, level, eta)
    declared = context.subject.eta_scales
    other = "std_dev" if declared == "variance" else "variance"
    full, target = oracle.std_dev(*levels, 1.0), oracle.alpha_sigma(level.level_prev).sigma
    beta = 1 - level.alpha_bar_t / level.alpha_bar_prev
    known = {
        _declare(other): oracle.std_dev(*levels, eta, other),
        "It is the variance of equation 16: a square root is missing.": expected**2,
        "It does not depend on eta.": full,
        "No noise is added.": 0.0,
        "It is all the noise of the target: what is predicted of it must be kept in part.": target,
        "It is eta sqrt(beta_t), the larger of DDPM's two choices.": eta * math.sqrt(beta),
    }
    off = {text: abs(abs(measured) - value) for text, value in known.items() if eta not in (0, 1) or value != expected}
    fitting = sorted((text for text in off if off[text] <= near * expected), key=lambda text: off[text])
    text = (
        f'the standard deviation of the noise must be that of equation 16 (eta_scales="{declared}") at eta = {eta}, {expected:.6g}, '
        f"got {measured:.6g} = {measured / full:.4g} times that of eta = 1, in the step from t = {level.t:g}, "
        f"from {level}."
    )
    return " ".join([text, *fitting[:1]])


def drawn_steps(
    context: Context, setting: Setting, model: Callable[[Level, torch.Tensor], torch.Tensor], x_t: torch.Tensor
) -> Iterator[Observed]:
    """Yield steps that draw their own noise: each from ``x_t`` where the subject makes single
    steps, otherwise those of a run.

    Args:
        model: ``model(level, x_t)``.
    """
    if context.offers("step"):
        for index, level in enumerate(context.levels(setting)):
            output = model(level, x_t)
            case = StepCase(setting, index, x_t.clone(), output.clone(), source=context.source(len(x_t)))
            yield Observed(level, x_t, output, context.step(case).x_prev)
        return

    def called(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return model(Level(float(t.reshape(-1)[0]), math.nan, level_of(setting, t), math.nan), x)

    yield from context.observe(setting, called, x_t)


# --- DDPM -------------------------------------------------------------------------------------------------------------


@check(
    "ddpm",
    proves="At eta = 1 a step is DDPM's: it has the mean and variance of q(x_s | x_t, x0), for any two noise levels.",
    source="equations 6 and 7 of arXiv 2006.11239 with beta_t = 1 - alpha_bar_t / alpha_bar_s; arXiv 2010.02502, section 4.1; on "
    "other paths Bayes' rule",
    tolerance="given noise: 4 eps, and the errors of float32 coefficients; drawn noise: exact tests of mean, variance and correlation",
    needs="eta",
    false_alarm_rate=RATE,
)
def ddpm(context: Context) -> None:
    if context.offers("step", "given_noise"):
        for setting in _ddpm_settings(context):
            for index in some_steps(context, setting):
                _given_posterior(context, setting, index)
    if context.offers("draws_noise"):
        steps = list(_steps_of_ddpm(context))
        for one in steps:
            _drawn_posterior(context, one, RATE / len(steps))


def _ddpm_settings(context: Context) -> Iterator[Setting]:
    """Yield a setting for every prediction type, with strides and with steps of 1, where beta_t is
    the schedule's."""
    for setting in settings_of(context, eta=1.0):
        if setting.clip_sample_range is None:
            yield setting
            if context.offers("timesteps") and not context.full and setting.path is None:
                yield setting.but(num_inference_steps=setting.num_train_timesteps)
    if context.offers("levels"):
        bars = np.sort(context.rng.uniform(0.001, 0.999, 12))
        if context.paths[0].path is None and not context.paths[0].divided:
            yield context.setting(eta=1.0, alpha_bars=tuple(zip(bars[:-1].tolist(), bars[1:].tolist(), strict=True)))


def _given_posterior(context: Context, setting: Setting, index: int) -> None:
    level = context.levels(setting)[index]
    of_x0, of_x_t, variance = oracle.ddpm_posterior(level.level_t, level.level_prev)
    full = random_step(context, setting, index, (2, 3, 5))
    zero = torch.zeros_like(full.x_t)
    cases = {
        "mean": full.but(noise=zero),
        "standard deviation": full.but(x_t=zero, model_output=zero),
    }
    for what, case in cases.items():
        assert case.noise is not None  # the settings have eta = 1, and the subject takes noise
        x_t, output, z = (to_numpy(a) for a in (case.x_t, case.model_output, case.noise))
        x0, _ = oracle.split(setting.prediction_type, x_t, output, level.level_t, setting.sigma_data)
        exact = of_x0 * x0 + of_x_t * x_t + math.sqrt(variance) * z
        allowed = truth(context.subject, case, level).allowed + np.finfo(np.float32).eps * np.abs(exact) + 1e-37
        got = to_numpy(context.step(case.copied()).x_prev)
        share, i = worst_share(np.abs(got - exact), allowed)
        context.measured(share)
        if share > 1:
            found = Verdict(share, i, "x_prev", float(got[i]), float(exact[i]), float(allowed[i]))
            raise CheckFailedError(_not_ddpm(what, setting, level, found), code_of(context.subject, case, found))


def _not_ddpm(what: str, setting: Setting, level: Level, found: Verdict) -> str:
    return (
        f"the {what} at eta = 1 must be that of DDPM's q(x_s | x_t, x0) within {found.allowed:.3g}, got {found.got!r} where it is "
        f"{found.exact!r}, from {level} with "
        f"prediction_type = {setting.prediction_type}"
    )


def _steps_of_ddpm(context: Context) -> Iterator[Observed]:
    def model(level: Level, x_t: torch.Tensor) -> torch.Tensor:
        """Return the output for an x0 of about unit size that is not a multiple of x_t."""
        alpha, sigma = oracle.alpha_sigma(level.level_t)
        total = math.hypot(alpha, sigma)
        x0 = sigma / total * to_numpy(context.normal(*x_t.shape)) + alpha / total**2 * to_numpy(x_t)
        _, eps = oracle.split("sample", to_numpy(x_t), x0, level.level_t)
        base = context.paths[0]
        return torch.from_numpy(oracle.model_output(base.prediction_type, x0, eps, level.level_t, base.sigma_data)).to(
            x_t
        )

    for count in (5, 20) if context.full else (5,):
        setting = context.setting(num_inference_steps=count, eta=1.0)
        for one in drawn_steps(context, setting, model, context.start(setting, *DRAWN)):
            if one.level.alpha_bar_t < one.level.alpha_bar_prev < 1:
                yield one


def _drawn_posterior(context: Context, one: Observed, rate: float) -> None:
    level = one.level
    of_x0, of_x_t, variance = oracle.ddpm_posterior(level.level_t, level.level_prev)
    x_t = to_numpy(one.x_t)
    base = context.paths[0]
    x0, _ = oracle.split(base.prediction_type, x_t, to_numpy(one.model_output), level.level_t, base.sigma_data)
    z = (to_numpy(one.x_prev) - of_x0 * x0 - of_x_t * x_t) / math.sqrt(variance)
    tests = {
        "mean": statistics.mean(z, rate / 4),
        "variance": statistics.variance(z, rate / 4),
        "part of x_t in the mean": statistics.correlation(z, x_t, rate / 4),
        "part of x0 in the mean": statistics.correlation(z, x0, rate / 4),
    }
    for what, found in tests.items():
        context.measured(found.share)
        if not found.passed:
            raise CheckFailedError(
                f"the {what} at eta = 1 must be that of DDPM's q(x_s | x_t, x0): of (x_s - mean) / standard deviation, {found}, "
                f"in the step from t = {level.t:g} to t = {level.t_prev:g}"
            )
