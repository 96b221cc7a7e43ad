"""The inputs and outputs of a subject: a sampler's setting, one step, and its result. Data only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import oracle
from .oracle import AnyLevel, NoiseLevel
from .paths import Path, path_of

CLEAN = -1
"""The timestep that stands for clean data, after the last step, where timesteps are discrete."""

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow", "score", "edm")
"""What a model may predict, in the order in which settings are made; ``oracle.split`` defines each."""

Model = Callable[[Tensor, Tensor], Tensor]
"""``model(x_t, t)`` returns the model's output, like ``x_t``: samples ``(B, C, ...)``, timesteps
``(B,)``."""


class Level(NamedTuple):
    """The timesteps and noise levels between which a step goes, from the subject's own tables, in
    float64.

    ``level_t`` and ``level_prev`` are alpha_bars, or pairs (alpha, sigma): see ``oracle``.
    """

    t: float
    t_prev: float
    level_t: AnyLevel
    level_prev: AnyLevel

    @property
    def alpha_bar_t(self) -> float:
        return oracle.alpha_bar(self.level_t)

    @property
    def alpha_bar_prev(self) -> float:
        return oracle.alpha_bar(self.level_prev)

    def __str__(self) -> str:
        names = "alpha_bar_t", "alpha_bar_prev"
        if isinstance(self.level_t, NoiseLevel) or isinstance(self.level_prev, NoiseLevel):
            names = "(alpha_t, sigma_t)", "(alpha_prev, sigma_prev)"
        values = (shown_level(level) for level in (self.level_t, self.level_prev))
        return " to ".join(f"{name} = {value}" for name, value in zip(names, values, strict=True))

    def times(self, x_t: Tensor) -> Tensor:
        """Return ``t`` for a model's call with ``x_t``, ``(B,)``: int64 where it is an integer."""
        dtype = torch.int64 if isinstance(self.t, int) else torch.float32
        return torch.full((len(x_t),), self.t, dtype=dtype, device=x_t.device)


def shown_level(level: AnyLevel) -> str:
    """Return a level in nine digits."""
    return "({:.9g}, {:.9g})".format(*level) if isinstance(level, NoiseLevel) else f"{level:.9g}"


