"""The rows of MONAI's schedulers, and the operations of their steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor

from ...kernels.contract import StepCoefficients
from ...plans.coefficients import (
    PREDICTION_TYPES,
    ddim_coefficients,
    ddpm_posterior_coefficients,
    ddpm_variance,
    forward_variance,
)
from ...plans.levels import NoiseLevel
from ..arguments import LeaveToOriginal
from ..original_results import coefficient, originals_eps, originals_x0

_MAX_KNOWN = 8192  # rows: schedulers of the same noise levels share them


def row_of(row: Callable[..., StepCoefficients], *levels_and_options: Any) -> StepCoefficients:
    """Return the row of a step, or leave a step that has none to the original."""
    try:
        return row(*levels_and_options)
    except (ValueError, ArithmeticError) as error:
        raise LeaveToOriginal(str(error)) from None


@lru_cache(_MAX_KNOWN)
def ddim_row(
    alpha_bar_t: float, alpha_bar_prev: float, prediction_type: str, clip: float | None, variance: float
) -> StepCoefficients:
    return ddim_coefficients(alpha_bar_t, alpha_bar_prev, prediction_type, variance=variance, clip_sample_range=clip)


@lru_cache(_MAX_KNOWN)
def ddpm_row(
    alpha_bar_t: float,
    alpha_bar_prev: float,
    prediction_type: str,
    clip: float | None,
    beta: float | None,
    variance_type: str,
    adds_noise: bool,
) -> StepCoefficients:
    if variance_type == "fixed_large":
        variance = forward_variance(alpha_bar_t, alpha_bar_prev) if beta is None else beta
    else:
        variance = max(ddpm_variance(alpha_bar_t, alpha_bar_prev, beta), 1e-20)  # the original's smallest
    return ddpm_posterior_coefficients(
        alpha_bar_t,
        alpha_bar_prev,
        prediction_type,
        std_dev_added=math.sqrt(variance) if adds_noise else 0.0,
        clip_sample_range=clip,
        beta=beta,
    )


@lru_cache(_MAX_KNOWN)
def flow_row(time: float, length: float) -> StepCoefficients:
    """Return the row of Euler's step of this length along x0 - eps, from a time that is 1 at noise."""
    level = NoiseLevel(1 - time, time)
    flow = PREDICTION_TYPES["flow"](level)
    target = NoiseLevel(1 - (time - length), time - length)
    return ddim_coefficients(level, target, flow._replace(x0_m=-flow.x0_m, eps_m=-flow.eps_m))


def originals_results(
    x: Tensor, m: Tensor, noise: Tensor | None, *, prediction_type: str, clip: bool, posterior: bool
) -> tuple[Tensor, Tensor]:
    """Run the operations of the originals' ``step``; return x0 and x_prev."""
    k = coefficient(x)
    predicted = originals_x0(k, x, m, prediction_type)
    x0 = predicted.clamp(-1, 1) if clip else predicted
    x_prev = k * x0 + k * (x if posterior else originals_eps(k, x, m, predicted, prediction_type, False))
    if noise is not None:
        return x0, x_prev + k * noise
    return x0, x_prev + 0 if posterior else x_prev


def originals_flow_results(x: Tensor, m: Tensor, noise: None) -> tuple[Tensor, Tensor]:
    """Run the operations of ``RFlowScheduler.step``; return x0 and x_prev."""
    return x + m * 1.0 / 1, x + m * 1.0
