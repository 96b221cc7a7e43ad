"""What is put to a subject: a setting of a sampler, one step of it, and what came of it. Data only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import oracle

CLEAN = -1
"""The timestep of clean data, after the last step."""

Model = Callable[[Tensor, Tensor], Tensor]
"""``model(x_t, t)``: samples ``(B, C, ...)`` and timesteps ``(B,)`` to the model's output, like ``x_t``."""


class Level(NamedTuple):
    """One step of a run as the subject's own tables have it: where it stands and where it goes, in float64."""

    t: float
    t_prev: float
    alpha_bar_t: float
    alpha_bar_prev: float


@dataclass(frozen=True)
class Setting:
    """A sampler as everybody in the field would describe it.

    Args:
        num_inference_steps, timestep_spacing: the timesteps to visit, by a convention: "leading", "trailing" or "linspace".
        timesteps: instead: these, strictly decreasing.
        alpha_bars: instead: steps between these noise levels, (alpha_bar_t, alpha_bar_prev) each; for subjects with "levels".
        schedule, num_train_timesteps, zero_terminal_snr: the noise schedule, see ``oracle.alphas_cumprod``.
        clip_sample_range: x0 is clipped to [-range, range]; no clipping if none.
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
        return replace(self, **changes)

    def alphas_cumprod(self) -> np.ndarray:
        """The truth: float64, ``(num_train_timesteps,)``."""
        found = oracle.alphas_cumprod(self.schedule, self.num_train_timesteps)
        return oracle.zero_terminal_snr(found) if self.zero_terminal_snr else found

    def levels(
        self, timesteps: list[float] | None = None, alphas_cumprod: np.ndarray | None = None, final: float = 1.0
    ) -> tuple[Level, ...]:
        """Each step to the next of these timesteps, the last to clean data. alpha_bar is NaN where there is no such timestep.

        Args:
            timesteps: those that the setting names, if none.
            alphas_cumprod: the truth's, if none.
            final: alpha_bar of clean data.
        """
        if self.alpha_bars is not None:
            count = len(self.alpha_bars)
            return tuple(Level(count - 1 - i, count - 2 - i, *pair) for i, pair in enumerate(self.alpha_bars))
        if timesteps is None:
            timesteps = self.timesteps
        if timesteps is None:
            timesteps = oracle.timesteps(self.timestep_spacing, self.num_inference_steps, self.num_train_timesteps)
        bars = self.alphas_cumprod() if alphas_cumprod is None else alphas_cumprod
        known = [0 <= t < len(bars) and float(t).is_integer() for t in timesteps]
        bar = [float(bars[int(t)]) if exists else math.nan for t, exists in zip(timesteps, known, strict=True)]
        bar.append(final)
        pairs = zip(timesteps, [*timesteps[1:], CLEAN], strict=True)
        return tuple(Level(*pair, bar[i], bar[i + 1]) for i, pair in enumerate(pairs))

    @property
    def steps(self) -> int:
        """How many steps are asked for."""
        return len(self.alpha_bars or self.timesteps or range(self.num_inference_steps))


@dataclass(frozen=True)
class StepCase:
    """One step: number ``index`` of a setting, from these samples and this output of the model, both ``(B, C, ...)``.

    Args:
        noise: z, where the subject takes it.
        source: where the subject gets noise from otherwise, made by ``Subject.source``.
        in_place: write the result over ``x_t``, where the subject can.
        more: arguments that few subjects have, by the names of ``ddim_step``: ``model_output_uncond`` and ``guidance_scale``,
            ``thresholds``, ``mask`` and ``known_x0`` and ``known_noise``.
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
        return replace(self, **changes)

    @property
    def dtype(self) -> torch.dtype:
        return self.x_t.dtype


class StepResult(NamedTuple):
    """What a step gave: x_prev, and the predicted x0 where the subject tells it."""

    x_prev: Tensor
    x0: Tensor | None = None


@dataclass(frozen=True)
class Observed:
    """One step of a run that was watched."""

    level: Level
    x_t: Tensor
    model_output: Tensor
    x_prev: Tensor
    x0: Tensor | None = None
