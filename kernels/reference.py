"""The DDIM step in plain PyTorch, differentiable, in any floating-point dtype: what every kernel is
compared with.

Half precision is computed in float32 and rounded once; float64 stays float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from . import noise_in_torch
from .coefficients import LARGEST_SCALE, StepCoefficients
from .contract import numbers_on_host
from .density import DensityInputs
from .fields import StepInputs
from .noise import NoiseStream, standard_normals

name = "reference"


def unsupported_reasons(inputs: StepInputs, more: Iterable[Tensor] = ()) -> list[str]:
    """Return no reasons: the reference runs everything that passes the checks."""
    return []


def run(inputs: StepInputs) -> Tensor:
    """Run checked inputs. Return x_prev: ``inputs.x_prev`` if given, else a new tensor."""
    c = inputs.coefficients
    assert isinstance(c, StepCoefficients)  # dispatch has read a table's row
    targets = [target for target in (inputs.x0, inputs.history) if target is not None]
    dtype = torch.promote_types(inputs.x_t.dtype, torch.float32)
    x_t = inputs.x_t.to(dtype)
    m = _guided(inputs.model_output, inputs.model_output_uncond, inputs.guidance_scale, dtype)
    mean, x0 = _predict(c, x_t, m, inputs.thresholds, wants_x0=bool(targets))
    if inputs.history is not None and c.reads_history:
        mean = mean + c.prev_history * inputs.history.to(dtype)
    if inputs.history_2 is not None and c.reads_history_2:
        mean = mean + c.prev_history_2 * inputs.history_2.to(dtype)
    x_prev = mean
    if inputs.adds_noise:
        x_prev = mean + c.prev_noise * _noise(inputs, inputs.noise, inputs.noise_stream).to(dtype)
    if inputs.mask is not None and inputs.known_x0 is not None:
        known = c.known_x0 * inputs.known_x0.to(dtype)  # at the noise level of x_prev: equation 4
        if inputs.adds_known_noise:
            known = known + c.known_noise * _noise(inputs, inputs.known_noise, NoiseStream.KNOWN_REGION).to(dtype)
        mask = inputs.mask.to(dtype)
        x_prev = mask * known + (1 - mask) * x_prev
    counted = None if inputs.mask is None else inputs.mask == 0  # before x_prev is written over the mask
    result = x_prev.to(inputs.x_t.dtype) if inputs.x_prev is None else inputs.x_prev.copy_(x_prev)
    if inputs.log_prob_out is not None:  # of x_prev as it is stored, which is what was sampled: a constant
        scale, offset = c.scale_and_offset(inputs.min_std, exact=dtype == torch.float64)
        deviation = result.detach().to(dtype) - mean
        total = _reduced(deviation, counted, scale, offset, inputs.log_prob_reduction)
        inputs.log_prob_out.copy_(-total)
    if inputs.model_input_out is not None:  # of x_prev as it is stored: what a pass of its own would give
        inputs.model_input_out.copy_(c.input_scale * result.to(dtype))
    if inputs.history is not None and inputs.history_2 is not None:
        inputs.history_2.copy_(inputs.history)
    for target in targets:
        target.copy_(x0)
    return result


def _guided(model_output: Tensor, uncond: Tensor | None, guidance_scale: float | None, dtype: torch.dtype) -> Tensor:
    m = model_output.to(dtype)
    if uncond is None or guidance_scale is None:
        return m
    uncond = uncond.to(dtype)
    return uncond + guidance_scale * (m - uncond)


def _predict(
    c: StepCoefficients, x_t: Tensor, m: Tensor, thresholds: Tensor | None = None, wants_x0: bool = False
) -> tuple[Tensor, Tensor]:
    """Return what x_t and the model's output make of x_prev, and x0 if it is wanted."""
    if not c.clipped:
        fold_x, fold_m = c.folded
        return fold_x * x_t + fold_m * m, c.x0_x * x_t + c.x0_m * m if wants_x0 else x_t
    x0 = c.x0_x * x_t + c.x0_m * m
    if thresholds is not None:
        scale = (c.clip / thresholds.to(x_t.dtype)).clamp(max=LARGEST_SCALE)
        x0 = x0 * scale.view(-1, *[1] * (x0.ndim - 1))
    x0 = x0.clamp(-c.clip, c.clip)
    eps = _combine((c.eps_x, x_t), (c.eps_m, m), (c.eps_0, x0))
    return _combine((c.prev_x0, x0), (c.prev_eps, eps)), x0


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


