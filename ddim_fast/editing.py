"""What a run starts with: seeds, noise, a noised picture, a known region, a point between two noises; and the methods that start so.

``img2img``, ``inpaint`` and ``interpolate`` are methods of ``DDIMSampler``. Each makes a start and leaves the rest to its ``sample``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .kernels.dispatch import ddim_step, normals
from .kernels.noise import NoiseStream, sample_seeds
from .models import Model
from .update import known_region_coefficients, noising_coefficients

if TYPE_CHECKING:
    from .sampler import DDIMSampler, Trajectory

BEFORE_THE_FIRST_STEP = (1 << 32) - 1
"""Step -1 of the noise standard's stream KNOWN_REGION: the noise of the known region at x_T, which no step makes."""


def check_samples(name: str, value: object) -> None:
    """Raise TypeError where ``value`` is no floating-point tensor ``(B, C, ...)``."""
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point or value.ndim < 2:
        raise TypeError(f"{name} must be a floating-point tensor (B, C, ...), got {value!r:.80}")


def check_alike(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError where two tensors of samples differ in shape, dtype or device."""
    for what in ("shape", "dtype", "device"):
        wanted, got = getattr(other, what), getattr(value, what)
        if wanted != got:
            shown = [tuple(x) if what == "shape" else x for x in (wanted, got)]
            raise ValueError(
                f"{name} must have the {what} of {other_name}, {shown[0]}, got {shown[1]}: convert one of them"
            )


def check_left_out(method: str, source: str, options: Iterable[str]) -> None:
    """Raise TypeError where options of ``sample`` are given that ``method`` takes from its argument ``source``."""
    if given := [name for name in ("shape", "x_T", "device", "dtype") if name in options]:
        raise TypeError(
            f"{method} takes its start, and shape, device and dtype, from {source}, got {given[0]}: leave it out"
        )


def seeds_of_samples(seed, seeds, generator, batch_size: int) -> Tensor | None:
    """``(B,)`` int64 on the host: the seed of each sample; None where noise comes from a generator."""
    if generator is None:
        return _per_sample_seeds(seed, seeds, batch_size)
    if seed is not None or seeds is not None:
        raise ValueError("noise comes from one place: pass seed, seeds or generator, got generator and another")
    return None


def _per_sample_seeds(seed: int | None, seeds, batch_size: int) -> Tensor:
    """``(B,)`` int64 from one seed, a list of seeds, or torch's global generator."""
    if seed is not None and seeds is not None:
        raise ValueError("noise comes from one place: pass seed or seeds, got both")
    if seeds is None:
        seed = int(torch.randint(2**63 - 1, ())) if seed is None else _integer("seed", seed)
        return torch.from_numpy(sample_seeds(seed, batch_size))
    if isinstance(seeds, (Tensor, np.ndarray)):
        seeds = seeds.tolist()
    if not isinstance(seeds, Sequence):
        raise TypeError(f"seeds must be a list of integers, one per sample, got {seeds!r}: for one number use seed")
    if len(seeds) != batch_size:
        raise ValueError(f"seeds must have one entry per sample, {batch_size}, got {len(seeds)}")
    seeds = [_integer("a seed", s) for s in seeds]
    if bad := [s for s in seeds if not -(1 << 63) <= s < 1 << 64]:
        raise ValueError(f"a seed must fit in 64 bits, got {bad[0]}")
    return torch.tensor([s - (1 << 64) if s >= 1 << 63 else s for s in seeds], dtype=torch.int64)


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got the {type(value).__name__} {value!r}") from None


def start(shape, x_T, per_sample, generator, device, dtype) -> Tensor:
    """x_T, in memory of its own. Outside inference mode, so that the caller gets ordinary tensors."""
    if x_T is not None:
        return x_T.detach().clone(memory_format=torch.contiguous_format)
    if generator is not None:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)
    return normals(per_sample, shape[1:], 0, NoiseStream.INITIAL, dtype)


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


def noised(x0: Tensor, alpha_bar_t: float, seeds: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """x0 at a noise level (equation 4 of the DDIM paper), in one kernel pass.

    The noise is what ``sample`` would start from: of the stream INITIAL, or the generator's next ``randn``.
    """
    x0 = x0.detach()
    noise = None
    if generator is not None:
        noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
    seeds = None if seeds is None else seeds.to(x0.device)
    row = noising_coefficients(alpha_bar_t)
    return ddim_step(x0, x0, row, noise=noise, seeds=seeds, noise_stream=NoiseStream.INITIAL)


def known_region(mask: Tensor | None, known_x0: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask in shape, dtype and device of ``known_x0``, and ``known_x0``, both contiguous; or neither.

    Raises:
        TypeError, ValueError: only one is given, a type or shape is wrong, or the mask leaves [0, 1]. (That is looked at on the CPU only:
            elsewhere it would wait for the device.)
    """
    if mask is None and known_x0 is None:
        return None, None
    if mask is None or known_x0 is None:
        have, lack = ("known_x0", "mask") if mask is None else ("mask", "known_x0")
        raise ValueError(f"inpainting needs both mask and known_x0, got only {have}: pass {lack}, too, or neither")
    check_samples("known_x0", known_x0)
    if not isinstance(mask, Tensor) or mask.is_complex():
        raise TypeError(f"mask must be a real tensor, 1 where the picture is known, got {mask!r:.80}")
    mask = mask.detach()
    if mask.device.type == "cpu" and not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError(
            f"mask must be from 0 (drawn anew) to 1 (known), got {mask.min().item()} to {mask.max().item()}: scale it"
        )
    try:
        mask = mask.expand(known_x0.shape)
    except RuntimeError:
        raise ValueError(
            f"mask must broadcast to known_x0, {tuple(known_x0.shape)}, got {tuple(mask.shape)}: "
            "for instance (B, 1, H, W), or (H, W)"
        ) from None
    return mask.to(known_x0.device, known_x0.dtype).contiguous(), known_x0.detach().contiguous()


def blend_known_region(
    x_t: Tensor,
    mask: Tensor,
    known_x0: Tensor,
    alpha_bar_t: float,
    seeds: Tensor | None,
    generator: torch.Generator | None,
    backend: str | None,
) -> None:
    """Put the known picture into the start x_T, in place and at its noise level, as every step does for its x_prev."""
    row = known_region_coefficients(alpha_bar_t)
    known_noise = None
    if generator is not None:
        known_noise = torch.randn(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)
    ddim_step(
        x_t,
        x_t,
        row,
        mask=mask,
        known_x0=known_x0,
        known_noise=known_noise,
        seeds=seeds,
        noise_step=BEFORE_THE_FIRST_STEP,
        out=x_t,
        backend=backend,
    )


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


def repeat_conditioning(conditioning: Mapping[str, Any] | None, batch_size: int, times: int) -> dict[str, Any] | None:
    """Conditioning for a batch that is ``times`` copies of one of ``batch_size``: tensors whose first size is that are repeated."""
    if conditioning is None:
        return None

    def repeat(tensor: Tensor) -> Tensor:
        of_batch = tensor.ndim > 0 and len(tensor) == batch_size
        return tensor.repeat(times, *[1] * (tensor.ndim - 1)) if of_batch else tensor

    return tree_map_only(Tensor, repeat, dict(conditioning))


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
        TypeError, ValueError: as ``sample`` and ``img2img``; or the mask does not fit, or leaves [0, 1].
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
