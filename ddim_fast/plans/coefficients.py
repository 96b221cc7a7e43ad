"""Compute a step's row of coefficients from noise levels: the one place where equation 12 of the
DDIM paper becomes numbers, in float64.

Nothing here knows a schedule or a timestep. A noise level is a pair (alpha, sigma), or a number,
the alpha_bar of a variance-preserving one: ``levels.AnyLevel``. Plans and drop-ins look their noise
levels up, and call these functions.

Equation 12 is written for alpha^2 + sigma^2 = 1. Nothing in it needs that: a step predicts x0 and
eps from x_t = alpha_t x0 + sigma_t eps, and puts them together at another level, with part of the
noise replaced by fresh noise::

    x_s = alpha_s x0 + sqrt(sigma_s^2 - variance) eps + sqrt(variance) z
    variance = eta^2 sigma_s^2 (1 - (alpha_t sigma_s / (alpha_s sigma_t))^2)

On the variance-preserving path that variance is equation 16. On any path it leaves the right
marginals, whatever eta.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from numbers import Real
from typing import NamedTuple

from ..kernels.contract import StepCoefficients
from .levels import AnyLevel, NoiseLevel, as_text, level_of


class Prediction(NamedTuple):
    """What a model's output m means at x_t: ``x0 = x0_x * x_t + x0_m * m``, ``eps = eps_x * x_t +
    eps_m * m``."""

    x0_x: float
    x0_m: float
    eps_x: float
    eps_m: float


def _epsilon(level_t: AnyLevel) -> Prediction:
    """Solve m = eps for x0 = (x_t - sigma_t m) / alpha_t: equation 9 of the DDIM paper."""
    alpha, sigma = level_of(level_t)
    if alpha == 0:
        raise ValueError(
            f"epsilon prediction needs {_positive_signal(level_t)} (zero terminal SNR): "
            "use a model with prediction_type 'v_prediction' or 'sample', or timesteps without the last one"
        )
    return Prediction(1 / alpha, -sigma / alpha, 0.0, 1.0)


def _sample(level_t: AnyLevel) -> Prediction:
    """Solve m = x0 for eps = (x_t - alpha_t m) / sigma_t. At sigma_t = 0 there is no noise."""
    return Prediction(0.0, 1.0, *_eps_of_x0(level_of(level_t)))


def _v_prediction(level_t: AnyLevel) -> Prediction:
    """Solve m = alpha_t eps - sigma_t x0 (Salimans and Ho 2022, arXiv 2202.00512) for x0 and eps.

    On a path that is not variance preserving, both are divided by alpha_t^2 + sigma_t^2.
    """
    level = level_of(level_t)
    total = 1.0 if not isinstance(level_t, NoiseLevel) else level.alpha**2 + level.sigma**2
    alpha, sigma = level.alpha / total, level.sigma / total
    return Prediction(alpha, -sigma, sigma, alpha)


def _flow(level_t: AnyLevel) -> Prediction:
    """Solve m = eps - x0, the velocity of flow matching (Lipman et al. 2022, arXiv 2210.02747; Liu
    et al. 2022, arXiv 2209.03003), for x0 = (x_t - sigma_t m) / (alpha_t + sigma_t) and eps = x0 +
    m."""
    alpha, sigma = level_of(level_t)
    total = alpha + sigma
    return Prediction(1 / total, -sigma / total, 1 / total, alpha / total)


def _score(level_t: AnyLevel) -> Prediction:
    """Solve m = -eps / sigma_t, the gradient of the log density (Song et al. 2021, arXiv
    2011.13456, equation 3)."""
    alpha, sigma = level_of(level_t)
    if alpha == 0:
        raise ValueError(
            f"score prediction needs {_positive_signal(level_t)}: use timesteps without the noisiest, or a model that predicts x0"
        )
    return Prediction(1 / alpha, sigma**2 / alpha, 0.0, -sigma)


def edm_prediction(level_t: AnyLevel, sigma_data: float) -> Prediction:
    """Solve for the network F of EDM (Karras et al. 2022, arXiv 2206.00364, equation 7): x0 =
    c_skip x + c_out F, of x = x_t / alpha_t with the noise level sigma = sigma_t / alpha_t::

        c_skip = sigma_data^2 / (sigma^2 + sigma_data^2)
        c_out  = sigma sigma_data / sqrt(sigma^2 + sigma_data^2)

    Args:
        sigma_data: the standard deviation of the clean data that the network was trained with.
    """
    alpha, sigma = level_of(level_t)
    # Multiplied by alpha_t^2, so that alpha_t = 0 is a level like any other.
    total = sigma**2 + (alpha * sigma_data) ** 2
    x0_x, x0_m = alpha * sigma_data**2 / total, sigma * sigma_data / math.sqrt(total)
    # eps = (x_t - alpha_t x0) / sigma_t, where sigma_t cancels: (1 - alpha_t x0_x) / sigma_t is
    # sigma_t / total.
    return Prediction(x0_x, x0_m, sigma / total, -alpha * sigma_data / math.sqrt(total))


SIGMA_DATA = 0.5
"""EDM's standard deviation of clean data (arXiv 2206.00364, table 1)."""