# --- The density of a step --------------------------------------------------------------------------------------------


def density(inputs: DensityInputs, counts: Tensor | None = None) -> Tensor:
    """Return the log-density or divergence of checked inputs, ``(B,)``, differentiable.

    ``counts`` ``(B,)``, given where there is a mask, receives the number of elements that count.
    """
    deviation = _deviation(inputs)
    counted = None if inputs.mask is None else inputs.mask == 0
    if counts is not None and counted is not None:
        counts.copy_(_per_sample(counted))
    return inputs.sign * _reduced(deviation, counted, inputs.scale, inputs.offset, inputs.reduction)


def density_backward(inputs: DensityInputs, factors: Tensor, gradients: dict[str, Tensor]) -> None:
    """Fill the gradients, by name: factors[i] * (x_prev - mean) * d mean / d tensor of sample i.

    ``factors`` is ``(B,)``.
    """
    step, c = inputs.step, inputs.row
    deviation = _deviation(inputs)
    if inputs.mask is not None:
        deviation = torch.where(inputs.mask == 0, deviation, torch.zeros_like(deviation))
    of_mean = factors.view(-1, *[1] * (deviation.ndim - 1)) * deviation
    of_x: float | Tensor
    of_m: float | Tensor
    of_x, of_m = c.folded
    if c.clipped:  # as torch.clamp: x0 has a gradient within its bounds, and on them
        m = _guided(step.model_output, step.model_output_uncond, step.guidance_scale, deviation.dtype)
        inside = ((c.x0_x * step.x_t.to(deviation.dtype) + c.x0_m * m).abs() <= c.clip).to(deviation.dtype)
        of_x = c.prev_eps * c.eps_x + c.x0_total * c.x0_x * inside
        of_m = c.prev_eps * c.eps_m + c.x0_total * c.x0_m * inside
    guidance = 1.0 if step.guidance_scale is None else step.guidance_scale
    shares = {"model_output": (of_m, guidance), "model_output_uncond": (of_m, 1 - guidance), "x_t": (of_x, 1.0)}
    for wanted, gradient in gradients.items():
        slope, share = shares[wanted]
        gradient.copy_(of_mean * slope * share)


def _deviation(inputs: DensityInputs) -> Tensor:
    """Return x_prev - mean, or mean_ref - mean."""
    step, dtype = inputs.step, inputs.dtype
    x_t = step.x_t.to(dtype)

    def mean_of(model_output: Tensor, uncond: Tensor | None) -> Tensor:
        return _predict(inputs.row, x_t, _guided(model_output, uncond, step.guidance_scale, dtype))[0]

    mean = mean_of(step.model_output, step.model_output_uncond)
    if inputs.reference is not None:
        return mean_of(inputs.reference, inputs.reference_uncond) - mean
    assert inputs.x_prev is not None  # checked
    return inputs.x_prev.to(dtype) - mean


def _per_sample(values: Tensor) -> Tensor:
    return values.reshape(len(values), math.prod(values.shape[1:])).sum(1)


def _reduced(deviation: Tensor, counted: Tensor | None, scale: float, offset: float, reduction: str) -> Tensor:
    """Return the sum or mean, over the elements that count, of scale * deviation^2 + offset:
    ``(B,)``."""
    count: float | Tensor = math.prod(deviation.shape[1:])
    if counted is not None:
        deviation = torch.where(counted, deviation, torch.zeros_like(deviation))
        count = _per_sample(counted)
    total = scale * _per_sample(deviation.square()) + offset * count
    if reduction == "sum":
        return total
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
