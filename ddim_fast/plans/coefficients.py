"""Compute a step's row of coefficients from noise levels: the one place where equation 12 of the
DDIM paper becomes numbers, in float64.

Nothing here knows a schedule or a timestep: a noise level is its alpha_bar. Plans and drop-ins look
their noise levels up, and call these functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from numbers import Real
from typing import NamedTuple

from ..kernels.contract import StepCoefficients


class Prediction(NamedTuple):
    """What a model's output m means at x_t: ``x0 = x0_x * x_t + x0_m * m``, ``eps = eps_x * x_t +
    eps_m * m``."""

    x0_x: float
    x0_m: float
    eps_x: float
    eps_m: float


def _epsilon(alpha_bar_t: float) -> Prediction:
    """Solve m = eps for x0 = (x_t - sqrt(1 - alpha_bar_t) m) / sqrt(alpha_bar_t): equation 9 of the
    DDIM paper."""
    if alpha_bar_t == 0:
        raise ValueError(
            "epsilon prediction needs alpha_bar_t > 0, got alpha_bar_t = 0 (zero terminal SNR): "
            "use a model with prediction_type 'v_prediction' or 'sample', or timesteps without the last one"
        )
    return Prediction(1 / math.sqrt(alpha_bar_t), -math.sqrt(1 - alpha_bar_t) / math.sqrt(alpha_bar_t), 0.0, 1.0)


def _sample(alpha_bar_t: float) -> Prediction:
    """Solve m = x0 for eps = (x_t - sqrt(alpha_bar_t) m) / sqrt(1 - alpha_bar_t). At alpha_bar_t =
    1 there is no noise."""
    return Prediction(0.0, 1.0, *_eps_of_x0(alpha_bar_t))


def _v_prediction(alpha_bar_t: float) -> Prediction:
    """Solve m = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0 (Salimans and Ho 2022, arXiv
    2202.00512) for x0 and eps."""
    signal, noise = math.sqrt(alpha_bar_t), math.sqrt(1 - alpha_bar_t)
    return Prediction(signal, -noise, noise, signal)


def _eps_of_x0(alpha_bar_t: float) -> tuple[float, float]:
    """Return (a, b) of eps = a x_t + b x0."""
    if alpha_bar_t == 1:
        return 0.0, 0.0
    return 1 / math.sqrt(1 - alpha_bar_t), -math.sqrt(alpha_bar_t) / math.sqrt(1 - alpha_bar_t)


PREDICTION_TYPES: dict[str, Callable[[float], Prediction]] = {
    "epsilon": _epsilon,
    "sample": _sample,
    "v_prediction": _v_prediction,
}
"""What the model's output m means at the noise level alpha_bar_t."""


def previous_x_prediction(alpha_bar_t: float, alpha_bar_before: float) -> Prediction:
    """Solve m = the mean of q(x_before | x_t, x0) (equation 7 of DDPM, arXiv 2006.11239) for x0,
    and eps from x0.

    Args:
        alpha_bar_before: the noise level that the model was trained to predict, one timestep before
            ``alpha_bar_t``.
    """
    alpha = alpha_bar_t / alpha_bar_before
    of_x0 = math.sqrt(alpha_bar_before) * (1 - alpha) / (1 - alpha_bar_t)
    of_x_t = math.sqrt(alpha) * (1 - alpha_bar_before) / (1 - alpha_bar_t)
    x0_x, x0_m = -of_x_t / of_x0, 1 / of_x0
    eps_x, eps_0 = _eps_of_x0(alpha_bar_t)
    return Prediction(x0_x, x0_m, eps_x + eps_0 * x0_x, eps_0 * x0_m)


ETA_SCALES = ("std_dev", "variance")
"""What eta multiplies: the standard deviation of the noise (the paper, equation 16), or its
variance (eta_variance = eta_paper^2)."""


def ddpm_variance(alpha_bar_t: float, alpha_bar_prev: float) -> float:
    """Return the variance of a step at eta = 1: (1 - alpha_bar_prev) / (1 - alpha_bar_t) beta_t,
    with beta_t = 1 - alpha_bar_t / alpha_bar_prev."""
    if alpha_bar_prev == 1:
        return 0.0
    return (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)