def _edm(level_t: AnyLevel) -> Prediction:
    """See ``edm_prediction``, with EDM's own sigma_data."""
    return edm_prediction(level_t, SIGMA_DATA)


def _positive_signal(level_t: AnyLevel) -> str:
    """Say that alpha must be positive, and what it is, in the caller's terms."""
    name = "alpha" if isinstance(level_t, NoiseLevel) else "alpha_bar_t"
    return f"{name} > 0, got {name} = 0"


def _eps_of_x0(level: NoiseLevel) -> tuple[float, float]:
    """Return (a, b) of eps = a x_t + b x0."""
    if level.sigma == 0:
        return 0.0, 0.0
    return 1 / level.sigma, -level.alpha / level.sigma


PREDICTION_TYPES: dict[str, Callable[[AnyLevel], Prediction]] = {
    "epsilon": _epsilon,
    "sample": _sample,
    "v_prediction": _v_prediction,
    "flow": _flow,
    "score": _score,
    "edm": _edm,
}
"""What the model's output m means at a noise level."""

DISCRETE_PREDICTIONS = ("epsilon", "sample", "v_prediction")
"""The prediction types that other libraries' schedulers of discrete timesteps know."""


def prediction_at(prediction: str | Prediction, level_t: AnyLevel) -> Prediction:
    """Return what a model's output means at a noise level, by a key of ``PREDICTION_TYPES`` or as
    it is given."""
    return PREDICTION_TYPES[prediction](level_t) if isinstance(prediction, str) else prediction


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
    eps_x, eps_0 = _eps_of_x0(level_of(alpha_bar_t))
    return Prediction(x0_x, x0_m, eps_x + eps_0 * x0_x, eps_0 * x0_m)


def ddpm_variance(level_t: AnyLevel, level_prev: AnyLevel, beta: float | None = None) -> float:
    """Return the variance of a step at eta = 1: sigma_prev^2 (1 - (alpha_t sigma_prev / (alpha_prev
    sigma_t))^2).

    On the variance-preserving path that is (1 - alpha_bar_prev) / (1 - alpha_bar_t) beta_t, with
    beta_t = 1 - alpha_bar_t / alpha_bar_prev, the variance of q(x_prev | x_t, x0). It is negative
    in a step towards more noise.

    Args:
        beta: beta_t, where it is known more exactly than as the difference of two alpha_bar in
            float32.
    """
    if beta is not None:
        return noise_variance(level_prev) / noise_variance(level_t) * beta
    if not isinstance(level_t, NoiseLevel) and not isinstance(level_prev, NoiseLevel):
        # Exact at both ends, and nearer to it where alpha_bar has digits that sigma has lost.
        if level_prev == 1:
            return 0.0
        return (1 - level_prev) / (1 - level_t) * (1 - level_t / level_prev)
    (alpha_t, sigma_t), (alpha_prev, sigma_prev) = level_of(level_t), level_of(level_prev)
    if sigma_prev == 0:
        return 0.0
    kept = alpha_t * sigma_prev / (alpha_prev * sigma_t)
    return sigma_prev**2 * ((1 - kept) * (1 + kept))


