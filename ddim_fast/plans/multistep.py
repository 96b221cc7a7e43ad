"""The multistep solvers of public code: DPM-Solver and DPM-Solver++, deterministic and SDE, and UniPC.

They integrate a polynomial through the last predictions, of x0 or of eps, in lambda = log(alpha /
sigma). What is here has the coefficients of that code, its slips included, where
``coefficients.multistep_coefficients`` has those of the derivation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..kernels.contract import StepCoefficients
from .coefficients import Prediction
from .levels import NoiseLevel

SOLVER_TYPES = ("midpoint", "heun")
"""How a step of second order weighs the difference of two predictions: half as the prediction
itself, or by the integral."""


def dpm_solver_coefficients(
    levels: Sequence[NoiseLevel],
    prediction: Prediction,
    *,
    predicts_noise: bool = False,
    stochastic: bool = False,
    solver_type: str = "midpoint",
) -> StepCoefficients:
    """Return the row of a step of DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095, algorithm 2 and
    appendix), or of DPM-Solver (arXiv 2206.00927)::

        x_prev = kept x_t + scale (w_0 D_0 + w_1 D_1 + w_2 D_2) + std_dev z

    D_0 is the prediction of this step, D_1 and D_2 its divided differences in lambda with those of
    the steps before, in lengths of this step. In the row, "x0" is the prediction: eps for
    DPM-Solver.

    The weights of third order are those of public code. It adds the second divided difference once,
    where the parabola through three predictions has it twice (``coefficients._third_order``); and
    in the SDE form w_2 has the wrong sign before its 1/2, so that it tends to -1 for short steps,
    rather than to 0.

    Args:
        levels: where the step leads, where it starts, and where the steps before it started, the
            last one first: as many as the order and one more, 2 to 4.
        prediction: what the model's output means where the step starts.
        predicts_noise: DPM-Solver, which integrates eps, rather than x0.
        stochastic: the SDE form, which replaces as much noise as a step of DDPM.
        solver_type: one of ``SOLVER_TYPES``, for a step of second order.

    Raises:
        ValueError, ArithmeticError: a coefficient is not finite: the step leads to clean data with
            an order above 1 or with DPM-Solver, starts at it, or two levels are equal.
        NotImplementedError: DPM-Solver's SDE form has no third order.
    """
    target, at_t, *_ = levels
    h = target.half_log_snr - at_t.half_log_snr
    order = len(levels) - 1
    if predicts_noise and stochastic and order == 3:
        raise NotImplementedError("the SDE form of DPM-Solver has order 1 or 2, got 3")
    sign = 1.0 if predicts_noise else -1.0
    if predicts_noise:
        z, kept, scale = h, target.alpha / at_t.alpha, -target.sigma * (2 if stochastic else 1)
        variance = math.expm1(2 * h) if stochastic else 0.0
    else:
        z = -2 * h if stochastic else -h
        kept, scale = target.sigma / at_t.sigma * (math.exp(-h) if stochastic else 1.0), target.alpha
        variance = -math.expm1(-2 * h) if stochastic else 0.0
    # The integrals of e^s, s e^s and s^2 e^s / 2 over the step, but for factors.
    newest = first = sign * math.expm1(z)
    weights = [0.0, 0.0]
    if order == 2:
        first = first / 2 if solver_type == "midpoint" else sign * (math.expm1(z) / z - 1)
        weights[0] = first * h / (at_t.half_log_snr - levels[2].half_log_snr)
    elif order == 3:
        first = sign * (math.expm1(z) / z - 1)
        second = sign * ((math.expm1(z) - z) / z**2 - 0.5) - (1.0 if stochastic else 0.0)
        r0 = (at_t.half_log_snr - levels[2].half_log_snr) / h
        r1 = (levels[2].half_log_snr - levels[3].half_log_snr) / h
        weights[0] = (first * (1 + r0 / (r0 + r1)) + second / (r0 + r1)) / r0
        weights[1] = -(first * (r0 / (r0 + r1)) + second / (r0 + r1)) / r1
    newer, older = weights  # of the differences of neighbouring predictions
    return StepCoefficients(
        *((prediction.eps_x, prediction.eps_m) if predicts_noise else (prediction.x0_x, prediction.x0_m)),
        eps_x=1.0,  # x_t takes the place of eps
        eps_m=0.0,
        eps_0=0.0,
        prev_x0=scale * (newest + newer),
        prev_eps=kept,
        prev_noise=target.sigma * math.sqrt(variance),
        prev_history=scale * (older - newer),
        prev_history_2=-scale * older,
    )


def unipc_weights(
    levels: Sequence[NoiseLevel],
    *,
    corrects: bool = False,
    predicts_noise: bool = False,
    solver_type: str = "bh2",
) -> tuple[float, list[float]]:
    """Return the weights of x_s and of the predictions in a step of UniPC (Zhao et al. 2023, arXiv
    2302.04867, algorithms 5 to 8), from level s to t::

        x_t = kept x_s + scale (e^z - 1) m_s + scale B (sum_k rho_k (m_k - m_s) / r_k)
        r_k = (lambda_k - lambda_s) / (lambda_t - lambda_s)

    The predictor sums over the predictions m_k before the step, the corrector also over the one at
    its end, with r = 1. rho solves the conditions of the order, but the predictor of order 2 and
    the corrector of order 1 take 1/2.

    Args:
        levels: where the step leads, where it starts, and where the steps before it started, the
            last one first: as many as the order and one more.
        corrects: the corrector, rather than the predictor.
        predicts_noise: the predictions are eps, rather than x0.
        solver_type: "bh1" for B = z, "bh2" for B = e^z - 1.

    Returns:
        kept, and the weights of the predictions, the newest first: of the corrector that at t.

    Raises:
        ValueError, ArithmeticError, np.linalg.LinAlgError: there are no such weights: the step
            leads to clean data with an order above 1, or two levels are equal.
    """
    target, start, *earlier = levels
    h = target.half_log_snr - start.half_log_snr
    z = h if predicts_noise else -h
    kept = target.alpha / start.alpha if predicts_noise else target.sigma / start.sigma
    scale = -target.sigma if predicts_noise else -target.alpha
    whole = math.expm1(z)
    inverse = [h / (level.half_log_snr - start.half_log_snr) for level in earlier] + [1.0] * corrects
    if not inverse:
        return kept, [scale * whole]
    b = z if solver_type == "bh1" else whole
    if len(inverse) == 1:
        rho = [0.5]
    else:
        # Conditions on the moments: sum_k rho_k r_k^(i - 1) = i! phi_(i + 1)(z) z / B.
        moments, phi = [], whole / z - 1
        for i in range(1, len(inverse) + 1):
            moments.append(math.factorial(i) * phi / b)
            phi = phi / z - 1 / math.factorial(i + 1)
        rho = np.linalg.solve([[r ** (1 - i) for r in inverse] for i in range(1, len(inverse) + 1)], moments).tolist()
    parts = [scale * b * r * i for r, i in zip(rho, inverse, strict=True)]
    if corrects:
        parts = [parts[-1], *parts[:-1]]
    of_start = scale * whole - sum(parts)
    return kept, [parts[0], of_start, *parts[1:]] if corrects else [of_start, *parts]