def ddim_variance(alpha_bar_t: float, alpha_bar_prev: float, eta: float, eta_scales: str = "std_dev") -> float:
    """Return the variance of a step, std_dev_t^2: equation 16 of the DDIM paper, or with eta
    scaling the variance."""
    return ddpm_variance(alpha_bar_t, alpha_bar_prev) * (eta**2 if eta_scales == "std_dev" else eta)


def analytic_variance(alpha_bar_t: float, alpha_bar_prev: float, variance: float, eps_residual: float) -> float:
    """Return the variance of the added noise that is optimal in Kullback-Leibler divergence:
    Analytic-DPM (Bao et al. 2022, arXiv 2201.06503, theorem 1), in the notation of this file::

        variance + (sqrt(alpha_bar_prev (1 - alpha_bar_t) / alpha_bar_t) - sqrt(1 - alpha_bar_prev -
        variance))^2 eps_residual

    The second term is the variance of x0 given x_t, as it appears in x_prev. None is added to clean
    data.

    Args:
        variance: from ``ddim_variance``, what the direction term leaves room for (the paper's
            lambda^2).
        eps_residual: E |eps - eps(x_t, t)|^2 per element: the variance of the noise in x_t that the
            model does not predict. Where its eps is the conditional mean, that is 1 - E |eps(x_t,
            t)|^2, the paper's form; this one is estimated far more precisely, and holds also where
            it is not (Bao et al. 2022, arXiv 2206.07309, equation 14).

    Raises:
        ValueError: alpha_bar_t = 0, where the model's eps says nothing about x0.
    """
    if alpha_bar_t == 0:
        raise ValueError("an analytic variance needs alpha_bar_t > 0, got alpha_bar_t = 0: leave the last timestep out")
    if alpha_bar_prev == 1:
        return 0.0
    of_x0 = math.sqrt(alpha_bar_prev * (1 - alpha_bar_t) / alpha_bar_t)
    of_x0 -= math.sqrt(max(1 - alpha_bar_prev - variance, 0.0))
    return variance + of_x0**2 * min(eps_residual, 1.0)


def check_eta(eta: object, name: str = "eta") -> None:
    """Raise ValueError unless ``eta`` is a finite number, at least 0."""
    try:
        valid = not isinstance(eta, bool) and isinstance(eta, Real) and 0 <= float(eta) < math.inf
    except OverflowError:
        valid = False
    if not valid:
        raise ValueError(f"{name} must be a finite number, 0 (deterministic) or more, got {eta!r}")


def variance_with_room(alpha_bar_t: float, alpha_bar_prev: float, eta: float, at: str = "") -> float:
    """Return ``ddim_variance``, if x_prev has room for it. (Most implementations return NaN
    otherwise.)

    Args:
        at: what to call this step in the error.

    Raises:
        ValueError: the noise would have more variance than x_prev, 1 - alpha_bar_prev.
    """
    if eta == 0:
        return 0.0
    variance, room = ddim_variance(alpha_bar_t, alpha_bar_prev, eta), 1 - alpha_bar_prev
    if variance > room * (1 + 1e-9):
        # Rounded down, so that the value named is accepted.
        most = math.floor(eta * math.sqrt(room / variance) * 1e6) / 1e6
        raise ValueError(
            f"a step cannot add more noise than its target holds: {at or f'at alpha_bar_t = {alpha_bar_t:.6g}'}, eta may be at most "
            f"{most}, got {eta}"
        )
    return variance


