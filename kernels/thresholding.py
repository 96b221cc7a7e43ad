"""Dynamic thresholding (Imagen, Saharia et al. 2022, arXiv 2205.11487, section 2.3): the per-sample bound of x0."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import StepCoefficients


def quantile_of_magnitude(x: Tensor, ratio: float) -> Tensor:
    """The ``ratio`` quantile of |x| over each sample, linearly interpolated, exact for any size: ``(B, ...)`` -> ``(B,)``.

    (``torch.quantile`` stops at 2**24 elements.)
    """
    magnitude = x.abs().flatten(1)
    position = ratio * (magnitude.shape[1] - 1)
    below = int(position)
    low = magnitude.kthvalue(below + 1, dim=1).values
    if below + 1 >= magnitude.shape[1]:
        return low
    high = magnitude.kthvalue(below + 2, dim=1).values
    return torch.lerp(low, high, position - below)


def dynamic_thresholds(
    x_t: Tensor,
    model_output: Tensor,
    coefficients: StepCoefficients,
    ratio: float,
    maximum: float,
    model_output_uncond: Tensor | None = None,
    guidance_scale: float | None = None,
) -> Tensor:
    """Thresholds for ``ddim_step``, ``(B,)`` float32: each sample's quantile of |x0|, at least the clip range, at most ``maximum``."""
    m = model_output.float()
    if model_output_uncond is not None:
        m = torch.lerp(model_output_uncond.float(), m, guidance_scale)
    x0 = coefficients.x0_x * x_t.float() + coefficients.x0_m * m
    bound = coefficients.clip
    if x0.numel() == 0:
        return torch.full((len(x0),), bound, device=x0.device)
    return quantile_of_magnitude(x0, ratio).clamp(bound, max(maximum, bound))
