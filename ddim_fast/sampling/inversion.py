"""Inversion: the noise x_T from which a deterministic sampler makes a given picture.

A sampler's steps are walked backwards. What a step does to x_t depends on the model's output at x_t, which is yet to be found. A plain
inversion takes the output at x_prev instead, and is off by that; more iterations solve the equation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..kernels.contract import StepCoefficients
from ..kernels.dispatch import ddim_step
from ..models.protocol import Model
from ..plans.coefficients import ddim_coefficients, inversion_coefficients, newton_coefficients
from ..plans.plan import PlannedStep, SamplingPlan
from ..utils.checks import check_alike, check_samples
from .guidance import GuidanceScale, guidance_scales
from .initial_state import conditionings_of
from .loop import Loop, Trajectory, model_calls

if TYPE_CHECKING:
    from ..sampler import DDIMSampler


def invert(
    sampler: DDIMSampler,
    model: Model,
    x0: Tensor,
    *,
    iterations: int = 1,
    tolerance: float | None = None,
    conditioning: Mapping[str, Any] | None = None,
    guidance_scale: GuidanceScale | None = None,
    unconditional_conditioning: Mapping[str, Any] | None = None,
    progress: bool = False,
    return_trajectory: bool = False,
    backend: str | None = None,
) -> Tensor | Trajectory:
    """x_T of clean samples: the sampler's own steps, each solved for where it came from, the last step first.

    The model is called at the timestep of the noisier end of a step, as in sampling, so the exact solution is the exact inverse.
    Nothing is clipped: sample from the result with ``clip_sample=False``, or use ``reconstruct``.

    Args:
        sampler: with eta = 0. A clipped step has no inverse: a sampler that was told to clip is refused. The range that a model
            states of itself is left out.
        x0: clean samples ``(B, C, ...)`` (not changed). Their dtype is computed in; float32 ends at a residual of about 3e-8 in each step.
        iterations: how often the model is called for a step (with guidance, twice as often). 1 is the plain inversion, with the output
            at (x_prev, t) for that at (x_t, t); for epsilon prediction, that of diffusers' DDIMInverseScheduler. With more, x_t starts
            from equation 14 of the DDIM paper with the last output at t_prev, and an iteration is a simplified Newton step. Each is
            one pass over memory.
        tolerance: end the iterations of a step where no element of the batch changed by more. The host waits for each iteration to know.
        conditioning, guidance_scale, unconditional_conditioning, progress, backend: as ``DDIMSampler.sample`` takes them.
        return_trajectory: return every state as a ``Trajectory`` from x0 to x_T; its ``x0`` are predicted from the last guess of x_t.

    Returns:
        x_T, like ``x0``; or a ``Trajectory``.

    Raises:
        TypeError, ValueError: an argument breaks a rule, the sampler has no inverse, or the model returns the wrong thing.
    """
    plan = _unclipped(sampler, model).plan(model)
    if plan.eta != 0:
        raise ValueError(f"only a deterministic sampler has an inverse, got eta={plan.eta}: make one with eta=0")
    if plan.order != 1:
        raise ValueError(
            f"a step is inverted by itself, and one of order={plan.order} depends on the step before, too: make a sampler with order=1"
        )
    _check_iterations(iterations, tolerance)
    check_samples("x0", x0)
    scales = guidance_scales(guidance_scale, plan.timesteps)
    conditionings = conditionings_of(model, conditioning, scales, unconditional_conditioning)
    x_prev = x0.detach().clone(memory_format=torch.contiguous_format)

    def like_x0(wanted: bool) -> Tensor | None:
        return torch.empty_like(x_prev) if wanted else None

    loop = Loop(
        x_t=torch.empty_like(x_prev),
        calls=model_calls(model, conditionings),
        guidance_scales=scales,
        thresholding=None,
        seeds=None,
        generator=None,
        noise=None,
        model_input=None,
        x_seen=None,
        x0=like_x0(return_trajectory),
    )
    search = _Search(loop, x_prev, iterations, tolerance, like_x0(tolerance is not None), backend)
    rows = [_Rows.of(step, plan) for step in plan.steps]  # all of them before the first model call
    timesteps = torch.tensor(plan.model_timesteps, device=x0.device)[:, None].expand(-1, len(x0))
    trajectory = Trajectory()
    bar = tqdm(plan.steps[::-1], desc="inverting", unit="step", disable=not progress)
    with torch.inference_mode(), bar:
        for step in bar:
            search.back(step.index, rows[step.index], timesteps[step.index])
            if return_trajectory:  # x_t and x_prev have changed places
                trajectory.add(step.t, search.came_from, loop.x0)
    if return_trajectory:
        trajectory.x_t.append(search.x_prev)
        return trajectory
    return search.x_prev


def reconstruct(
    sampler: DDIMSampler,
    model: Model,
    x0: Tensor,
    *,
    iterations: int = 1,
    tolerance: float | None = None,
    conditioning: Mapping[str, Any] | None = None,
    guidance_scale: GuidanceScale | None = None,
    unconditional_conditioning: Mapping[str, Any] | None = None,
    progress: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Clean samples, inverted and sampled again by the same steps, without clipping. Arguments and errors are those of ``invert``.

    Returns:
        Samples like ``x0``: equal to them but for the error of the inversion. See ``reconstruction_error``.
    """
    options = {
        "conditioning": conditioning,
        "guidance_scale": guidance_scale,
        "unconditional_conditioning": unconditional_conditioning,
        "progress": progress,
        "backend": backend,
    }
    x_T = invert(sampler, model, x0, iterations=iterations, tolerance=tolerance, **options)
    # A seed that nothing is made of, so that torch's own generator is left alone.
    return _unclipped(sampler, model).sample(model, x_T=x_T, seed=0, **options)


