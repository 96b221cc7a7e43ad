"""Half and double precision, and rounding to nearest."""

from __future__ import annotations

import numpy as np
import torch

from ..truth import oracle
from ..truth.cases import Level, Setting, StepCase
from ..truth.tolerances import SHARE_CORRECTLY_ROUNDED, assert_within, share_correctly_rounded, to_numpy
from .base import CheckFailedError, Context, check
from .judge import judge, truth
from .update import random_step, settings_of

HALF = (torch.float16, torch.bfloat16)


def _realistic(context: Context, setting: Setting, index: int, size: int, dtype: torch.dtype) -> tuple[StepCase, Level]:
    """Return a step as it occurs in a run: x_t of data and noise, and a model that predicts most of
    the noise."""
    level = context.levels(setting)[index]
    data, noise = context.normal(1, size, dtype=torch.float64, scale=0.5), context.normal(1, size, dtype=torch.float64)
    alpha, sigma = oracle.alpha_sigma(level.level_t)
    x_t = alpha * data + sigma * noise
    output = oracle.model_output(setting.prediction_type, data, noise, level.level_t, setting.sigma_data)
    output = output + context.normal(1, size, dtype=torch.float64, scale=0.3)
    return StepCase(setting, index, x_t.to(dtype), output.to(dtype)), level


@check(
    "half-precision",
    proves="In float16 and bfloat16 a step is equation 12 of the rounded inputs, as exactly as the subject claims.",
    source="equation 12 of arXiv 2010.02502; IEEE 754, section 4.3.1",
    tolerance="exact arithmetic: the correct rounding of a result that float32 may give, and of the exact result in "
    f"{SHARE_CORRECTLY_ROUNDED:.1%} of elements; otherwise 4 eps of the half-precision type of the sum of the terms' magnitudes",
    needs="step half",
)
def half_precision(context: Context) -> None:
    settings = list(settings_of(context))
    for dtype in HALF:
        for setting in settings if context.full else [settings[0], settings[-1]]:
            case = random_step(context, setting, 4, (2, 129), dtype)
            result = judge(context, case)
            if context.subject.arithmetic == "exact":
                _hold_rounding(context, case, result.x_prev)
        if context.subject.arithmetic == "exact":
            _hold_share(context, dtype)


def _hold_rounding(context: Context, case: StepCase, x_prev: torch.Tensor) -> None:
    true = truth(context.subject, case, context.levels(case.setting)[case.index])
    try:
        assert_within(x_prev, true.exact.x_prev, true.allowed, f"x_prev in {case.dtype}")
    except AssertionError as error:
        rule = "a half-precision step must be computed in float32 and rounded once"
        raise CheckFailedError(f"{rule}: {error}") from None


def _hold_share(context: Context, dtype: torch.dtype) -> None:
    case, level = _realistic(context, context.setting(), 4, 1 << (18 if context.full else 15), dtype)
    x_prev = context.step(case).x_prev
    exact = truth(context.subject, case, level).exact
    share = share_correctly_rounded(x_prev, exact.x_prev, exact.terms)
    context.measured((1 - share) / (1 - SHARE_CORRECTLY_ROUNDED))
    context.details[f"correctly rounded in {dtype}"] = share
    if not share >= SHARE_CORRECTLY_ROUNDED:
        raise CheckFailedError(
            f"{SHARE_CORRECTLY_ROUNDED:.1%} of the elements of a step in {dtype} must be the exact result, correctly rounded, "
            f"got {share:.3%}: compute in float32, with coefficients that are not rounded to {dtype}, and round once"
        )


@check(
    "float64",
    proves="In float64 a step is equation 12 to double precision.",
    source="equation 12 of arXiv 2010.02502",
    tolerance="8 eps of float64 of the sum of the terms' magnitudes",
    needs="step float64",
)
def float64(context: Context) -> None:
    for setting in settings_of(context):
        for index in (0, 4, 9):
            judge(context, random_step(context, setting, index, (3, 129), torch.float64))


# --- The bias of rounding ---------------------------------------------------------------------------------------------

BIAS, BIAS_OF_FLOAT32 = 0.01, 0.15
STANDARD_ERRORS = 6


@check(
    "unbiased-rounding",
    proves="Results are rounded to nearest: as often away from zero as towards it.",
    source="IEEE 754, section 4.3.1: roundTiesToEven is the default. Truncation is off by half a unit in the last place on average",
    tolerance=f"{STANDARD_ERRORS} standard errors of the mean, and {BIAS} units in the last place; {BIAS_OF_FLOAT32} where the "
    "arithmetic is not exact, since rounding several times has a small bias in short formats",
    needs="step",
    false_alarm_rate=1e-7,
)
def unbiased_rounding(context: Context) -> None:
    dtypes = [torch.float32] + (list(HALF) if context.offers("half") else [])
    for dtype in dtypes:
        for index in (2, 4, 8) if context.full else (4,):
            case, level = _realistic(context, context.setting(), index, 1 << 17, dtype)
            kept = case.but(x_t=case.x_t.clone())
            bias, standard_error = _bias(context, kept, level, context.step(case).x_prev)
            allowed = STANDARD_ERRORS * standard_error + (
                BIAS if context.subject.arithmetic == "exact" else BIAS_OF_FLOAT32
            )
            context.measured(abs(bias) / allowed)
            context.details[f"bias in {dtype} at step {index}"] = bias
            if not abs(bias) <= allowed:
                way = "towards zero, as by truncation" if bias < 0 else "away from zero"
                raise CheckFailedError(
                    f"the rounding errors of x_prev in {dtype} must have a mean of 0 within {allowed:.3g} units in the last place, "
                    f"got {abs(bias):.3g} {way}, at step {index} of 10"
                )


def _bias(context: Context, case: StepCase, level: Level, x_prev: torch.Tensor) -> tuple[float, float]:
    """Return the mean rounding error in units of the last place, positive away from zero, and its
    standard error.

    A coefficient that is rounded to the type of the result moves all results in proportion to its
    term. That is not a bias of rounding results, so the least-squares fit to the errors has both
    terms besides the constant.
    """
    exact = truth(context.subject, case, level).exact
    got, x, m = to_numpy(x_prev), to_numpy(case.x_t), to_numpy(case.model_output)
    # Where the terms nearly cancel, the last place of the result says nothing about their rounding.
    use = np.abs(exact.x_prev) > 0.5 * exact.long_terms
    got, exact_x, x, m = (a[use] for a in (got, exact.x_prev, x, m))
    ulp = _last_place(exact_x, case.dtype)
    error = (got - exact_x) * np.sign(exact_x) / ulp
    terms = np.stack([np.ones_like(error), x * np.sign(exact_x) / ulp, m * np.sign(exact_x) / ulp])
    if context.subject.arithmetic == "exact" and case.dtype in HALF:  # its coefficients have enough digits
        terms = terms[:1]
    scale = np.sqrt((terms**2).mean(1, keepdims=True))
    normal = np.linalg.inv(terms / scale @ (terms / scale).T)
    fit = normal @ (terms / scale) @ error
    residual = error - fit @ (terms / scale)
    return float(fit[0]), float(np.sqrt(normal[0, 0] * residual.var()))


def _last_place(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return the distance between neighbouring numbers of the type at each value."""
    exponent = np.frexp(values)[1]
    return np.ldexp(torch.finfo(dtype).eps, exponent - 1)


__all__ = ["float64", "half_precision", "unbiased_rounding"]
