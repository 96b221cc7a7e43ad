"""Inversion: find the noise x_T from which a deterministic sampler makes a given picture.

The steps are walked backwards. What a step does to x_t depends on the model's output at x_t, which
is the unknown. A plain inversion uses the output at x_prev instead, which makes an error; more
iterations solve the equation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels.contract import StepCoefficients
from ..kernels.dispatch import ddim_step
from ..models.protocol import Model
from ..plans.coefficients import ddim_coefficients, inversion_coefficients, newton_coefficients
from ..plans.plan import PlannedStep, SamplingPlan
from ..utils.checks import check_alike, check_integer, check_number, check_samples
from ..utils.devices import widened
from ..utils.progress import tqdm
from .capture import GraphCache
from .finite import Look, is_bad, warn_of_bad
from .guidance import guidance_scales
from .initial_state import check_batched, conditionings_of, warn_of_levels
from .loop import Loop, Trajectory, begins_steps, model_calls
from .model_times import model_times
from .options import Options
from .run import sample


def invert(
    plan: SamplingPlan,
    model: Model,
    x0: Tensor,
    options: Options,
    *,
    iterations: int = 1,
    tolerance: float | None = None,
) -> Tensor | Trajectory:
    """Walk the steps of an unclipped plan backwards: see ``DDIMSampler.invert``."""
    guidance, observation = options.guidance, options.observation
    if plan.eta != 0:
        raise ValueError(f"only a deterministic sampler has an inverse, got eta={plan.eta}: make one with eta=0")
    if plan.order != 1:
        raise ValueError(
            f"a step that is inverted must depend on one state, got order={plan.order}, where it depends on the step before, too: "
            "make a sampler with order=1"
        )
    _check_iterations(iterations, tolerance)
    check_samples("x0", x0)
    check_batched(model, "x0", x0.shape)
    warn_of_levels(x0)
    scales = guidance_scales(guidance.guidance_scale, plan.timesteps)
    conditionings = conditionings_of(model, guidance.conditioning, scales, guidance.unconditional_conditioning)
    x_prev = x0.detach().clone(memory_format=torch.contiguous_format)

    def like_x0(wanted: bool) -> Tensor | None:
        return torch.empty_like(x_prev) if wanted else None

    loop = Loop(
        x_t=torch.empty_like(x_prev),
        calls=model_calls(model, conditionings),
        begin=begins_steps(model),
        guidance_scales=scales,
        x0=like_x0(observation.return_trajectory),
        model_input=like_x0(plan.scales_input),
    )
    search = _Search(loop, x_prev, iterations, tolerance, like_x0(tolerance is not None), options.execution.backend)
    rows = [_Rows.of(step, plan) for step in plan.steps]  # all of them before the first model call
    timesteps = model_times(plan, x0.device, len(x0))
    trajectory = Trajectory()
    bar = tqdm(plan.steps[::-1], desc="inverting", unit="step", disable=not observation.progress)
    with torch.no_grad(), bar:
        for step in bar:
            search.back(step, rows[step.index], timesteps[step.index])
            if observation.return_trajectory:  # x_t and x_prev have changed places
                assert loop.x0 is not None
                trajectory.add(step.t, search.came_from, loop.x0)

    def run_again(look: Look) -> Tensor:
        watched = options.replace(return_trajectory=True, check_finite=False, progress=False)
        again = invert(plan, model, x0, watched, iterations=iterations, tolerance=tolerance)
        assert isinstance(again, Trajectory)
        for step, x_prev, predicted in zip(plan.steps[::-1], again.x_t, again.x0, strict=False):
            if look(step.index, step.t, x_prev, predicted):
                break
        return again.samples

    if is_bad(search.x_prev, observation.check_finite):
        warn_of_bad(search.x_prev, run_again, plan.num_inference_steps)
    if observation.return_trajectory:
        trajectory.x_t.append(search.x_prev)
        return trajectory
    return search.x_prev


def reconstruct(
    plan: SamplingPlan,
    model: Model,
    x0: Tensor,
    options: Options,
    graphs: GraphCache,
    *,
    iterations: int = 1,
    tolerance: float | None = None,
) -> Tensor:
    """Invert samples and sample them again by an unclipped plan: see ``DDIMSampler.reconstruct``."""
    x_T = invert(plan, model, x0, options, iterations=iterations, tolerance=tolerance)
    assert isinstance(x_T, Tensor)  # no trajectory was asked for
    if is_bad(x_T, options.observation.check_finite):
        options = options.replace(check_finite=False)  # it has been said
    # A seed from which nothing is made, so that torch's own generator is left alone.
    again = sample(plan, model, None, options.replace(x_T=x_T, seed=0), graphs)
    assert isinstance(again, Tensor)  # no trajectory was asked for
    return again


def reconstruction_error(x0: Tensor, reconstructed: Tensor, *, clip_sample_range: float = 1.0) -> Tensor:
    """Return the mean squared error of each sample per dimension, as in table 2 of the DDIM paper:
    ``(B,)`` float64, float32 on a device that lacks it.

    Args:
        clip_sample_range: samples are in [-range, range], which is scaled to [0, 1].

    Raises:
        TypeError, ValueError: the tensors are not samples, or differ in shape, dtype or device; or
            the range is not positive.
    """
    check_samples("x0", x0)
    check_samples("reconstructed", reconstructed)
    check_alike("reconstructed", reconstructed, "x0", x0)
    check_number("clip_sample_range", clip_sample_range, above=0)
    difference = (widened(reconstructed) - widened(x0)) / (2 * clip_sample_range)
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
        at_t, at_prev = (plan.meaning_at(level) for level in (step.level_t, step.level_prev))
        return cls(
            inversion_coefficients(step.level_t, step.level_prev, at_t),
            ddim_coefficients(step.level_prev, step.level_t, at_prev),
            newton_coefficients(step.level_t, step.level_prev, plan.prediction_type, at_t),
        )


@dataclass(eq=False)
class _Search:
    """The inversion, step by step.

    Attributes:
        loop: ``x_t`` is the guess of where a step came from; ``x0`` the prediction from it, if
            wanted.
        x_prev: like ``x_t``: where the step leads. After each step the two are swapped.
        next_guess: like ``x_t``, to measure the change between two guesses; or None.
        outputs: those of the last model call, with its guidance scale; empty before the first.
    """

    loop: Loop
    x_prev: Tensor
    iterations: int
    tolerance: float | None
    next_guess: Tensor | None
    backend: str | None
    outputs: dict[str, Any] = field(default_factory=dict)

    @property
    def came_from(self) -> Tensor:
        """The x_prev of the last step back."""
        return self.loop.x_t

    def back(self, step: PlannedStep, rows: _Rows, t: Tensor) -> None:
        """Go back over one step; ``t`` ``(B,)`` is what the model is told there."""
        loop = self.loop
        if self.iterations == 1 or not self.outputs:
            loop.x_t.copy_(self.x_prev)
        else:
            self._step(self.x_prev, rows.encoding, loop.x_t)
        row = rows.plain if self.iterations == 1 else rows.newton
        for _ in range(self.iterations):
            self.predict(step, t)
            if self.tolerance is None:
                self._step(loop.x_t, row, loop.x_t, noise=self.x_prev)
            elif self._change(row) <= self.tolerance:
                break
        loop.x_t, self.x_prev = self.x_prev, loop.x_t

    def predict(self, step: PlannedStep, t: Tensor) -> None:
        self.loop.prepare_input(step.input_scale)
        model_output, uncond = self.loop.predict(t)
        scales = self.loop.guidance_scales
        scale = None if uncond is None or scales is None else scales[step.index]
        self.outputs = {"model_output": model_output, "model_output_uncond": uncond, "guidance_scale": scale}

    def _step(self, x: Tensor, row: StepCoefficients, out: Tensor, noise: Tensor | None = None) -> None:
        ddim_step(x, coefficients=row, noise=noise, out=out, x0_out=self.loop.x0, backend=self.backend, **self.outputs)

    def _change(self, row: StepCoefficients) -> float:
        """Make the next guess, and return by how much any element changed at most."""
        loop, guess = self.loop, self.next_guess
        assert guess is not None
        self._step(loop.x_t, row, guess, noise=self.x_prev)
        loop.x_t, self.next_guess = guess, loop.x_t
        return float((loop.x_t - self.next_guess).abs().max()) if guess.numel() else 0.0


def _check_iterations(iterations: object, tolerance: object) -> None:
    check_integer("iterations", iterations, at_least=1, remedy="1 is the plain inversion")
    if tolerance is None:
        return
    check_number("tolerance", tolerance, at_least=0)
    if iterations == 1:
        raise ValueError(
            f"tolerance ends iterations early, and there is only one, got tolerance={tolerance}: set iterations to the most you allow"
        )
