"""Runs of a sampler that are looked into: from any step on, and with what the model said at each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..guidance import guidance_scales
from ..kernels.dispatch import ddim_step, normals
from ..kernels.noise import NoiseStream, sample_seeds
from ..loop import model_calls
from ..models import Model, output_tensor
from ..plan import PlannedStep, SamplingPlan
from ..start import conditionings_of

Progress = Callable[[int], Any]


@dataclass(frozen=True)
class State:
    """Between two steps: the samples ``(B, C, ...)``, and the model's output of the step before, if any."""

    x_t: Tensor
    last: Tensor | None = None


@dataclass
class Runs:
    """Deterministic runs of one model from one set of noise.

    Args:
        model: see ``models.Model``.
        x_T: ``(B, C, ...)`` float32, on the model's device: where every run begins.
        conditioning: for the whole batch.
        batch_size: of the model's calls.
        progress: told of each call, by its number of samples.
    """

    model: Model
    x_T: Tensor
    conditioning: Mapping[str, Any] | None = None
    guidance_scale: float | None = None
    batch_size: int = 64
    progress: Progress = field(default=lambda calls: None)

    @classmethod
    def from_seed(
        cls, model: Model, shape: Sequence[int], count: int, seed: int, device: torch.device, **others: Any
    ) -> Runs:
        """Runs from the noise that ``DDIMSampler.sample(seed=seed)`` begins with."""
        seeds = torch.from_numpy(sample_seeds(seed, count)).to(device)
        return cls(model, normals(seeds, tuple(shape), 0, NoiseStream.INITIAL), **others)

    @torch.inference_mode()
    def predict(self, x_t: Tensor, t: int) -> Tensor:
        """The model's output at x_t ``(B, C, ...)``, guided where there is guidance."""
        scales = guidance_scales(self.guidance_scale, (t,))
        parts = []
        for first in range(0, len(x_t), self.batch_size):
            part = slice(first, first + self.batch_size)
            x = x_t[part]
            own = {
                name: value[part] if torch.is_tensor(value) else value
                for name, value in (self.conditioning or {}).items()
            }
            times = torch.full((len(x),), t, device=x.device)
            calls = model_calls(self.model, conditionings_of(self.model, own, scales, None))
            outputs = [output_tensor(call(x, times), x) for call in calls]
            self.progress(len(x) * len(calls))
            parts.append(outputs[0] if len(outputs) == 1 else torch.lerp(outputs[1], outputs[0], float(scales[0])))
        return torch.cat(parts).to(x_t.dtype)

    @torch.inference_mode()
    def step(self, state: State, step: PlannedStep, m: Tensor) -> State:
        """After one step, by the model's output ``m`` there."""
        return State(one_step(state.x_t, m, step, state.last), m)

    def run(self, plan: SamplingPlan, first: int = 0, states: list[State] | None = None) -> list[State]:
        """All states of a run, S + 1.

        Args:
            first: the number of the step from which on it differs from an earlier run.
            states: of that run.
        """
        states = [State(self.x_T)] if states is None else states[: first + 1]
        for step in plan.steps[first:]:
            states.append(self.step(states[-1], step, self.predict(states[-1].x_t, step.t)))
        return states


def one_step(x_t: Tensor, m: Tensor, step: PlannedStep, last: Tensor | None) -> Tensor:
    """x_prev in new memory; ``last`` is left as it is."""
    if not step.coefficients.reads_history:
        return ddim_step(x_t, m, step.coefficients)
    return ddim_step(x_t, m, step.coefficients, history=last.clone())
