"""Runs of a sampler that can start at any step and that give the model's output at each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels.dispatch import ddim_step, normals
from ..kernels.noise import NoiseStream, sample_seeds
from ..models.protocol import Model
from ..plans.plan import PlannedStep, SamplingPlan
from ..sampling.guidance import guidance_scales, guided_output
from ..sampling.initial_state import conditionings_of
from ..sampling.loop import Loop, begins_steps, model_calls

Progress = Callable[[int], Any]


@dataclass(frozen=True, eq=False)
class State:
    """The state between two steps: the samples ``(B, C, ...)``, from order 2 on the x0 of the step
    before, and in a run of order 3 that of the step before it."""

    x_t: Tensor
    x0_last: Tensor | None = None
    x0_last_2: Tensor | None = None


@dataclass(eq=False)
class Runs:
    """Deterministic runs of one model from one set of noise.

    Args:
        model: see ``models.Model``.
        start: standard normal ``(B, C, ...)`` float32, on the model's device: x_T of every run, but
            for its standard deviation.
        conditioning: for the whole batch.
        batch_size: of the model's calls.
        progress: called with the number of samples of each model call.
    """

    model: Model
    start: Tensor
    conditioning: Mapping[str, Any] | None = None
    guidance_scale: float | None = None
    batch_size: int = 64
    progress: Progress = field(default=lambda calls: None)

    @classmethod
    def from_seed(
        cls, model: Model, shape: Sequence[int], count: int, seed: int, device: torch.device, **others: Any
    ) -> Runs:
        """Return runs from the noise that ``DDIMSampler.sample(seed=seed)`` starts from."""
        seeds = torch.from_numpy(sample_seeds(seed, count)).to(device)
        return cls(model, normals(seeds, tuple(shape), 0, NoiseStream.INITIAL), **others)

    @torch.no_grad()
    def predict(self, x_t: Tensor, step: PlannedStep) -> Tensor:
        """Return the model's output for a step from x_t ``(B, C, ...)``, with guidance where there
        is a scale."""
        scales = guidance_scales(self.guidance_scale, (step.model_timestep,))
        scale = None if scales is None else scales[0]
        begin, outputs = begins_steps(self.model), torch.empty_like(x_t)
        for first in range(0, len(x_t), self.batch_size):
            part = slice(first, first + self.batch_size)
            x = x_t[part] if step.input_scale == 1 else x_t[part] * step.input_scale
            own = {
                name: value[part] if torch.is_tensor(value) else value
                for name, value in (self.conditioning or {}).items()
            }
            times = torch.full((len(x),), step.model_time, dtype=step.time_dtype, device=x.device)
            calls = model_calls(self.model, conditionings_of(self.model, own, scales, None))
            m, uncond = Loop(x_t=x, calls=calls, begin=begin, guidance_scales=scales).predict(times)
            self.progress(len(x) * (1 if uncond is None else 2))
            if uncond is not None and scale is not None:
                m = guided_output(m, uncond, scale, 0.0, x.dtype)
            outputs[part] = m  # a copy: the next call may use its memory again
        return outputs

    def first_state(self, plan: SamplingPlan) -> State:
        """Return the state that runs of a plan start from."""
        return State(self.start if plan.initial_std_dev == 1 else self.start * plan.initial_std_dev)

    def run(self, plan: SamplingPlan, first: int = 0, states: list[State] | None = None) -> list[State]:
        """Return all S + 1 states of a run.

        Args:
            first: the number of the first step that differs from an earlier run.
            states: the states of that earlier run.
        """
        states = [self.first_state(plan)] if states is None else states[: first + 1]
        for step in plan.steps[first:]:
            states.append(after(states[-1], step, self.predict(states[-1].x_t, step), plan.order))
        return states


@torch.no_grad()
def after(state: State, step: PlannedStep, m: Tensor, order: int) -> State:
    """Return the state after a step with the model's output ``m``, in new memory."""
    if order == 1:
        return State(ddim_step(state.x_t, m, step.coefficients))
    history = _copied(state.x0_last, state.x_t)
    history_2 = _copied(state.x0_last_2, state.x_t) if order > 2 else None
    return State(ddim_step(state.x_t, m, step.coefficients, history=history, history_2=history_2), history, history_2)


def _copied(history: Tensor | None, x_t: Tensor) -> Tensor:
    return torch.empty_like(x_t) if history is None else history.clone()
