"""``img2img``, ``inpaint`` and ``interpolate``: each makes a start, and samples from there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from ..models.protocol import Model
from ..plans.plan import SamplingPlan
from ..utils.checks import check_alike, check_samples
from ..utils.devices import widened
from .capture import GraphCache
from .initial_state import check_batched, noised, repeat_conditioning, seeds_of_samples, warn_of_levels
from .loop import Trajectory
from .options import Options
from .run import sample


def img2img(
    plan: SamplingPlan, model: Model, x0: Tensor, strength: float, options: Options, graphs: GraphCache
) -> Tensor | Trajectory:
    """Regenerate pictures from rough ones: see ``DDIMSampler.img2img``."""
    check_samples("x0", x0)
    check_batched(model, "x0", x0.shape)
    if options.known_region.known_x0 is None:  # which is looked at where it is used
        warn_of_levels(x0)
    shorter = plan.last_steps(steps_of_strength(strength, plan.num_inference_steps))
    noise = options.noise
    seeds = seeds_of_samples(noise.seed, noise.seeds, noise.generator, len(x0))
    x_T = noised(x0, plan.schedule.level(shorter.timesteps[0]), seeds, noise.generator)
    return sample(shorter, model, None, options.replace(x_T=x_T, seed=None, seeds=seeds), graphs)


def inpaint(
    plan: SamplingPlan,
    model: Model,
    x0: Tensor,
    mask: Tensor,
    strength: float,
    options: Options,
    graphs: GraphCache,
) -> Tensor | Trajectory:
    """Keep the known part of pictures, and draw the rest: see ``DDIMSampler.inpaint``."""
    check_samples("x0", x0)
    check_batched(model, "x0", x0.shape)
    options = options.replace(mask=mask, known_x0=x0)
    steps_of_strength(strength, plan.num_inference_steps)
    if strength == 1:
        return sample(plan, model, None, options, graphs)
    return img2img(plan, model, x0, strength, options, graphs)


def interpolate(
    plan: SamplingPlan,
    model: Model,
    x_T_first: Tensor,
    x_T_last: Tensor,
    weights: Sequence[float],
    options: Options,
    graphs: GraphCache,
) -> Tensor | Trajectory:
    """Sample between two starts: see ``DDIMSampler.interpolate``."""
    weights = check_weights(weights)
    check_samples("x_T_first", x_T_first)
    check_batched(model, "x_T_first", x_T_first.shape)
    check_samples("x_T_last", x_T_last)
    check_alike("x_T_last", x_T_last, "x_T_first", x_T_first)
    x_T = torch.cat([slerp(x_T_first, x_T_last, weight) for weight in weights])
    pairs, times = len(x_T_first), len(weights)
    noise, guidance = options.noise, options.guidance
    seeds = seeds_of_samples(noise.seed, noise.seeds, noise.generator, pairs)
    options = options.replace(
        x_T=x_T,
        seed=None,
        seeds=None if seeds is None else seeds.repeat(times),
        conditioning=repeat_conditioning(guidance.conditioning, pairs, times),
        unconditional_conditioning=repeat_conditioning(
            guidance.unconditional_conditioning, pairs, times, "unconditional_conditioning"
        ),
    )
    result = sample(plan, model, None, options, graphs)
    shape = (times, *(x_T_first.shape if pairs != 1 else x_T_first.shape[1:]))
    if isinstance(result, Tensor):
        return result.view(shape)
    return replace(result, x_t=[x.view(shape) for x in result.x_t], x0=[x.view(shape) for x in result.x0])


def slerp(first: Tensor, last: Tensor, weight: float) -> Tensor:
    """Interpolate each sample spherically (equation 67 of the DDIM paper, appendix D.5), in
    float64 where the device has it; 0 gives ``first``, 1 ``last``.

    The mean of two noises has too small a variance for noise; points between them on the sphere
    have the right one. Where the angle is 0, or a sample is zero, the interpolation is linear.

    Args:
        first, last: ``(B, C, ...)``, of the same shape, dtype and device.

    Returns:
        ``(B, C, ...)`` in the dtype of ``first``.

    Raises:
        TypeError, ValueError: the tensors are not alike, or opposite to each other: then there is
            no shortest arc.
    """
    check_samples("first", first)
    check_samples("last", last)
    check_alike("last", last, "first", first)
    a, b = (widened(x.detach()).flatten(1) for x in (first, last))
    u, v = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    # The arccosine of u v would lose half of the digits at small angles (Kahan, "How futile are
    # mindless assessments of roundoff", 2006).
    angle = 2 * torch.atan2((u - v).norm(dim=1, keepdim=True), (u + v).norm(dim=1, keepdim=True))
    if bool((angle > math.pi - 1e-6).any()):
        raise ValueError(
            "x_T to interpolate between must not be opposite to each other, got an angle of pi: interpolate by way of a third"
        )
    straight = ~(angle > 1e-9)  # NaN, too: a sample of zeros has no direction
    sine = torch.sin(angle)
    of_first = torch.where(straight, 1 - weight, torch.sin((1 - weight) * angle) / sine)
    of_last = torch.where(straight, weight, torch.sin(weight * angle) / sine)
    return (of_first * a + of_last * b).view(first.shape).to(first.dtype)


def check_weights(weights: Sequence[float] | Tensor | np.ndarray) -> list[float]:
    """Return the weights of an interpolation as floats.

    Raises:
        TypeError, ValueError: one is not a number in [0, 1].
    """
    if isinstance(weights, (Tensor, np.ndarray)):
        weights = weights.tolist()
    if not isinstance(weights, Sequence) or not all(isinstance(w, Real) for w in weights):
        raise TypeError(f"weights must be a list of numbers in [0, 1], got {weights!r:.80}")
    if not weights or not all(0 <= w <= 1 for w in weights):
        raise ValueError(f"weights must be at least one number, each in [0, 1], got {weights!r:.80}")
    return [float(w) for w in weights]


def steps_of_strength(strength: float, num_inference_steps: int) -> int:
    """Return how many of the last steps a strength is: ``round(strength * num_inference_steps)``.

    Raises:
        TypeError, ValueError: the strength is not in (0, 1], or leaves no step.
    """
    if not isinstance(strength, Real) or isinstance(strength, bool):
        raise TypeError(f"strength must be a number in (0, 1], got {strength!r}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1] (1: all steps), got {strength}")
    count = round(float(strength) * num_inference_steps)
    if count == 0:
        # Rounded up, so that the value named is accepted.
        smallest = (math.floor(0.5e6 / num_inference_steps) + 1) / 1e6
        raise ValueError(
            f"strength must leave a step: at least {smallest} with {num_inference_steps} steps, got {strength}"
        )
    return count


def check_left_out(method: str, source: str, options: Iterable[str]) -> None:
    """Raise TypeError if an option of ``sample`` is given that ``method`` takes from its argument
    ``source``."""
    if given := [name for name in ("shape", "x_T", "device", "dtype") if name in options]:
        raise TypeError(
            f"{method} takes its start, shape, device and dtype from {source}, got {given[0]}: leave it out"
        )
