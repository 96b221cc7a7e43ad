"""The DDIM step in plain PyTorch, differentiable, in any floating-point dtype: what every kernel is
compared with.

Half precision is computed in float32 and rounded once; float64 stays float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import noise_in_torch
from .coefficients import LARGEST_SCALE, StepCoefficients
from .contract import numbers_on_host
from .fields import StepInputs
from .noise import NoiseStream, standard_normals

name = "reference"


def unsupported_reasons(inputs: StepInputs) -> list[str]:
    """Return no reasons: the reference runs everything that passes the checks."""
    return []


def run(inputs: StepInputs) -> Tensor:
    """Run checked inputs. Return x_prev: ``inputs.x_prev`` if given, else a new tensor."""
    c = inputs.coefficients
    assert isinstance(c, StepCoefficients)  # dispatch has read a table's row
    targets = [target for target in (inputs.x0, inputs.history) if target is not None]
    dtype = torch.promote_types(inputs.x_t.dtype, torch.float32)
    x_t, m = inputs.x_t.to(dtype), inputs.model_output.to(dtype)
    if inputs.model_output_uncond is not None and inputs.guidance_scale is not None:
        uncond = inputs.model_output_uncond.to(dtype)
        m = uncond + inputs.guidance_scale * (m - uncond)
    if c.clipped:
        x0 = c.x0_x * x_t + c.x0_m * m
        if inputs.thresholds is not None:
            scale = (c.clip / inputs.thresholds.to(dtype)).clamp(max=LARGEST_SCALE)
            x0 = x0 * scale.view(-1, *[1] * (x0.ndim - 1))
        x0 = x0.clamp(-c.clip, c.clip)
        eps = _combine((c.eps_x, x_t), (c.eps_m, m), (c.eps_0, x0))
        x_prev = _combine((c.prev_x0, x0), (c.prev_eps, eps))
    else:
        fold_x, fold_m = c.folded
        x0 = c.x0_x * x_t + c.x0_m * m if targets else x_t  # nobody reads it without a target
        x_prev = fold_x * x_t + fold_m * m
    if inputs.history is not None and c.reads_history:
        x_prev = x_prev + c.prev_history * inputs.history.to(dtype)
    if inputs.history_2 is not None and c.reads_history_2:
        x_prev = x_prev + c.prev_history_2 * inputs.history_2.to(dtype)
    if inputs.adds_noise:
        x_prev = x_prev + c.prev_noise * _noise(inputs, inputs.noise, inputs.noise_stream).to(dtype)
    if inputs.mask is not None and inputs.known_x0 is not None:
        known = c.known_x0 * inputs.known_x0.to(dtype)  # at the noise level of x_prev: equation 4
        if inputs.adds_known_noise:
            known = known + c.known_noise * _noise(inputs, inputs.known_noise, NoiseStream.KNOWN_REGION).to(dtype)
        mask = inputs.mask.to(dtype)
        x_prev = mask * known + (1 - mask) * x_prev
    result = x_prev.to(inputs.x_t.dtype) if inputs.x_prev is None else inputs.x_prev.copy_(x_prev)
    if inputs.model_input_out is not None:  # of x_prev as it is stored: what a pass of its own would give
        inputs.model_input_out.copy_(c.input_scale * result.to(dtype))
    if inputs.history is not None and inputs.history_2 is not None:
        inputs.history_2.copy_(inputs.history)
    for target in targets:
        target.copy_(x0)
    return result


def _combine(*terms: tuple[float, Tensor]) -> Tensor:
    """Sum the terms whose coefficient is not zero.

    A zero means that there is no such term, even where the tensor holds an infinity or NaN.
    """
    present = [coefficient * tensor for coefficient, tensor in terms if coefficient != 0]
    return sum(present[1:], present[0]) if present else torch.zeros_like(terms[0][1])


def on_the_host(x_t: Tensor) -> bool:
    """Return whether NumPy may compute for these samples, which no device waits for."""
    return x_t.device.type == "cpu"


def _noise(inputs: StepInputs, given: Tensor | None, stream: int) -> Tensor:
    """Return ``given``, or the noise standard's normals in the shape of ``x_t``: from NumPy on the CPU,
    and on another device without waiting for it."""
    if given is not None:
        return given
    x_t = inputs.x_t
    assert inputs.seeds is not None  # checked: a row that adds noise has one of the two
    n_elements = math.prod(x_t.shape[1:])
    if not on_the_host(x_t):
        z_there = noise_in_torch.standard_normals(inputs.seeds, n_elements, inputs.noise_step, stream)
        return z_there.view(x_t.shape)
    z = standard_normals(numbers_on_host("seeds", inputs.seeds), n_elements, inputs.noise_step, stream)
    return torch.from_numpy(z).view(x_t.shape)
