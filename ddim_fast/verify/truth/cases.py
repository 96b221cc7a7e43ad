"""The inputs and outputs of a subject: a sampler's setting, one step, and its result. Data only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import oracle

CLEAN = -1
"""The timestep that stands for clean data, after the last step."""

Model = Callable[[Tensor, Tensor], Tensor]
"""``model(x_t, t)`` returns the model's output, like ``x_t``: samples ``(B, C, ...)``, timesteps
``(B,)``."""


class Level(NamedTuple):
    """The timesteps and noise levels between which a step goes, from the subject's own tables, in
    float64."""

    t: float
    t_prev: float
    alpha_bar_t: float
    alpha_bar_prev: float

    def times(self, x_t: Tensor) -> Tensor:
        """Return ``t`` for a model's call with ``x_t``, ``(B,)``: int64 where it is an integer."""
        dtype = torch.int64 if isinstance(self.t, int) else torch.float32
        return torch.full((len(x_t),), self.t, dtype=dtype, device=x_t.device)


@dataclass(frozen=True)
class Setting:
    """The options of a sampler, by their usual names.

    Args:
        num_inference_steps, timestep_spacing: choose the timesteps; "leading", "trailing" or
            "linspace".
        timesteps: used instead, strictly decreasing.
        alpha_bars: used instead: the (alpha_bar_t, alpha_bar_prev) of each step; for subjects with
            the feature "levels".
        schedule, num_train_timesteps, zero_terminal_snr: the noise schedule, see
            ``oracle.alphas_cumprod``.
        clip_sample_range: x0 is clipped to [-range, range]; None for no clipping.
    """

    num_inference_steps: int = 10
    timestep_spacing: str = "leading"
    timesteps: tuple[int, ...] | None = None
    alpha_bars: tuple[tuple[float, float], ...] | None = None
    schedule: str = "linear"
    num_train_timesteps: int = 1000
    zero_terminal_snr: bool = False
    prediction_type: str = "epsilon"
    eta: float = 0.0
    clip_sample_range: float | None = None
    use_clipped_model_output: bool = False

    def but(self, **changes: Any) -> Setting:
        """Return a copy with these fields changed."""
        return replace(self, **changes)

    def alphas_cumprod(self) -> np.ndarray:
        """Return the exact schedule, float64, ``(num_train_timesteps,)``."""
        found = oracle.alphas_cumprod(self.schedule, self.num_train_timesteps)
        return oracle.zero_terminal_snr(found) if self.zero_terminal_snr else found

    def levels(
        self, timesteps: Sequence[float] | None = None, alphas_cumprod: np.ndarray | None = None, final: float = 1.0
    ) -> tuple[Level, ...]:
        """Return the steps of a run, each to the next timestep and the last to clean data.

        alpha_bar is NaN where the schedule has no such timestep.

        Args:
            timesteps: those of the setting by default.
            alphas_cumprod: the exact schedule by default.
            final: alpha_bar of clean data.
        """
        if self.alpha_bars is not None:
            count = len(self.alpha_bars)
            return tuple(Level(count - 1 - i, count - 2 - i, *pair) for i, pair in enumerate(self.alpha_bars))
        visited = self.timesteps if timesteps is None else timesteps
        if visited is None:
            visited = oracle.timesteps(self.timestep_spacing, self.num_inference_steps, self.num_train_timesteps)
        bars = self.alphas_cumprod() if alphas_cumprod is None else alphas_cumprod
        exists = [0 <= t < len(bars) and float(t).is_integer() for t in visited]
        bar = [float(bars[int(t)]) if there else math.nan for t, there in zip(visited, exists, strict=True)]
        bar.append(final)
        pairs = zip(visited, [*visited[1:], CLEAN], strict=True)
        return tuple(Level(t, t_prev, bar[i], bar[i + 1]) for i, (t, t_prev) in enumerate(pairs))

    @property
    def steps(self) -> int:
        """The number of steps asked for."""
        return len(self.alpha_bars or self.timesteps or range(self.num_inference_steps))


@dataclass(frozen=True, eq=False)
class StepCase:
    """Step number ``index`` of a setting, from given samples and model output, both ``(B, C,
    ...)``.

    Args:
        noise: z, for subjects that take it.
        source: the source of noise for other subjects, made by ``Subject.source``.
        in_place: write the result over ``x_t``.
        more: arguments that few subjects have, by the names of ``ddim_step``:
            ``model_output_uncond``, ``guidance_scale``, ``thresholds``, ``mask``, ``known_x0`` and
            ``known_noise``.
    """

    setting: Setting
    index: int
    x_t: Tensor
    model_output: Tensor
    noise: Tensor | None = None
    source: Any = None
    in_place: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> StepCase:
        """Return a copy with these fields changed."""
        return replace(self, **changes)

    def copied(self) -> StepCase:
        """Return the case with copies of x_t and the model output, which a step may then write to."""
        return self.but(x_t=self.x_t.clone(), model_output=self.model_output.clone())

    @property
    def dtype(self) -> torch.dtype:
        return self.x_t.dtype


class StepResult(NamedTuple):
    """The result of a step: x_prev, and the predicted x0 where the subject returns it."""

    x_prev: Tensor
    x0: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Observed:
    """One step of a run, seen through the calls of its model."""

    level: Level
    x_t: Tensor
    model_output: Tensor
    x_prev: Tensor
    x0: Tensor | None = None