def reconstruction_error(x0: Tensor, reconstructed: Tensor, *, clip_sample_range: float = 1.0) -> Tensor:
    """Mean squared error of each sample per dimension, as in table 2 of the DDIM paper: ``(B,)`` float64.

    Args:
        clip_sample_range: samples are in [-range, range], which is scaled to [0, 1].

    Raises:
        TypeError, ValueError: the tensors are no samples, or differ in shape, dtype or device; or the range is not positive.
    """
    check_samples("x0", x0)
    check_samples("reconstructed", reconstructed)
    check_alike("reconstructed", reconstructed, "x0", x0)
    if not 0 < clip_sample_range < math.inf:
        raise ValueError(f"clip_sample_range must be positive and finite, got {clip_sample_range}")
    difference = (reconstructed.double() - x0.double()) / (2 * clip_sample_range)
    return difference.square().flatten(1).mean(1)


@dataclass(frozen=True)
class _Rows:
    """The rows that lead back over a step.

    Attributes:
        plain: from a guess of x_t, the model's output for it, and x_prev as ``noise``.
        encoding: from x_prev and the model's output for x_prev (equation 14 of the DDIM paper).
        newton: as ``plain``.
    """

    plain: StepCoefficients
    encoding: StepCoefficients
    newton: StepCoefficients

    @classmethod
    def of(cls, step: PlannedStep, plan: SamplingPlan) -> _Rows:
        return cls(
            inversion_coefficients(step.alpha_bar_t, step.alpha_bar_prev, plan.prediction_type),
            ddim_coefficients(step.alpha_bar_prev, step.alpha_bar_t, plan.prediction_type),
            newton_coefficients(step.alpha_bar_t, step.alpha_bar_prev, plan.prediction_type),
        )


@dataclass
class _Search:
    """The way back, step by step.

    Attributes:
        loop: ``x_t`` is the guess of where a step came from; ``x0`` what is predicted from it, where wanted.
        x_prev: like ``x_t``: where the step leads to. After a step the two change places.
        next_guess: like ``x_t``, for the change between two guesses; or None.
        outputs: of the last model call, with its guidance scale.
    """

    loop: Loop
    x_prev: Tensor
    iterations: int
    tolerance: float | None
    next_guess: Tensor | None
    backend: str | None
    outputs: dict[str, Any] | None = None

    @property
    def came_from(self) -> Tensor:
        """x_prev of the last step back."""
        return self.loop.x_t

    def back(self, index: int, rows: _Rows, t: Tensor) -> None:
        """Go back over one step; ``t`` ``(B,)`` is its timestep."""
        loop = self.loop
        if self.iterations == 1 or self.outputs is None:
            loop.x_t.copy_(self.x_prev)
        else:
            self._step(self.x_prev, rows.encoding, loop.x_t)
        row = rows.plain if self.iterations == 1 else rows.newton
        for _ in range(self.iterations):
            self.predict(index, t)
            if self.tolerance is None:
                self._step(loop.x_t, row, loop.x_t, noise=self.x_prev)
            elif self._change(row) <= self.tolerance:
                break
        loop.x_t, self.x_prev = self.x_prev, loop.x_t

    def predict(self, index: int, t: Tensor) -> None:
        model_output, uncond = self.loop.predict(t)
        scale = None if uncond is None else self.loop.guidance_scales[index]
        self.outputs = {"model_output": model_output, "model_output_uncond": uncond, "guidance_scale": scale}

    def _step(self, x: Tensor, row: StepCoefficients, out: Tensor, noise: Tensor | None = None) -> None:
        ddim_step(x, coefficients=row, noise=noise, out=out, x0_out=self.loop.x0, backend=self.backend, **self.outputs)

    def _change(self, row: StepCoefficients) -> float:
        """Make the next guess, and say by how much any element changed."""
        loop = self.loop
        self._step(loop.x_t, row, self.next_guess, noise=self.x_prev)
        loop.x_t, self.next_guess = self.next_guess, loop.x_t
        return float((loop.x_t - self.next_guess).abs().max()) if loop.x_t.numel() else 0.0


def _unclipped(sampler: DDIMSampler, model: Model) -> DDIMSampler:
    """The sampler without the clipping that only the model suggests.

    Raises:
        ValueError: the sampler itself was told to clip.
    """
    asked = {
        "thresholding=True": sampler.thresholding is not None,
        "use_clipped_model_output=True": sampler.plan(model).use_clipped_model_output,
        "clip_sample=True": sampler.clip_sample,
        f"clip_sample_range={sampler.clip_sample_range}": sampler.clip_sample is None
        and sampler.clip_sample_range is not None,
    }
    if told := next((name for name in asked if asked[name]), None):
        raise ValueError(
            f"a step that clips has no inverse, got a sampler with {told}: make one with clip_sample=False"
        )
    unclipped = copy.copy(sampler)
    unclipped.clip_sample = False
    return unclipped


def _check_iterations(iterations: object, tolerance: object) -> None:
    if not isinstance(iterations, Integral) or isinstance(iterations, bool):
        raise TypeError(f"iterations must be an integer, got {iterations!r}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, the plain inversion, got {iterations}")
    if tolerance is None:
        return
    if not isinstance(tolerance, Real) or isinstance(tolerance, bool):
        raise TypeError(f"tolerance must be a number or None, got {tolerance!r}")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be finite and not negative, got {tolerance}")
    if iterations == 1:
        raise ValueError(
            f"tolerance={tolerance} ends iterations early, and there is only one: set iterations to the most you allow"
        )
