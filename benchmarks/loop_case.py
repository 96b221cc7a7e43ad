"""A sampling loop to time, eta = 0: the contenders, and the float64 loop that each must match.

All use the same model, x_T and timesteps. diffusers' loop is that of its pipelines without image
processing: ``set_timesteps``, then for each timestep the model and ``step(...).prev_sample``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import ddim_fast as df
from ddim_fast.integrations.diffusers import FastDDIMScheduler
from ddim_fast.verify.truth import oracle

NUM_TRAIN_TIMESTEPS = 1000
TOLERANCE = {"ours": 1e-5, "ours, own loop": 1e-5}
"""Largest error relative to the largest magnitude of the exact result, by contender. ``OTHERS`` for
the rest, whose ``alphas_cumprod`` is a product of a thousand float32 numbers, or whose every
operation is rounded."""
OTHERS = 1e-4

Model = Callable[..., Tensor]


class LoopCase:
    """``steps`` steps from ``x_T`` with ``model(x, t, **conditioning)``, which predicts epsilon.

    ``exact`` is the same model in float64.
    """

    def __init__(
        self, model: Model, exact: Model, x_T: Tensor, steps: int, conditioning: Mapping[str, Tensor] | None = None
    ):
        self.model, self.exact, self.x_T, self.steps = model, exact, x_T, steps
        self.conditioning = conditioning or {}
        self.exact_result: np.ndarray | None = None

    def contenders(self) -> dict[str, Callable[[], Tensor]]:
        return {
            "ours": self.ours(),
            "ours, own loop": self.own_loop(),
            "ours, drop-in": self.by_scheduler(FastDDIMScheduler),
            "diffusers": self.by_scheduler(DDIMScheduler),
            "eager": self.eager(),
        }

    def ours(self) -> Callable[[], Tensor]:
        sampler = df.DDIMSampler(df.NoiseSchedule.linear(), self.steps, clip_sample=False)
        return lambda: sampler.sample(self.model, x_T=self.x_T, seed=0, conditioning=self.conditioning)

    def own_loop(self) -> Callable[[], Tensor]:
        """Return a user's loop around ``ddim_step``, in place."""
        sampler = df.DDIMSampler(df.NoiseSchedule.linear(), self.steps, clip_sample=False)
        steps = [(torch.tensor(step.t), step.coefficients) for step in sampler.plan().steps]
        model, conditioning, step = self.model, self.conditioning, df.ddim_step

        def run():
            x = self.x_T.clone()
            for t, row in steps:
                step(x, model(x, t, **conditioning), row, out=x)
            return x

        return run

    def by_scheduler(self, kind: type[DDIMScheduler]) -> Callable[[], Tensor]:
        scheduler = kind(num_train_timesteps=NUM_TRAIN_TIMESTEPS, beta_schedule="linear", clip_sample=False)
        model, conditioning = self.model, self.conditioning

        def run():
            scheduler.set_timesteps(self.steps)
            x = self.x_T
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t, **conditioning), t, x).prev_sample
            return x

        return run

    def eager(self) -> Callable[[], Tensor]:
        """Return equation 12 as a user would write it, with precomputed Python coefficients."""
        steps = [(torch.tensor(t), *_roots(a), *_roots(a_prev)) for t, a, a_prev in self._levels()]
        model, conditioning = self.model, self.conditioning

        def run():
            x = self.x_T
            for t, signal, spread, signal_prev, spread_prev in steps:
                m = model(x, t, **conditioning)
                x = signal_prev * (x - spread * m) / signal + spread_prev * m
            return x

        return run

    def model_alone(self) -> Callable[[], Tensor]:
        """Return a function that makes as many model calls as a loop."""
        model, conditioning = self.model, self.conditioning
        timesteps = [torch.tensor(t) for t, _, _ in self._levels()]

        def run():
            for t in timesteps:
                output = model(self.x_T, t, **conditioning)
            return output

        return run

    def check(self, name: str, result: Tensor) -> None:
        """Raise AssertionError if a contender's ``result`` is not that of the float64 loop."""
        exact = self._exact_output().numpy() if name == "model alone" else self._exact_result()
        worst = np.max(np.abs(result.double().numpy() - exact)) / np.max(np.abs(exact))
        allowed = TOLERANCE.get(name, OTHERS)
        assert worst <= allowed, (
            f"{name} is wrong: its relative error is {worst:.1g}, not {allowed:.0e}, so it is not timed"
        )

    def _exact_result(self) -> np.ndarray:
        if self.exact_result is None:
            x = self.x_T.double()
            for t, a, a_prev in self._levels():
                m = self._exact_output(x, t)
                x = torch.from_numpy(oracle.textbook_step("epsilon", x.numpy(), m.numpy(), a, a_prev)[0])
            self.exact_result = x.numpy()
        return self.exact_result

    def _exact_output(self, x: Tensor | None = None, t: int = 0) -> Tensor:
        """Return the float64 model's output at ``x`` and ``t``; by default at x_T and t = 0."""
        conditioning = {name: value.double() for name, value in self.conditioning.items()}
        return self.exact(self.x_T.double() if x is None else x, torch.tensor(t), **conditioning)

    def _levels(self) -> list[tuple[int, float, float]]:
        """Return (t, alpha_bar_t, alpha_bar_prev) of each step."""
        alpha_bars = oracle.alphas_cumprod("linear", NUM_TRAIN_TIMESTEPS)
        visited = oracle.timesteps("leading", self.steps, NUM_TRAIN_TIMESTEPS)
        levels = [*(float(alpha_bars[t]) for t in visited), 1.0]
        return list(zip(visited, levels[:-1], levels[1:], strict=True))


def _roots(alpha_bar: float) -> tuple[float, float]:
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