def forward_variance(level_t: AnyLevel, level_prev: AnyLevel) -> float:
    """Return the variance of q(x_t | x_prev) as a step of DDPM adds it with its larger noise,
    sigma-hat (appendix D.3 of the DDIM paper): sigma_t^2 - (alpha_t / alpha_prev)^2 sigma_prev^2.

    On the variance-preserving path that is beta_t = 1 - alpha_bar_t / alpha_bar_prev.
    """
    if not isinstance(level_t, NoiseLevel) and not isinstance(level_prev, NoiseLevel):
        return 1 - level_t / level_prev
    (alpha_t, sigma_t), (alpha_prev, sigma_prev) = level_of(level_t), level_of(level_prev)
    kept = alpha_t / alpha_prev * sigma_prev
    return (sigma_t - kept) * (sigma_t + kept)


def ddim_variance(level_t: AnyLevel, level_prev: AnyLevel, eta: float) -> float:
    """Return the variance of a step, std_dev_t^2: equation 16 of the DDIM paper. (``eta.ETA_SCALES``
    has other meanings of eta.)"""
    return ddpm_variance(level_t, level_prev) * eta**2


def analytic_variance(level_t: AnyLevel, level_prev: AnyLevel, variance: float, eps_residual: float) -> float:
    """Return the variance of the added noise that is optimal in Kullback-Leibler divergence:
    Analytic-DPM (Bao et al. 2022, arXiv 2201.06503, theorem 1), in the notation of this file::

        variance + (alpha_prev sigma_t / alpha_t - sqrt(sigma_prev^2 - variance))^2 eps_residual

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
        ValueError: alpha_t = 0, where the model's eps says nothing about x0.
    """
    (alpha_t, sigma_t), (alpha_prev, sigma_prev) = level_of(level_t), level_of(level_prev)
    if alpha_t == 0:
        raise ValueError(f"an analytic variance needs {_positive_signal(level_t)}: leave the last timestep out")
    if sigma_prev == 0:
        return 0.0
    of_x0 = alpha_prev * sigma_t / alpha_t - math.sqrt(max(sigma_prev**2 - variance, 0.0))
    return variance + of_x0**2 * min(eps_residual, 1.0)


def check_eta(eta: object, name: str = "eta") -> None:
    """Raise ValueError unless ``eta`` is a finite number, at least 0."""
    try:
        valid = not isinstance(eta, bool) and isinstance(eta, Real) and 0 <= float(eta) < math.inf
    except OverflowError:
        valid = False
    if not valid:
        raise ValueError(f"{name} must be a finite number, 0 (deterministic) or more, got {eta!r}")


def variance_with_room(level_t: AnyLevel, level_prev: AnyLevel, eta: float, at: str = "", name: str = "eta") -> float:
    """Return ``ddim_variance``, if x_prev has room for it. (Most implementations return NaN
    otherwise.)

    Args:
        at, name: what to call this step and ``eta`` in the error.

    Raises:
        ValueError: the noise would have more variance than x_prev, sigma_prev^2.
    """
    if eta == 0:
        return 0.0
    variance, room = ddim_variance(level_t, level_prev, eta), noise_variance(level_prev)
    if variance > room * (1 + 1e-9):
        # Rounded down, so that the value named is accepted.
        most = math.floor(eta * math.sqrt(room / variance) * 1e6) / 1e6
        raise ValueError(
            f"a step cannot add more noise than its target holds: {at or f'at {as_text(level_t)}'}, {name} may be "
            f"at most {most}, got {eta}"
        )
    return variance


def noise_variance(level: AnyLevel) -> float:
    """Return sigma^2, as exactly as the level says it."""
    return level.sigma**2 if isinstance(level, NoiseLevel) else 1 - level