def ddim_coefficients(
    alpha_bar_t: float,
    alpha_bar_prev: float,
    prediction: str | Prediction = "epsilon",
    *,
    variance: float = 0.0,
    std_dev_added: float | None = None,
    clip_sample_range: float | None = None,
    use_clipped_model_output: bool = False,
) -> StepCoefficients:
    """Return the row of equation 12 of the DDIM paper, from one noise level to another.
    ``alpha_bar_prev`` may be the noisier one: then this is a step of the encoding (equation 14).

    Args:
        prediction: a key of ``PREDICTION_TYPES``, or what the model's output means.
        variance: std_dev_t^2, the variance that the direction term leaves to the noise: see
            ``ddim_variance``.
        std_dev_added: the standard deviation of the noise that is added, if it is not std_dev_t
            (sigma-hat, a temperature).
        clip_sample_range: x0 is clipped to [-range, range]; None for no clipping.
        use_clipped_model_output: derive eps again from the (clipped) x0.

    Raises:
        ValueError: there is no such prediction at this noise level, or a coefficient exceeds
            float32.
    """
    at_t = PREDICTION_TYPES[prediction](alpha_bar_t) if isinstance(prediction, str) else prediction
    eps_x, eps_m, eps_0 = at_t.eps_x, at_t.eps_m, 0.0
    if use_clipped_model_output and alpha_bar_t < 1:
        eps_m, (eps_x, eps_0) = 0.0, _eps_of_x0(alpha_bar_t)
    return StepCoefficients(
        at_t.x0_x,
        at_t.x0_m,
        eps_x,
        eps_m,
        eps_0,
        prev_x0=math.sqrt(alpha_bar_prev),
        # The largest variance leaves nothing to eps; rounding must not make that negative.
        prev_eps=math.sqrt(max(1 - alpha_bar_prev - variance, 0.0)),
        prev_noise=math.sqrt(variance) if std_dev_added is None else std_dev_added,
        clip=math.inf if clip_sample_range is None else float(clip_sample_range),
        known_x0=math.sqrt(alpha_bar_prev),
        known_noise=math.sqrt(1 - alpha_bar_prev),
    )


MAX_EXTRAPOLATION = 1.0
"""How far x0 is extrapolated at most, in multiples of the difference of the last two."""


def multistep_coefficients(
    alpha_bar_last: float,
    alpha_bar_t: float,
    alpha_bar_prev: float,
    prediction: str | Prediction = "epsilon",
    *,
    clip_sample_range: float | None = None,
    use_clipped_model_output: bool = False,
) -> StepCoefficients:
    """Return the row of a step of DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2),
    which is of second order where DDIM is of first::

        lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar))
        r      = (lambda_t - lambda_last) / (lambda_prev - lambda_t)
        D      = x0 + (x0 - x0_last) / (2 r)
        x_prev = sqrt(alpha_bar_prev) D + sqrt(1 - alpha_bar_prev) (x_t - sqrt(alpha_bar_t) D) / sqrt(1 - alpha_bar_t)

    This is the deterministic DDIM step with D for x0: x0 extrapolated in lambda to the middle of
    the step, from here and from the step before, which predicted x0_last. Since x_t =
    sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps with the row's own x0 (clipped, where it clips)
    and eps, it is the row of the DDIM step plus a multiple of x0 - x0_last.

    The paper's 1 / (2 r) is at most 1 here: where a step is more than twice as long in lambda as
    the one before, as the last ones of "leading" and "linspace" spacing are, extrapolating that far
    overshoots, and the result is worse than that of DDIM. With many steps no step is that long.

    It is the DDIM step itself where lambda_prev is infinite (alpha_bar_prev = 1; the paper's last
    step is of first order, too) and where lambda_last is (alpha_bar_last = 0), since 1 / (2 r) is 0
    there.

    Args:
        alpha_bar_last: the noise level that the step before started from, where it predicted
            x0_last.

    The other arguments are those of ``ddim_coefficients``.

    Raises:
        ValueError: the noise levels do not decrease from step to step; or as ``ddim_coefficients``.
    """
    if not 0 <= alpha_bar_last < alpha_bar_t <= alpha_bar_prev <= 1:
        raise ValueError(
            "a multistep form needs falling noise levels, alpha_bar_last < alpha_bar_t <= alpha_bar_prev, got "
            f"{alpha_bar_last}, {alpha_bar_t}, {alpha_bar_prev}: for other steps, use ddim_coefficients"
        )
    row = ddim_coefficients(
        alpha_bar_t,
        alpha_bar_prev,
        prediction,
        clip_sample_range=clip_sample_range,
        use_clipped_model_output=use_clipped_model_output,
    )
    if alpha_bar_prev == 1 or alpha_bar_last == 0:
        return row
    lambda_last, lambda_t, lambda_prev = (_lambda(a) for a in (alpha_bar_last, alpha_bar_t, alpha_bar_prev))
    of_d = math.sqrt(alpha_bar_prev) - math.sqrt(alpha_bar_t) * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t))
    extrapolation = of_d * min((lambda_prev - lambda_t) / (2 * (lambda_t - lambda_last)), MAX_EXTRAPOLATION)
    return replace(row, prev_x0=row.prev_x0 + extrapolation, prev_history=-extrapolation)


