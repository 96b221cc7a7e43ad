"""The samplers of the original DDIM repository with the update in one kernel.

Replaces ``functions/denoising.py`` of ermongroup/ddim. This is the whole change::

    from ddim_fast.integrations.original_ddim import generalized_steps, ddpm_steps
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..kernels.contract import StepCoefficients
from ..plans.coefficients import check_eta, ddim_coefficients, ddpm_variance, variance_with_room
from ..utils.checks import as_index, check_callable, check_samples, refuse
from .original_results import kinds_of_results, per_sample_coefficient, step_with_x0
from .outputs import check_output

Model = Callable[[Tensor, Tensor], Tensor]
"""``model(x, t)`` predicts the noise, like x ``(B, C, ...)``, at timesteps t ``(B,)`` float32."""


def compute_alpha(beta: Tensor, t: Tensor) -> Tensor:
    """Compute alpha_bar of timesteps: the product of 1 - beta up to t, and 1 where t = -1.

    Args:
        beta: ``(T,)``.
        t: ``(B,)`` int64, -1 to T - 1.

    Returns:
        ``(B, 1, 1, 1)`` on the device of ``beta``, in its dtype or torch's default, whichever is
        wider, float32 at least; the product is computed in float64.
    """
    _check_betas("beta", beta)
    if not isinstance(t, Tensor) or t.dtype not in (torch.int64, torch.int32) or t.ndim != 1 or t.device != beta.device:
        refuse(f"t must be an int64 tensor (B,) on the device of beta, {beta.device}", t, kind=TypeError)
    alpha_bars = torch.tensor(_alpha_bars(beta), dtype=_levels_dtype(beta), device=beta.device)
    return alpha_bars.index_select(0, t + 1).view(-1, 1, 1, 1)


@torch.no_grad()
def generalized_steps(
    x: Tensor, seq: Sequence[int], model: Model, b: Tensor, *, eta: float = 0.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Sample by DDIM (equations 12 and 16 of arXiv 2010.02502).

    Args:
        x: x_T ``(B, C, ...)``. Steps run on its device, in the widest dtype of x,
            ``b``, float32 and torch's default.
        seq: timesteps to visit, increasing, for instance ``range(0, 1000, 20)``.
        model: see ``Model``.
        b: ``(T,)`` betas, on any device.
        eta: 0 is deterministic, 1 adds as much noise as DDPM.

    Returns:
        ``xs``: x_T as given, then each x_prev; ``x0_preds``: the x0 predicted in each step. All but
            x_T are moved to the CPU.

    Raises:
        TypeError, ValueError: an argument is wrong; the model has not been called.
    """

    def row(t: int, alpha_bar_t: float, alpha_bar_next: float) -> StepCoefficients:
        return ddim_coefficients(
            alpha_bar_t, alpha_bar_next, variance=variance_with_room(alpha_bar_t, alpha_bar_next, eta)
        )

    _check_start(x, model, b)
    check_eta(eta)
    # The original draws noise like x_T in every step, even where x_t has another dtype.
    return _sample(x, _steps(seq, b, row), model, _levels_dtype(b), _ddim_results, lambda x_t: torch.randn_like(x))