def ddim_coefficients(
    level_t: AnyLevel,
    level_prev: AnyLevel,
    prediction: str | Prediction = "epsilon",
    *,
    variance: float = 0.0,
    prev_eps: float | None = None,
    std_dev_added: float | None = None,
    clip_sample_range: float | None = None,
    use_clipped_model_output: bool = False,
) -> StepCoefficients:
    """Return the row of equation 12 of the DDIM paper, from one noise level to another.
    ``level_prev`` may be the noisier one: then this is a step of the encoding (equation 14).

    Args:
        prediction: a key of ``PREDICTION_TYPES``, or what the model's output means.
        variance: std_dev_t^2, the variance that the direction term leaves to the noise: see
            ``ddim_variance``.
        prev_eps: the coefficient of eps, if it is not what keeps the marginals,
            sqrt(sigma_prev^2 - variance): see ``eta.StepNoise``.
        std_dev_added: the standard deviation of the noise that is added, if it is not std_dev_t
            (sigma-hat, a temperature).
        clip_sample_range: x0 is clipped to [-range, range]; None for no clipping.
        use_clipped_model_output: derive eps again from the (clipped) x0.

    Raises:
        ValueError: there is no such prediction at this noise level, or a coefficient exceeds
            float32.
    """
    at_t, target = prediction_at(prediction, level_t), level_of(level_prev)
    eps_x, eps_m, eps_0 = at_t.eps_x, at_t.eps_m, 0.0
    if use_clipped_model_output and level_of(level_t).sigma > 0:
        eps_m, (eps_x, eps_0) = 0.0, _eps_of_x0(level_of(level_t))
    if prev_eps is None:
        # The largest variance leaves nothing to eps; rounding must not make that negative.
        prev_eps = math.sqrt(max(noise_variance(level_prev) - variance, 0.0)) if variance else target.sigma
    return StepCoefficients(
        at_t.x0_x,
        at_t.x0_m,
        eps_x,
        eps_m,
        eps_0,
        prev_x0=target.alpha,
        prev_eps=prev_eps,
        prev_noise=math.sqrt(variance) if std_dev_added is None else std_dev_added,
        clip=math.inf if clip_sample_range is None else float(clip_sample_range),
        known_x0=target.alpha,
        known_noise=target.sigma,
    )


def mean_as_x0(row: StepCoefficients) -> StepCoefficients:
    """Return the row of the same step whose x0 is its mean, x_prev = x0 + prev_noise z: then
    ``x0_out`` of ``ddim_step`` receives the mean, in the step's own pass.

    Raises:
        ValueError: the row clips x0, so that the mean is not linear in x_t and the model's output.
    """
    if row.clipped:
        raise ValueError(f"the mean of a step is its x0 where nothing is clipped, got clip = {row.clip}")
    of_x_t, of_output = row.folded
    return replace(row, x0_x=of_x_t, x0_m=of_output, eps_x=0.0, eps_m=0.0, eps_0=0.0, prev_x0=1.0, prev_eps=0.0)


def ddpm_posterior_coefficients(
    level_t: AnyLevel,
    level_prev: AnyLevel,
    prediction: str | Prediction = "epsilon",
    *,
    std_dev_added: float,
    clip_sample_range: float | None = None,
    beta: float | None = None,
) -> StepCoefficients:
    """Return the row of the mean of q(x_prev | x_t, x0) (equation 7 of DDPM, arXiv 2006.11239), with
    noise added to it::

        x_prev = alpha_prev (1 - r^2) x0 + r (sigma_prev / sigma_t) x_t + std_dev_added z
        r      = alpha_t sigma_prev / (alpha_prev sigma_t)

    The row of ``ddim_coefficients`` at eta = 1, but for a clipped x0: the mean then follows from
    the clipped one alone.

    Args:
        beta: 1 - (alpha_t / alpha_prev)^2, as of ``ddpm_variance``.

    Raises:
        ValueError, ZeroDivisionError: there is no such step, or no such prediction.
    """
    at_t = prediction_at(prediction, level_t)
    (alpha_t, sigma_t), (alpha_prev, sigma_prev) = level_of(level_t), level_of(level_prev)
    kept = alpha_t * sigma_prev / (alpha_prev * sigma_t)
    replaced = (1 - kept) * (1 + kept)
    if beta is not None:
        kept, replaced = math.sqrt(1 - beta) * (sigma_prev / sigma_t), beta / noise_variance(level_t)
    return StepCoefficients(
        at_t.x0_x,
        at_t.x0_m,
        eps_x=1.0,  # x_t takes the place of eps
        eps_m=0.0,
        eps_0=0.0,
        prev_x0=alpha_prev * replaced,
        prev_eps=kept * (sigma_prev / sigma_t),
        prev_noise=std_dev_added,
        clip=math.inf if clip_sample_range is None else float(clip_sample_range),
    )


