"""Guidance: steer the model's output before a step, by a second output without the condition or by
a classifier's gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..plans.coefficients import classifier_guidance_weight
from ..plans.plan import SamplingPlan
from ..utils.warn import warn_caller

GuidanceScale = float | Sequence[float] | Callable[[Any], float]
"""One number for all steps, one for each in order, or a function of the timestep."""


@dataclass(frozen=True)
class ClassifierGuidance:
    """Guidance by a classifier's gradient: algorithm 2 of Dhariwal and Nichol 2021, arXiv
    2105.05233.

    Attributes:
        cond_fn: ``cond_fn(x_t, t, **conditioning)`` returns the gradient of log p(y | x_t) by x_t,
            times a scale if wanted, like ``x_t``.
        conditioning: that of the model's call; with classifier-free guidance, of the conditional
            one.
        weights: for each step, the change of the model's output per unit of the gradient.
        times: for each step, what a model is told at the timestep of ``x_t``: the classifier gets
            it whatever the model is called with.
        time_dtype: of the tensor that it gets.
    """

    cond_fn: Callable[..., Tensor]
    conditioning: Mapping[str, Any]
    weights: Sequence[float]
    times: Sequence[float]
    time_dtype: torch.dtype

    def shifted(self, model_output: Tensor, x_t: Tensor, step: int) -> Tensor:
        """Return the model's output shifted by the classifier's gradient, in the dtype of ``x_t``.

        Raises:
            TypeError, ValueError: the gradient is not like ``x_t``.
        """
        # A copy, for which gradients can be taken, and which cond_fn may change.
        with torch.inference_mode(False), torch.enable_grad():
            t = torch.full((len(x_t),), self.times[step], dtype=self.time_dtype, device=x_t.device)
            gradient = self.cond_fn(x_t.clone(), t, **self.conditioning)
        if not isinstance(gradient, Tensor) or not gradient.dtype.is_floating_point:
            raise TypeError(f"cond_fn must return a floating-point tensor, the gradient for x_t, got {gradient!r:.80}")
        if gradient.shape != x_t.shape or gradient.device != x_t.device:
            raise ValueError(
                f"cond_fn must return the shape and device of x_t, {tuple(x_t.shape)} on {x_t.device}, "
                f"got {tuple(gradient.shape)} on {gradient.device}"
            )
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        return torch.add(model_output.to(dtype), gradient.detach().to(dtype), alpha=self.weights[step]).to(x_t.dtype)


def guidance_scales(guidance_scale: GuidanceScale | None, timesteps: Sequence[float]) -> tuple[float, ...] | None:
    """Return one scale for each step; None if all are 1, which is no guidance.

    Raises:
        TypeError, ValueError: a scale is no number or not finite in float32, or there is not one
            for each step.
    """
    if guidance_scale is None:
        return None
    if isinstance(guidance_scale, (Tensor, np.ndarray)):
        guidance_scale = guidance_scale.tolist()
    scales: list[Any]
    if callable(guidance_scale):
        scales = [guidance_scale(t) for t in timesteps]
    elif isinstance(guidance_scale, Sequence) and not isinstance(guidance_scale, (str, bytes)):
        scales = list(guidance_scale)
    else:
        scales = [guidance_scale] * len(timesteps)
    if len(scales) != len(timesteps):
        raise ValueError(
            f"guidance_scale must be one number, or one for each of the {len(timesteps)} steps, got {len(scales)}"
        )
    for scale in scales:
        if not isinstance(scale, Real):
            raise TypeError(
                f"guidance_scale must be a number, a list of numbers, or a function of the timestep, got {scale!r}"
            )
        if not abs(float(scale)) <= torch.finfo(torch.float32).max:
            raise ValueError(f"guidance_scale must be finite in float32, got {scale}")
    if scales and min(scales) < 0:
        warn_caller(
            f"guidance_scale should be at least 0 (1 is no guidance), got {float(min(scales)):g}, which steers away from the "
            "conditioning: exchange it with unconditional_conditioning if that is meant"
        )
    return None if all(scale == 1 for scale in scales) else tuple(float(scale) for scale in scales)


def check_rescale(guidance_rescale: float, guidance_scale: GuidanceScale | None) -> None:
    """Raise TypeError or ValueError unless phi is a number in [0, 1], 0 without guidance."""
    if not isinstance(guidance_rescale, (float, Real)):  # to ask for a Real takes as long as the rest
        raise TypeError(f"guidance_rescale must be a number in [0, 1], got {guidance_rescale!r}")
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale must be in [0, 1], got {guidance_rescale}")
    if guidance_rescale and guidance_scale is None:
        raise ValueError(
            f"guidance_rescale corrects a guidance_scale, got guidance_rescale={guidance_rescale} without one: pass one, or leave both out"
        )


def classifier_guidance(
    cond_fn: Callable[..., Tensor] | None, conditioning: Mapping[str, Any], plan: SamplingPlan
) -> ClassifierGuidance | None:
    """Return the classifier guidance of a plan's steps; None without ``cond_fn``.

    Raises:
        TypeError, ValueError: ``cond_fn`` cannot be called, or a step cannot be steered.
    """
    if cond_fn is None:
        return None
    if not callable(cond_fn):
        raise TypeError(f"cond_fn must be callable as cond_fn(x_t, t, **conditioning), got {type(cond_fn).__name__}")
    weights = [classifier_guidance_weight(step.level_t, plan.meaning_at(step.level_t)) for step in plan.steps]
    times = [plan.schedule.model_time(t) for t in plan.timesteps]
    return ClassifierGuidance(cond_fn, conditioning, weights, times, plan.schedule.time_dtype)


def guided_output(
    conditional: Tensor, unconditional: Tensor, scale: float | Tensor, rescale: float, dtype: torch.dtype
) -> Tensor:
    """Return ``unconditional + scale * (conditional - unconditional)`` in ``dtype``, its standard
    deviation over each sample brought towards that of ``conditional`` by the fraction ``rescale``
    (Lin et al. 2023, arXiv 2305.08891, section 3.4).

    Args:
        scale: a number, or one on the device.
    """
    computed_in = torch.promote_types(dtype, torch.float32)
    conditional, unconditional = conditional.to(computed_in), unconditional.to(computed_in)
    guided = unconditional + scale * (conditional - unconditional)
    if rescale and guided.numel():
        sizes = tuple(range(1, guided.ndim))
        wanted, found = (m.std(sizes, correction=0, keepdim=True) for m in (conditional, guided))
        # A constant output has no deviation to rescale.
        guided = guided * (rescale * torch.where(found > 0, wanted / found, 1.0) + (1 - rescale))
    return guided.to(dtype)