def _lambda(alpha_bar: float) -> float:
    """Return half the logarithm of the signal-to-noise ratio, for alpha_bar strictly between 0 and
    1."""
    return 0.5 * (math.log(alpha_bar) - math.log1p(-alpha_bar))


def mean_coefficients(
    alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float, eta: float = 0.0
) -> StepCoefficients:
    """Return the row of a step with a model that predicts the mean m of x, from x_t = alpha_t x +
    sigma_t z to x_s::

        x_s = alpha_s m + sigma_s sqrt(1 - tau) (x_t - alpha_t m) / sigma_t + sigma_s sqrt(tau) z
        tau = clip(eta (1 - (alpha_t sigma_s / (alpha_s sigma_t))^2), 0, 1)

    Equation 12 of the DDIM paper without its alpha^2 + sigma^2 = 1, with ``prediction_type``
    "sample" and eta scaling the variance.

    Raises:
        ValueError: ``sigma_t`` is not positive, another scale is negative, or a coefficient exceeds
            float32.
    """
    if not sigma_t > 0 or not min(alpha_t, alpha_s, sigma_s) >= 0:
        raise ValueError(
            "a step needs alpha_t, alpha_s and sigma_s of at least 0, and noise to remove, sigma_t > 0, got "
            f"alpha_t = {alpha_t}, sigma_t = {sigma_t}, alpha_s = {alpha_s}, sigma_s = {sigma_s}: change start, or the schedule"
        )
    # Towards more noise the bracket is negative, and minus infinity at alpha_s = 0: no noise is
    # added there.
    tau = 0.0 if alpha_s == 0 else eta * (1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2)
    tau = min(max(tau, 0.0), 1.0)
    return StepCoefficients(
        x0_x=0.0,
        x0_m=1.0,
        eps_x=1 / sigma_t,
        eps_m=-alpha_t / sigma_t,
        eps_0=0.0,
        prev_x0=alpha_s,
        prev_eps=sigma_s * math.sqrt(1 - tau),
        prev_noise=sigma_s * math.sqrt(tau),
    )


def noising_coefficients(alpha_bar_t: float) -> StepCoefficients:
    """Return the row of the forward process (equation 4 of the DDIM paper): x_t = sqrt(alpha_bar_t)
    x0 + sqrt(1 - alpha_bar_t) z.

    A step with this row takes x0 as ``x_t``, and also as ``model_output``, which it does not use.
    """
    return StepCoefficients(1, 0, 0, 0, 0, math.sqrt(alpha_bar_t), 0, math.sqrt(1 - alpha_bar_t))


def known_region_coefficients(alpha_bar_t: float) -> StepCoefficients:
    """Return the row of a step that leaves x_t as it is, except for a known region, put in at the
    noise level of x_t."""
    return StepCoefficients(
        1, 0, 0, 0, 0, 1, 0, 0, known_x0=math.sqrt(alpha_bar_t), known_noise=math.sqrt(1 - alpha_bar_t)
    )


def classifier_guidance_weight(alpha_bar_t: float, prediction_type: str) -> float:
    """Return the change of a model's output per unit of the classifier's gradient: the one that
    moves eps by -sqrt(1 - alpha_bar_t) at a given x_t (algorithm 2 of Dhariwal and Nichol 2021,
    arXiv 2105.05233).

    Raises:
        ValueError: alpha_bar_t = 0, where x_t is pure noise and no output moves eps.
    """
    if alpha_bar_t == 0:
        raise ValueError(
            "classifier guidance needs alpha_bar_t > 0, got alpha_bar_t = 0 (zero terminal SNR): use timesteps without the last one"
        )
    if alpha_bar_t == 1:
        return 0.0
    return -math.sqrt(1 - alpha_bar_t) / PREDICTION_TYPES[prediction_type](alpha_bar_t).eps_m