MAX_EXTRAPOLATION = 1.0
"""How far x0 is extrapolated at most, in multiples of the difference of the last two."""


def multistep_coefficients(
    level_last: AnyLevel,
    level_t: AnyLevel,
    level_prev: AnyLevel,
    prediction: str | Prediction = "epsilon",
    *,
    clip_sample_range: float | None = None,
    variance: float = 0.0,
    level_before_last: AnyLevel | None = None,
    use_clipped_model_output: bool = False,
    max_extrapolation: float = MAX_EXTRAPOLATION,
) -> StepCoefficients:
    """Return the row of a step of DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2),
    which is of second order where DDIM is of first::

        lambda = log(alpha / sigma)
        r      = (lambda_t - lambda_last) / (lambda_prev - lambda_t)
        D      = x0 + (x0 - x0_last) / (2 r)
        x_prev = alpha_prev D + sqrt(sigma_prev^2 - variance) (x_t - alpha_t D) / sigma_t + sqrt(variance) z

    This is the DDIM step with D for x0, and with the variance of eta = 1 it is the paper's SDE form
    (SDE-DPM-Solver++(2M)): x0 extrapolated in lambda to the middle of
    the step, from here and from the step before, which predicted x0_last. Since x_t = alpha_t x0 +
    sigma_t eps with the row's own x0 (clipped, where it clips) and eps, it is the row of the DDIM
    step plus a multiple of x0 - x0_last.

    The paper's 1 / (2 r) is at most 1 here: where a step is more than twice as long in lambda as
    the one before, as the last ones of "leading" and "linspace" spacing are, extrapolating that far
    overshoots, and the result is worse than that of DDIM. With many steps no step is that long.

    It is the DDIM step itself where lambda_prev is infinite (clean data; the paper's last step is
    of first order, too) and where lambda_last is (pure noise), since 1 / (2 r) is 0 there.

    Args:
        level_last: the noise level that the step before started from, where it predicted x0_last.
        variance: of the noise that the step adds: see ``ddim_variance``.
        level_before_last: the level of the step before that one, for a row of third order,
            which reads the x0 of both. The row is of second order where lengths
            of neighbouring steps differ by more than a factor of 2, in noise, or from pure noise.
        max_extrapolation: the most that 1 / (2 r) may be; infinity for the paper's step.

    The other arguments are those of ``ddim_coefficients``.

    Raises:
        ValueError: the noise levels do not decrease from step to step; or as ``ddim_coefficients``.
    """
    last, at_t, target = level_of(level_last), level_of(level_t), level_of(level_prev)
    if not last.is_noisier_than(at_t) or target.is_noisier_than(at_t):
        raise ValueError(
            "a multistep form needs falling noise levels, level_last above level_t and level_t not below level_prev, got "
            f"{as_text(level_last)}; {as_text(level_t)}; {as_text(level_prev)}: for other steps, use ddim_coefficients"
        )
    row = ddim_coefficients(
        level_t,
        level_prev,
        prediction,
        variance=variance,
        clip_sample_range=clip_sample_range,
        use_clipped_model_output=use_clipped_model_output,
    )
    if target.sigma == 0 or last.alpha == 0:
        return row
    lambda_last, lambda_t, lambda_prev = (_half_log_snr(a) for a in (level_last, level_t, level_prev))
    of_d = target.alpha - at_t.alpha * (row.prev_eps / at_t.sigma)
    h, h_last = lambda_prev - lambda_t, lambda_t - lambda_last
    extrapolation = of_d * min(h / (2 * h_last), max_extrapolation)
    second = replace(row, prev_x0=row.prev_x0 + extrapolation, prev_history=-extrapolation)
    if level_before_last is None or variance:
        return second
    h_before = lambda_last - _half_log_snr(level_before_last)
    if h_before <= 0:
        raise ValueError(
            "a multistep form needs falling noise levels, level_before_last above level_last, got "
            f"{as_text(level_before_last)}; {as_text(level_last)}: leave it out for a step of order 2"
        )
    if not math.isfinite(h_before) or h > 2 * h_last or h_last > 2 * h_before:
        return second
    return _third_order(row, target.alpha, h, h_last, h_before)


