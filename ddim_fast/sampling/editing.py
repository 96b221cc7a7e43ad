"""``img2img``, ``inpaint`` and ``interpolate``, methods of ``DDIMSampler``: each makes a start and leaves the rest to its ``sample``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..models.protocol import Model
from ..utils.checks import check_alike, check_samples
from .initial_state import noised, repeat_conditioning, seeds_of_samples
from .loop import Trajectory

if TYPE_CHECKING:
    from ..sampler import DDIMSampler


def img2img(
    sampler: DDIMSampler,
    model: Model,
    x0: Tensor,
    strength: float,
    *,
    seed: int | None = None,
    seeds: Sequence[int] | Tensor | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor | Trajectory:
    """Pictures made anew from rough ones (SDEdit, Meng et al. 2021, arXiv 2108.01073): noised, and sampled from there.

    The same as ``sample`` with the last ``round(strength * S)`` timesteps, and with x_T made of x0 by equation 4 of the DDIM paper
    and the noise that ``sample`` would start from. Steps, and scales given one for each, are counted from the first that is run.

    Args:
        x0: ``(B, C, ...)``, clean. The samples have its device and dtype.
        strength: in (0, 1]. 1 runs all steps; what alpha_bar_T leaves of x0 is still in the start.
        options: those of ``sample``.

    Raises:
        TypeError, ValueError: as ``sample``; or the strength leaves no step.
    """
    check_left_out("img2img", "x0", options)
    check_samples("x0", x0)
    shorter = sampler.last_steps(steps_of_strength(strength, sampler.num_inference_steps))
    per_sample = seeds_of_samples(seed, seeds, generator, len(x0))
    x_T = noised(x0, sampler.schedule.alpha_bar(shorter.timesteps[0]), per_sample, generator)
    return shorter.sample(model, x_T=x_T, seeds=per_sample, generator=generator, **options)


def inpaint(
    sampler: DDIMSampler, model: Model, x0: Tensor, mask: Tensor, *, strength: float = 1.0, **options: Any
) -> Tensor | Trajectory:
    """Pictures whose known part is kept, and whose other part is drawn to fit.

    After each step, and at x_T, the known part is put in at the noise level reached there, inside of the step's kernel; its noise
    is of the stream KNOWN_REGION of each sample's seed. In the end it is x0 itself (with ``set_alpha_to_one``). A ``generator``
    draws, in this order: x_T, the known part's noise there, and for each step its own noise, where eta > 0, and the known part's.

    Args:
        x0: ``(B, C, ...)``, clean. The samples have its device and dtype.
        mask: 1 where x0 is known and kept, 0 where it is drawn anew (diffusers' masks are the other way round), a blend between.
            Any dtype and device; broadcast to x0: ``(B, 1, H, W)``, ``(H, W)``.
        strength: below 1, the unknown part begins with x0, too, as in ``img2img``; at 1 with noise alone.
        options: those of ``sample``. The trajectory's x0 is what the model predicts, in the known part, too.

    Raises:
        TypeError, ValueError: as ``sample`` and ``img2img``; or the mask does not fit, or leaves [0, 1]; or the sampler has order=2.
    """
    check_left_out("inpaint", "x0", options)
    check_samples("x0", x0)
    if strength == 1:
        return sampler.sample(model, mask=mask, known_x0=x0, **options)
    return sampler.img2img(model, x0, strength, mask=mask, known_x0=x0, **options)


def interpolate(
    sampler: DDIMSampler,
    model: Model,
    x_T_first: Tensor,
    x_T_last: Tensor,
    weights: Sequence[float],
    *,
    seed: int | None = None,
    seeds: Sequence[int] | Tensor | None = None,
    generator: torch.Generator | None = None,
    conditioning: Mapping[str, Any] | None = None,
    unconditional_conditioning: Mapping[str, Any] | None = None,
    **options: Any,
) -> Tensor | Trajectory:
    """Samples of what lies between two starts (section 5.3 of the DDIM paper, and its appendix D.5), all in one batch.

    Args:
        x_T_first, x_T_last: ``(B, C, ...)``: B pairs. See ``slerp``.
        weights: K numbers in [0, 1]; 0 is the first start, 1 the last.
        seed, seeds: of the steps' noise, where eta > 0: one for each pair, the same for all of its weights.
        conditioning, unconditional_conditioning: tensors whose first size is B are repeated for each weight. The model and callbacks
            see K * B samples, those of the first weight first.
        options: those of ``sample``.

    Returns:
        ``(K, B, C, ...)``, or ``(K, C, ...)`` for one pair; or a ``Trajectory`` of such states.

    Raises:
        TypeError, ValueError: as ``sample`` and ``slerp``; or a weight is not in [0, 1].
    """
    check_left_out("interpolate", "x_T_first and x_T_last", options)
    weights = check_weights(weights)
    x_T = torch.cat([slerp(x_T_first, x_T_last, weight) for weight in weights])
    pairs, times = len(x_T_first), len(weights)
    per_pair = seeds_of_samples(seed, seeds, generator, pairs)
    result = sampler.sample(
        model,
        x_T=x_T,
        seeds=None if per_pair is None else per_pair.repeat(times),
        generator=generator,
        conditioning=repeat_conditioning(conditioning, pairs, times),
        unconditional_conditioning=repeat_conditioning(unconditional_conditioning, pairs, times),
        **options,
    )
    shape = (times, *(x_T_first.shape if pairs != 1 else x_T_first.shape[1:]))
    if isinstance(result, Tensor):
        return result.view(shape)
    return replace(result, x_t=[x.view(shape) for x in result.x_t], x0=[x.view(shape) for x in result.x0])


def slerp(first: Tensor, last: Tensor, weight: float) -> Tensor:
    """Spherical interpolation of each sample (equation 67 of the DDIM paper, appendix D.5), in float64; 0 gives ``first``, 1 ``last``.

    A mean of two noises would be too small for noise; what lies between them on the sphere is not. Where the angle is 0, or a sample is,
    the interpolation is linear.

    Args:
        first, last: ``(B, C, ...)``, of the same shape, dtype and device.

    Returns:
        ``(B, C, ...)`` in the dtype of ``first``.

    Raises:
        TypeError, ValueError: the tensors are of another kind, or opposite to each other: no way between them is the shortest.
    """
    check_samples("first", first)
    check_samples("last", last)
    check_alike("last", last, "first", first)
    a, b = (x.detach().double().flatten(1) for x in (first, last))
    u, v = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    # The arccosine of u v would have half of the digits at small angles (Kahan, "How futile are mindless assessments of roundoff", 2006).
    angle = 2 * torch.atan2((u - v).norm(dim=1, keepdim=True), (u + v).norm(dim=1, keepdim=True))
    if bool((angle > math.pi - 1e-6).any()):
        raise ValueError(
            "x_T to interpolate between must not be opposite to each other, got an angle of pi: go by way of a third"
        )
    straight = ~(angle > 1e-9)  # NaN, too: a sample of zeros has no direction
    sine = torch.sin(angle)
    of_first = torch.where(straight, 1 - weight, torch.sin((1 - weight) * angle) / sine)
    of_last = torch.where(straight, weight, torch.sin(weight * angle) / sine)
    return (of_first * a + of_last * b).view(first.shape).to(first.dtype)


def check_weights(weights: Sequence[float] | Tensor | np.ndarray) -> list[float]:
    """The weights of an interpolation as numbers. Raises TypeError or ValueError where one is none, or not in [0, 1]."""
    if isinstance(weights, (Tensor, np.ndarray)):
        weights = weights.tolist()
    if not isinstance(weights, Sequence) or not all(isinstance(w, Real) for w in weights):
        raise TypeError(f"weights must be a list of numbers in [0, 1], got {weights!r:.80}")
    if not weights or not all(0 <= w <= 1 for w in weights):
        raise ValueError(f"weights must be at least one number, each in [0, 1], got {weights!r:.80}")
    return [float(w) for w in weights]


def steps_of_strength(strength: float, num_inference_steps: int) -> int:
    """How many steps a strength is: ``round(strength * num_inference_steps)``, the last ones.

    Raises:
        TypeError, ValueError: the strength is not in (0, 1], or leaves no step.
    """
    if not isinstance(strength, Real) or isinstance(strength, bool):
        raise TypeError(f"strength must be a number in (0, 1], got {strength!r}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1] (1: all steps), got {strength}")
    count = round(float(strength) * num_inference_steps)
    if count == 0:
        # Rounded up, so that the value named is one that is accepted.
        smallest = (math.floor(0.5e6 / num_inference_steps) + 1) / 1e6
        raise ValueError(
            f"strength must leave a step: at least {smallest} with {num_inference_steps} steps, got {strength}"
        )
    return count


def check_left_out(method: str, source: str, options: Iterable[str]) -> None:
    """Raise TypeError where options of ``sample`` are given that ``method`` takes from its argument ``source``."""
    if given := [name for name in ("shape", "x_T", "device", "dtype") if name in options]:
        raise TypeError(
            f"{method} takes its start, and shape, device and dtype, from {source}, got {given[0]}: leave it out"
        )
