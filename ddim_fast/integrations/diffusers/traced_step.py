"""The step as one operator, for ``torch.compile``: it looks the noise levels up when it runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.dispatch import ddim_step
from ...plans.coefficients import ddim_coefficients, variance_with_room


@torch.library.custom_op(
    "ddim_fast::step_between_levels",
    mutates_args=(),
    schema="(Tensor sample, Tensor model_output, Tensor? noise, Tensor alphas_cumprod, Tensor alpha_bar_outside, "
    "SymInt origin, SymInt target, str prediction_type, float? clip_sample_range, float eta, "
    "bool use_clipped_model_output, SymInt[] prev_strides, SymInt[] x0_strides) -> (Tensor, Tensor)",
)
def step_between_levels(
    sample: Tensor,
    model_output: Tensor,
    noise: Tensor | None,
    alphas_cumprod: Tensor,
    alpha_bar_outside: Tensor,
    origin: int,
    target: int,
    prediction_type: str,
    clip_sample_range: float | None,
    eta: float,
    use_clipped_model_output: bool,
    prev_strides: Sequence[int],
    x0_strides: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Compute (prev_sample, pred_original_sample) of the step from ``origin`` to ``target``.

    A timestep below 0 has the level ``alpha_bar_outside``. The last two are the results' strides.
    """
    alpha_bar_t, alpha_bar_prev = (float(alphas_cumprod[t] if t >= 0 else alpha_bar_outside) for t in (origin, target))
    row = ddim_coefficients(
        alpha_bar_t,
        alpha_bar_prev,
        prediction_type,
        variance=variance_with_room(alpha_bar_t, alpha_bar_prev, eta, f"at timestep {origin}"),
        clip_sample_range=clip_sample_range,
        use_clipped_model_output=use_clipped_model_output,
    )
    prev_sample, x0 = _results(sample, prev_strides, x0_strides)
    return ddim_step(sample, model_output, row, noise=noise, out=prev_sample, x0_out=x0), x0


@step_between_levels.register_fake
def _(sample, *others):
    return _results(sample, *others[-2:])


def _results(sample: Tensor, *strides: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(torch.empty_strided(sample.shape, s, dtype=sample.dtype, device=sample.device) for s in strides)