def _third_order(
    row: StepCoefficients, alpha_prev: float, h: float, h_last: float, h_before: float
) -> StepCoefficients:
    """Return a deterministic DDIM row with x0 along the parabola through the last three predictions,
    integrated over the step (arXiv 2211.01095; lengths of steps in lambda)::

        alpha_prev integral_0^h e^(s - h) (x0 + a s / h + b (s / h)^2) ds
            = alpha_prev ((1 - e^-h) x0 + phi_2 a - 2 phi_3 b)

    Public code of DPM-Solver++(3M) has phi_3 b where this has 2 phi_3 b: it takes the divided
    difference b for the second derivative, and so converges with order 2.
    """
    r0, r1 = h_last / h, h_before / h
    # phi_1 = e^-h - 1, phi_2 = phi_1 / h + 1, phi_3 = phi_2 / h - 1/2; by their series where h is small.
    phi_2 = math.expm1(-h) / h + 1 if h > 1e-2 else h / 2 * (1 - h / 3 * (1 - h / 4 * (1 - h / 5 * (1 - h / 6))))
    phi_3 = phi_2 / h - 0.5 if h > 1e-2 else -h / 6 * (1 - h / 4 * (1 - h / 5 * (1 - h / 6 * (1 - h / 7))))
    # By divided differences: b = ((x0 - x0_last) / r0 - (x0_last - x0_before) / r1) / (r0 + r1), a = (x0 - x0_last) / r0 + r0 b.
    first, second = alpha_prev * phi_2, -2 * alpha_prev * phi_3
    newer = (first * (1 + r0 / (r0 + r1)) + second / (r0 + r1)) / r0  # of x0 - x0_last
    older = -(first * (r0 / (r0 + r1)) + second / (r0 + r1)) / r1  # of x0_last - x0_before
    return replace(row, prev_x0=row.prev_x0 + newer, prev_history=older - newer, prev_history_2=-older)


def history_coefficients(row: StepCoefficients, of_last: float, of_last_2: float = 0.0) -> StepCoefficients:
    """Return the row of a DDIM step with weights of its own for the x0 of the two steps before::

        x_prev = (prev_x0 - h_1 - h_2) x0 + prev_eps eps + h_1 x0_last + h_2 x0_last_2

    The textbook's multistep rows are of this form (``multistep_coefficients``). All rows with these
    terms are that are exact where x0 and eps stay the same along a trajectory: x_prev = alpha_prev
    x0 + sigma_prev eps takes the weight sigma_prev of eps, and weights of x0 that add up to
    alpha_prev. So data that is one point, the Gaussian of no spread, is sampled exactly whatever
    h_1 and h_2 are; and with weights that shrink with the steps, the error of a step is of second
    order, and that of a run of first: the solver converges.

    Args:
        row: of a deterministic step.
        of_last, of_last_2: h_1 and h_2.

    Raises:
        ValueError: a coefficient exceeds float32.
    """
    return replace(row, prev_x0=row.prev_x0 - of_last - of_last_2, prev_history=of_last, prev_history_2=of_last_2)


def _half_log_snr(level: AnyLevel) -> float:
    """Return half the logarithm of the signal-to-noise ratio, as exactly as the level says it."""
    return level.half_log_snr if isinstance(level, NoiseLevel) else 0.5 * (math.log(level) - math.log1p(-level))