@torch.no_grad()
def ddpm_steps(x: Tensor, seq: Sequence[int], model: Model, b: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Sample by DDPM between the timesteps of ``seq``, with the larger variance, beta_t.

    x0 is clipped to [-1, 1]. The posterior mean (equation 7 of arXiv 2006.11239) is that of a DDIM
    step with eta = 1 and ``use_clipped_model_output``. beta_t is 1 - alpha_bar_t / alpha_bar_prev;
    the step from t = 0 adds no noise.

    The arguments, results and errors are those of ``generalized_steps``.
    """

    def row(t: int, alpha_bar_t: float, alpha_bar_prev: float) -> StepCoefficients:
        return ddim_coefficients(
            alpha_bar_t,
            alpha_bar_prev,
            variance=ddpm_variance(alpha_bar_t, alpha_bar_prev),
            std_dev_added=math.sqrt(1 - alpha_bar_t / alpha_bar_prev) if t != 0 else 0.0,
            clip_sample_range=1.0,
            use_clipped_model_output=True,
        )

    _check_start(x, model, b)
    return _sample(x, _steps(seq, b, row), model, _levels_dtype(b), _ddpm_results, torch.randn_like)


def _ddim_results(x: Tensor, m: Tensor, noise: Tensor, *, levels: torch.dtype) -> tuple[Tensor, Tensor]:
    """Run the operations of the original's ``generalized_steps``; return x0 and x_prev."""
    k = per_sample_coefficient(x, levels)
    x0 = (x - m * k) / k
    return x0, k * x0 + k * noise + k * m


def _ddpm_results(x: Tensor, m: Tensor, noise: Tensor, *, levels: torch.dtype) -> tuple[Tensor, Tensor]:
    """Run the operations of the original's ``ddpm_steps``; return x0 and x_prev."""
    k = per_sample_coefficient(x, levels)
    x0 = (k * x - k * m).clamp(-1, 1)
    return x0, (k * x0 + k * x) / k + k * noise


def _levels_dtype(b: Tensor) -> torch.dtype:
    """Return the dtype of the original's noise levels: that of betas beside a zero in torch's default.

    A default in half precision, where 1 - alpha_bar loses its digits, counts as float32.
    """
    return torch.promote_types(torch.promote_types(b.dtype, torch.get_default_dtype()), torch.float32)


def _check_betas(name: str, b: object) -> None:
    if not isinstance(b, Tensor) or b.ndim != 1 or b.is_complex() or b.is_meta:
        refuse(f"{name} must be a tensor of betas (T,) with values", b, "torch.as_tensor(betas)", TypeError)


def _check_start(x: Any, model: object, b: object) -> None:
    """Check what both samplers take."""
    check_samples("x", x)
    if x.is_meta:
        refuse("x must have values", x.device, "move it to the device of the model")
    check_callable("model", model)
    _check_betas("b", b)


def _alpha_bars(b: Tensor) -> list[float]:
    """Compute alpha_bar from t = -1 to T - 1."""
    return [1.0, *(1 - b.detach().cpu().double()).cumprod(0).tolist()]


def _steps(
    seq: Sequence[int], b: Tensor, row: Callable[[int, float, float], StepCoefficients]
) -> list[tuple[int, StepCoefficients]]:
    """Return (t, row) of each step, the noisiest first.

    ``row(t, alpha_bar_t, alpha_bar_prev)`` computes the row.
    """
    alpha_bars = _alpha_bars(b)
    try:
        timesteps = [as_index(t) for t in seq]
    except TypeError:
        refuse("seq must be integers", seq, "round them, for instance with int(t)", TypeError)
    pairs = list(pairwise([-1, *timesteps]))
    for t_prev, t in pairs:
        # A timestep may occur twice: the original's quadratic sequences repeat some.
        if not max(t_prev, 0) <= t < len(b):
            raise ValueError(f"seq must be increasing, from 0 to {len(b) - 1} at most, got {t} after {t_prev}: sort it")
        if not 0 < alpha_bars[t + 1] <= 1:
            refuse(
                f"b must leave alpha_bar above 0, and at most 1, at timestep {t}", alpha_bars[t + 1], "0 <= beta < 1"
            )
    return [(t, row(t, alpha_bars[t + 1], alpha_bars[t_prev + 1])) for t_prev, t in reversed(pairs)]


def _sample(
    x: Tensor,
    steps: list[tuple[int, StepCoefficients]],
    model: Model,
    levels: torch.dtype,
    operations: Callable[..., tuple[Tensor, ...]],
    draw_noise: Callable[[Tensor], Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    x_t, xs, x0_preds = x, [x], []
    for t, row in steps:
        output = model(x_t, torch.full((x.size(0),), t, dtype=torch.float32, device=x.device))
        model_output = check_output("the output of model", output, x_t)
        # Drawn even where a step adds none: the rest of the random stream must stay the same.
        noise = draw_noise(x_t)
        x0_kind, kind = kinds_of_results(operations, x_t, model_output, noise, levels=levels)
        x_t, x0 = step_with_x0(x0_kind, kind, x_t, model_output, row, noise=noise)
        xs.append(x_t if x_t.is_cpu else x_t.to("cpu"))
        x0_preds.append(x0 if x0.is_cpu else x0.to("cpu"))
    return xs, x0_preds