@dataclass(frozen=True)
class Setting:
    """The options of a sampler, by their usual names.

    Args:
        num_inference_steps, timestep_spacing: choose the timesteps; "leading", "trailing" or
            "linspace". In continuous time the spacing is the path's own.
        timesteps: used instead, strictly decreasing.
        alpha_bars: used instead: the levels (alpha_bar_t, alpha_bar_prev) of each step, or pairs
            (alpha, sigma); for subjects with the feature "levels".
        schedule: a noise schedule of discrete timesteps, see ``oracle.alphas_cumprod``, or a path
            in continuous time, see ``paths.path_of``.
        divided: x_t is divided by sqrt(alpha_bar_t): x0 + sigma eps with sigma^2 = (1 - alpha_bar) /
            alpha_bar, as k-diffusion has it; the model is given x_t / sqrt(1 + sigma^2). For
            schedules of discrete timesteps; between them sigma is linear.
        num_train_timesteps, zero_terminal_snr: of that schedule.
        order: of the solver: 1 is DDIM, 2 and 3 its multistep forms.
        clip_sample_range: x0 is clipped to [-range, range]; None for no clipping.
    """

    num_inference_steps: int = 10
    timestep_spacing: str = "leading"
    timesteps: tuple[float, ...] | None = None
    alpha_bars: tuple[tuple[AnyLevel, AnyLevel], ...] | None = None
    schedule: str = "linear"
    divided: bool = False
    num_train_timesteps: int = 1000
    zero_terminal_snr: bool = False
    prediction_type: str = "epsilon"
    eta: float = 0.0
    clip_sample_range: float | None = None
    use_clipped_model_output: bool = False
    order: int = 1

    def but(self, **changes: Any) -> Setting:
        """Return a copy with these fields changed."""
        return replace(self, **changes)

    def __str__(self) -> str:
        shown = {one.name: getattr(self, one.name) for one in fields(self)}
        always = ("num_inference_steps", "schedule")
        return ", ".join(f"{k} = {v}" for k, v in shown.items() if k in always or v != getattr(Setting, k))

    def alphas_cumprod(self) -> np.ndarray:
        """Return the exact schedule, float64, ``(num_train_timesteps,)``."""
        found = oracle.alphas_cumprod(self.schedule, self.num_train_timesteps)
        return oracle.zero_terminal_snr(found) if self.zero_terminal_snr else found

    # ---- the noise path --------------------------------------------------------------------------------------------

    @property
    def path(self) -> Path | None:
        """The path in continuous time; None where timesteps are discrete."""
        return path_of(self.schedule)

    @property
    def name(self) -> str:
        """The path and what models predict on it, in words."""
        return f"{self.schedule}{' divided' if self.divided else ''} ({self.prediction_type})"

    @property
    def clean(self) -> float:
        """The timestep of clean data."""
        return CLEAN if self.path is None else 0.0

    @property
    def sigma_data(self) -> float:
        """The standard deviation of data for the prediction type "edm"."""
        return 0.5 if self.path is None else self.path.sigma_data

    def level_at(self, t: float) -> AnyLevel:
        """Return the exact level at a timestep; NaN where a discrete schedule has none."""
        if self.path is not None:
            return self.path.level(t)
        bars = self.alphas_cumprod()
        if self.divided:
            sigmas = np.sqrt((1 - bars) / bars)
            return NoiseLevel(1.0, float(np.interp(t, np.arange(len(bars)), sigmas)) if t >= 0 else 0.0)
        return float(bars[int(t)]) if 0 <= t < len(bars) and float(t).is_integer() else math.nan

    def told(self, t: float) -> float:
        """Return what the model is told at a timestep."""
        return t if self.path is None else self.path.told(t)

    def time_told(self, told: float) -> float:
        """Return the timestep at which the model is told this."""
        return told if self.path is None else self.path.time_told(told)

    def input_scale(self, t: float) -> float:
        """Return what x_t is multiplied by before the model sees it."""
        if self.divided:
            return 1 / math.hypot(1, oracle.alpha_sigma(self.level_at(t)).sigma)
        return 1.0 if self.path is None else self.path.input_scale(t)

    @property
    def starts_at_unit_scale(self) -> bool:
        """Whether a run's x_T has standard deviation 1, whichever level it starts at."""
        return not self.divided if self.path is None else self.path.starts_at_unit_scale

    def start_scale(self, level: AnyLevel) -> float:
        """Return the standard deviation of the x_T that a run starts from at this level."""
        return 1.0 if self.starts_at_unit_scale else oracle.alpha_sigma(level).sigma

    def as_called(self, model: Model) -> Model:
        """Return a model of (x_t, t) as the sampler calls it, with the scaled x_t and what it is
        told."""
        if self.path is None and not self.divided:
            return model

        def called(x: Tensor, told: Tensor) -> Tensor:
            t = self.time_told(float(told.reshape(-1)[0]))
            return model(unscaled(x, self.input_scale(t)), torch.full_like(told, t, dtype=torch.float64))

        return called

    def model_input(self, level: Level, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a model is called with at a level's timestep."""
        scale = self.input_scale(level.t)
        times = level._replace(t=self.told(level.t)).times(x_t)
        return (x_t if scale == 1 else (x_t.double() * scale).to(x_t.dtype)), times

    def levels(
        self, timesteps: Sequence[float] | None = None, alphas_cumprod: np.ndarray | None = None, final: float = 1.0
    ) -> tuple[Level, ...]:
        """Return the steps of a run, each to the next timestep and the last to clean data.

        alpha_bar is NaN where the schedule has no such timestep.

        Args:
            timesteps: those of the setting by default; in continuous time, those of the path.
            alphas_cumprod: the exact schedule by default.
            final: alpha_bar of clean data.
        """
        if self.alpha_bars is not None:
            count = len(self.alpha_bars)
            return tuple(Level(count - 1 - i, count - 2 - i, *pair) for i, pair in enumerate(self.alpha_bars))
        visited = self.timesteps if timesteps is None else timesteps
        if self.path is not None or self.divided:
            if visited is None:
                visited = self.path.times(self.num_inference_steps) if self.path else _linspace(self)
            at = [*map(self.level_at, visited), NoiseLevel(1.0, 0.0)]
            pairs = zip(visited, [*visited[1:], self.clean], strict=True)
            return tuple(Level(t, t_prev, at[i], at[i + 1]) for i, (t, t_prev) in enumerate(pairs))
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


def _linspace(setting: Setting) -> list[float]:
    return np.linspace(setting.num_train_timesteps - 1, 0, setting.num_inference_steps).tolist()


def unscaled(x: Tensor, scale: float) -> Tensor:
    """Return x / scale, rounded once."""
    return x if scale == 1 else (x.double() / scale).to(x.dtype)


def nearest(timesteps: Sequence[float], t: float) -> float:
    """Return the timestep of a run that a model was called at: ``t``, rounded on its way. (The check
    "model-input" says how far.)

    Raises:
        ValueError: ``t`` is none of them.
    """
    found = min(timesteps, key=lambda one: abs(one - t), default=math.nan)
    if not abs(found - t) <= max(1e-5 * abs(found), 1e-3):
        known = ", ".join(f"{one:g}" for one in sorted(timesteps, reverse=True))
        raise ValueError(f"the model must be called at the timesteps of the run ({known}), got {t:g}")
    return found


@dataclass(frozen=True, eq=False)
class StepCase:
    """Step number ``index`` of a setting, from given samples and model output, both ``(B, C,
    ...)``.

    Args:
        noise: z, for subjects that take it.
        source: the source of noise for other subjects, made by ``Subject.source``.
        in_place: write the result over ``x_t``.
        more: arguments that few subjects have, by the names of ``ddim_step``:
            ``model_output_uncond``, ``guidance_scale``, ``thresholds``, ``mask``, ``known_x0``,
            ``known_noise`` and ``log_prob_reduction``.
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


class ScoredStep(NamedTuple):
    """A step with its log-probability: x_prev, as it is stored, and ``log_prob``, ``(B,)``, or None
    where the step has no density."""

    x_prev: Tensor
    log_prob: Tensor | None


@dataclass(frozen=True, eq=False)
class Observed:
    """One step of a run, seen through the calls of its model.

    ``rounded`` is the relative error of x_t and x_prev: they are known from what the model was
    given, scaled and rounded.
    """

    level: Level
    x_t: Tensor
    model_output: Tensor
    x_prev: Tensor
    x0: Tensor | None = None
    rounded: float = 0.0