def mean_coefficients(
    alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float, eta: float = 0.0
) -> StepCoefficients:
    """Return the row of a step with a model that predicts the mean m of x, from x_t = alpha_t x +
    sigma_t z to x_s::

        x_s = alpha_s m + sigma_s sqrt(1 - tau) (x_t - alpha_t m) / sigma_t + sigma_s sqrt(tau) z
        tau = clip(eta (1 - (alpha_t sigma_s / (alpha_s sigma_t))^2), 0, 1)

    ``ddim_coefficients`` with ``prediction_type`` "sample" and eta scaling the variance, which is
    clipped.

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
    row = ddim_coefficients(NoiseLevel(alpha_t, sigma_t), NoiseLevel(alpha_s, sigma_s), "sample")
    return replace(row, prev_eps=sigma_s * math.sqrt(1 - tau), prev_noise=sigma_s * math.sqrt(tau))


def consistency_coefficients(
    level_t: AnyLevel,
    prediction: str | Prediction = "epsilon",
    *,
    c_skip: float,
    c_out: float,
    clip_sample_range: float | None = None,
) -> StepCoefficients:
    """Return the row of a consistency function (Song et al. 2023, arXiv 2303.01469, equation 5),
    from a noise level to clean data::

        x_prev = c_skip x_t + c_out x0

    Raises:
        ValueError: there is no such prediction at this noise level, or a coefficient exceeds
            float32.
    """
    at_t = prediction_at(prediction, level_t)
    return StepCoefficients(
        at_t.x0_x,
        at_t.x0_m,
        eps_x=1.0,  # x_t takes the place of eps
        eps_m=0.0,
        eps_0=0.0,
        prev_x0=c_out,
        prev_eps=c_skip,
        prev_noise=0.0,
        clip=math.inf if clip_sample_range is None else float(clip_sample_range),
    )


def renoised_coefficients(row: StepCoefficients, level: AnyLevel, level_prev: AnyLevel) -> StepCoefficients:
    """Return the row of a step to ``level`` by ``row``, and from there by the forward process to
    the noisier ``level_prev``. What it reports as x0 is the sample at ``level``::

        x_prev = alpha_prev / alpha x + sqrt(sigma_prev^2 - (alpha_prev / alpha)^2 sigma^2) z

    Multistep consistency sampling (arXiv 2303.01469, algorithm 1) with the row of a consistency
    function, and strategic stochastic sampling (Zheng et al. 2024, arXiv 2402.19159, algorithm 4)
    with that of a DDIM step.

    Args:
        row: of a step that clips nothing, and adds no noise.

    Raises:
        ValueError: ``row`` clips x0, ``level_prev`` is the cleaner level, or a coefficient exceeds
            float32.
    """
    if row.clipped:
        raise ValueError(f"row must not clip x0, got clip = {row.clip}: add the noise in a step of its own")
    variance = forward_variance(level_prev, level)
    if variance < 0:
        raise ValueError(
            f"level_prev must not be cleaner than level, {as_text(level)}, got {as_text(level_prev)}: exchange them"
        )
    x0_x, x0_m = row.folded
    kept = level_of(level_prev).alpha / level_of(level).alpha
    return StepCoefficients(
        x0_x, x0_m, eps_x=0.0, eps_m=0.0, eps_0=0.0, prev_x0=kept, prev_eps=0.0, prev_noise=math.sqrt(variance)
    )


def noising_coefficients(level_t: AnyLevel) -> StepCoefficients:
    """Return the row of the forward process (equation 4 of the DDIM paper): x_t = alpha_t x0 +
    sigma_t z.

    A step with this row takes x0 as ``x_t``, and also as ``model_output``, which it does not use.
    """
    alpha, sigma = level_of(level_t)
    return StepCoefficients(1, 0, 0, 0, 0, alpha, 0, sigma)


def known_region_coefficients(level_t: AnyLevel) -> StepCoefficients:
    """Return the row of a step that leaves x_t as it is, except for a known region, put in at the
    noise level of x_t."""
    alpha, sigma = level_of(level_t)
    return StepCoefficients(1, 0, 0, 0, 0, 1, 0, 0, known_x0=alpha, known_noise=sigma)


def classifier_guidance_weight(level_t: AnyLevel, prediction: str | Prediction) -> float:
    """Return the change of a model's output per unit of the classifier's gradient: the one that
    moves eps by -sigma_t at a given x_t (algorithm 2 of Dhariwal and Nichol 2021, arXiv
    2105.05233).

    Raises:
        ValueError: alpha_t = 0, where x_t is pure noise and no output moves eps.
    """
    alpha, sigma = level_of(level_t)
    if alpha == 0:
        raise ValueError(
            f"classifier guidance needs {_positive_signal(level_t)} (zero terminal SNR): use timesteps without the last one"
        )
    return -sigma / prediction_at(prediction, level_t).eps_m if sigma else 0.0


def inversion_coefficients(
    level_t: AnyLevel, level_prev: AnyLevel, prediction: str | Prediction = "epsilon"
) -> StepCoefficients:
    """Return the row of one iteration towards the x_t that a deterministic step takes to a given
    x_prev.

    Equation 12 with std_dev_t = 0, solved for x_t with the model's output held fixed::

        x_t    = signal * x_prev + (sigma_t - signal * sigma_prev) * eps
        signal = alpha_t / alpha_prev

    The output depends on x_t, so this is a fixed-point iteration: a step with this row takes the
    current guess as ``x_t``, the model's output for it, and x_prev as ``noise``.
    """
    at_t = prediction_at(prediction, level_t)
    (alpha_t, sigma_t), (alpha_prev, sigma_prev) = level_of(level_t), level_of(level_prev)
    signal = alpha_t / alpha_prev
    of_eps = sigma_t - signal * sigma_prev
    return StepCoefficients(at_t.x0_x, at_t.x0_m, at_t.eps_x, at_t.eps_m, 0.0, 0.0, of_eps, signal)


_HELD_CONSTANT = {"epsilon": "epsilon", "score": "epsilon", "flow": "flow"}
"""The prediction that ``newton_coefficients`` takes as independent of x_t, where it is not v."""


def newton_coefficients(
    level_t: AnyLevel, level_prev: AnyLevel, prediction_type: str, prediction: Prediction | None = None
) -> StepCoefficients:
    """Return the row of one simplified Newton iteration towards the x_t that a deterministic step
    takes to a given x_prev.

    It computes x_t + (x_prev - step(x_t)) / slope from what a row of ``inversion_coefficients``
    takes. Its fixed point is where the step leads to x_prev, whatever the slope. The slope is that
    of a step for which one prediction does not depend on x_t: eps for epsilon prediction, the
    velocity for flow matching, and v for the others, which is safe where a model is inconsistent
    near pure noise. (x0 does not work: its slope is 0 in a step to clean data.)

    Args:
        prediction: what the model's output means, where its type alone does not say.

    Raises:
        ValueError: the slope is 0, in a step from pure noise to clean data.
    """
    constant = _HELD_CONSTANT.get(prediction_type, "v_prediction")
    slope, _ = ddim_coefficients(level_t, level_prev, constant).folded
    if slope == 0:
        raise ValueError(
            f"a step from pure noise to clean data has no inverse, got a step from {as_text(level_t)} to {as_text(level_prev)}: "
            "use more timesteps"
        )
    step = ddim_coefficients(level_t, level_prev, prediction_type if prediction is None else prediction)
    of_x_t, of_m = step.folded
    return StepCoefficients(step.x0_x, step.x0_m, 1 - of_x_t / slope, -of_m / slope, 0.0, 0.0, 1.0, 1 / slope)


def weight_at_constant_v(level_t: AnyLevel, prediction: str | Prediction) -> float:
    """Return how a model's output changes with x_t while v = alpha_t eps - sigma_t x0 stays the
    same."""
    at_t = prediction_at(prediction, level_t)
    alpha, sigma = level_of(level_t)
    return -(alpha * at_t.eps_x - sigma * at_t.x0_x) / (alpha * at_t.eps_m - sigma * at_t.x0_m)


def velocity_coefficients(level_t: AnyLevel) -> StepCoefficients:
    """Return the row of v = alpha_t eps - sigma_t x0 (Salimans and Ho 2022, arXiv 2202.00512).

    A step with this row takes x0 as ``x_t`` and eps as ``model_output``.
    """
    alpha, sigma = level_of(level_t)
    return StepCoefficients(0, 0, -sigma, alpha, 0, 0, 1, 0)
