"""The DDIM step in plain PyTorch: the definition that every kernel is held against, in any floating-point dtype, differentiable.

``ddim_step_paper`` is the update as the paper writes it. ``run`` is the same through a row of coefficients, as a backend: half
precision is computed in float32 and rounded once, float64 stays float64.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .contract import StepInputs
from .noise import NoiseStream, standard_normals

name = "reference"


def std_dev_paper(alpha_bar_t: float, alpha_bar_prev: float, eta: float) -> float:
    """sigma_t(eta), equation 16 of arXiv 2010.02502."""
    if alpha_bar_prev == 1:
        return 0.0
    return (
        eta
        * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t))
        * math.sqrt(max(1 - alpha_bar_t / alpha_bar_prev, 0.0))
    )


def ddim_step_paper(
    x_t: Tensor, eps: Tensor, alpha_bar_t: float, alpha_bar_prev: float, eta: float = 0.0, z: Tensor | None = None
) -> Tensor:
    """Equation 12 of arXiv 2010.02502 (whose alpha is the cumulative product, here alpha_bar), in the dtype of its arguments.

    Args:
        x_t: noisy samples, any shape.
        eps: the model's prediction of the noise in ``x_t``, of the same shape.
        alpha_bar_t, alpha_bar_prev: cumulative products at this timestep and at the next one to visit.
        z: standard normal noise, needed where ``eta`` > 0.
    """
    std_dev_t = std_dev_paper(alpha_bar_t, alpha_bar_prev, eta)
    predicted_x0 = (x_t - math.sqrt(1 - alpha_bar_t) * eps) / math.sqrt(alpha_bar_t)
    direction = math.sqrt(max(1 - alpha_bar_prev - std_dev_t**2, 0.0)) * eps
    x_prev = math.sqrt(alpha_bar_prev) * predicted_x0 + direction
    return x_prev if std_dev_t == 0 else x_prev + std_dev_t * z


def unsupported_reasons(inputs: StepInputs) -> list[str]:
    """The reference runs everything that the contract allows."""
    return []


def run(inputs: StepInputs) -> Tensor:
    """The step through its row of coefficients. Returns x_prev: ``inputs.x_prev`` where it was given, else a new tensor."""
    c = inputs.coefficients
    dtype = torch.promote_types(inputs.x_t.dtype, torch.float32)
    x_t, m = inputs.x_t.to(dtype), inputs.model_output.to(dtype)
    if inputs.model_output_uncond is not None:
        uncond = inputs.model_output_uncond.to(dtype)
        m = uncond + inputs.guidance_scale * (m - uncond)
    if c.clipped:
        x0 = _clip(c.x0_x * x_t + c.x0_m * m, inputs, dtype)
        eps = _combine((c.eps_x, x_t), (c.eps_m, m), (c.eps_0, x0))
        x_prev = _combine((c.prev_x0, x0), (c.prev_eps, eps))
    else:
        fold_x, fold_m = c.folded
        x0 = c.x0_x * x_t + c.x0_m * m if inputs.x0 is not None or inputs.history is not None else None
        x_prev = fold_x * x_t + fold_m * m
    if c.reads_history:
        x_prev = x_prev + c.prev_history * inputs.history.to(dtype)
    if inputs.adds_noise:
        x_prev = x_prev + c.prev_noise * _noise(inputs, inputs.noise, inputs.noise_stream).to(dtype)
    if inputs.mask is not None:
        x_prev = _inpaint(x_prev, inputs, dtype)
    if inputs.x0 is not None:
        inputs.x0.copy_(x0)
    if inputs.history is not None:
        inputs.history.copy_(x0)
    if inputs.x_prev is not None:
        return inputs.x_prev.copy_(x_prev)
    return x_prev.to(inputs.x_t.dtype)


def _combine(*terms: tuple[float, Tensor]) -> Tensor:
    """Sum of the terms whose coefficient is not zero: a column of zeros says that there is no such term, whatever the tensor holds."""
    present = [coefficient * tensor for coefficient, tensor in terms if coefficient != 0]
    return sum(present[1:], present[0]) if present else torch.zeros_like(terms[0][1])


def _clip(x0: Tensor, inputs: StepInputs, dtype: torch.dtype) -> Tensor:
    bound = inputs.coefficients.clip
    if inputs.thresholds is not None:
        x0 = x0 * (bound / inputs.thresholds.to(dtype)).view(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-bound, bound)


def _inpaint(x_prev: Tensor, inputs: StepInputs, dtype: torch.dtype) -> Tensor:
    """The known picture where the mask is 1, with the noise that x_prev has (equation 4 of the DDIM paper)."""
    c = inputs.coefficients
    known = c.known_x0 * inputs.known_x0.to(dtype)
    if inputs.adds_known_noise:
        known = known + c.known_noise * _noise(inputs, inputs.known_noise, NoiseStream.KNOWN_REGION).to(dtype)
    mask = inputs.mask.to(dtype)
    return mask * known + (1 - mask) * x_prev


def _noise(inputs: StepInputs, given: Tensor | None, stream: int) -> Tensor:
    """The tensor given, or the noise standard's normals, computed in NumPy and moved to the device. Shape of ``x_t``."""
    if given is not None:
        return given
    x_t = inputs.x_t
    n_elements = math.prod(x_t.shape[1:])
    seeds = inputs.seeds.cpu().resolve_neg().numpy()
    z = standard_normals(np.asarray(seeds), n_elements, inputs.noise_step, stream)
    return torch.from_numpy(z).view(x_t.shape).to(x_t.device)