def inversion_coefficients(
    alpha_bar_t: float, alpha_bar_prev: float, prediction: str | Prediction = "epsilon"
) -> StepCoefficients:
    """Return the row of one iteration towards the x_t that a deterministic step takes to a given
    x_prev.

    Equation 12 with std_dev_t = 0, solved for x_t with the model's output held fixed::

        x_t    = signal * x_prev + (sqrt(1 - alpha_bar_t) - signal * sqrt(1 - alpha_bar_prev)) * eps
        signal = sqrt(alpha_bar_t / alpha_bar_prev)

    The output depends on x_t, so this is a fixed-point iteration: a step with this row takes the
    current guess as ``x_t``, the model's output for it, and x_prev as ``noise``.
    """
    at_t = PREDICTION_TYPES[prediction](alpha_bar_t) if isinstance(prediction, str) else prediction
    signal = math.sqrt(alpha_bar_t / alpha_bar_prev)
    of_eps = math.sqrt(1 - alpha_bar_t) - signal * math.sqrt(1 - alpha_bar_prev)
    return StepCoefficients(at_t.x0_x, at_t.x0_m, at_t.eps_x, at_t.eps_m, 0.0, 0.0, of_eps, signal)


def newton_coefficients(alpha_bar_t: float, alpha_bar_prev: float, prediction_type: str) -> StepCoefficients:
    """Return the row of one simplified Newton iteration towards the x_t that a deterministic step
    takes to a given x_prev.

    It computes x_t + (x_prev - step(x_t)) / slope from what a row of ``inversion_coefficients``
    takes. Its fixed point is where the step leads to x_prev, whatever the slope. The slope is that
    of a step for which one prediction does not depend on x_t: eps for epsilon prediction, and v for
    the others, which is safe where a model is inconsistent near pure noise. (x0 does not work: its
    slope is 0 in a step to clean data.)

    Raises:
        ValueError: the slope is 0, in a step from pure noise to clean data.
    """
    constant = "epsilon" if prediction_type == "epsilon" else "v_prediction"
    slope, _ = ddim_coefficients(alpha_bar_t, alpha_bar_prev, constant).folded
    if slope == 0:
        raise ValueError(
            f"a step from pure noise to clean data has no inverse, got a step from alpha_bar_t = {alpha_bar_t} to {alpha_bar_prev}: "
            "use more timesteps"
        )
    step = ddim_coefficients(alpha_bar_t, alpha_bar_prev, prediction_type)
    of_x_t, of_m = step.folded
    return StepCoefficients(step.x0_x, step.x0_m, 1 - of_x_t / slope, -of_m / slope, 0.0, 0.0, 1.0, 1 / slope)


def weight_at_constant_v(alpha_bar_t: float, prediction_type: str) -> float:
    """Return how a model's output changes with x_t while v = sqrt(alpha_bar_t) eps - sqrt(1 -
    alpha_bar_t) x0 stays the same."""
    at_t = PREDICTION_TYPES[prediction_type](alpha_bar_t)
    of_eps, of_x0 = math.sqrt(alpha_bar_t), -math.sqrt(1 - alpha_bar_t)
    return -(of_eps * at_t.eps_x + of_x0 * at_t.x0_x) / (of_eps * at_t.eps_m + of_x0 * at_t.x0_m)


def velocity_coefficients(alpha_bar_t: float) -> StepCoefficients:
    """Return the row of v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0 (Salimans and Ho 2022,
    arXiv 2202.00512).

    A step with this row takes x0 as ``x_t`` and eps as ``model_output``.
    """
    return StepCoefficients(0, 0, -math.sqrt(1 - alpha_bar_t), math.sqrt(alpha_bar_t), 0, 0, 1, 0)
