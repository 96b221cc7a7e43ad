"""A diffusion model as a flow-matching model: the same network, asked about another path.

A sample on the straight path x_t = (1 - t) x0 + t eps, divided by sqrt((1 - t)^2 + t^2), is a
sample on the variance-preserving path with the same signal-to-noise ratio. So a model of the noise,
of x0 or of v that was trained on discrete timesteps gives the velocity eps - x0 at any flow time
within its range, exactly: nothing is trained or approximated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..plans.continuous import FlowSchedule
from ..plans.levels import NoiseLevel
from ..plans.schedules import NoiseSchedule
from ..plans.words import PredictionType
from ..utils.checks import check_choice, refuse
from ..utils.devices import widest_dtype
from .protocol import Model, output_tensor

__all__ = ["FlowModel", "as_flow", "flow_times"]

_MEANINGS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "epsilon": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "sample": lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(alpha)),
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),
}
"""(a, b) of the model's output a x0 + b eps."""

_KEPT = ("sample_shape", "class_names", "num_classes", "clip_sample_range", "batches_guidance", "unconditional")
"""What a sampler or the command line asks a model for, and does not depend on the path."""


def flow_times(schedule: NoiseSchedule, timesteps: Any = None) -> tuple[float, ...]:
    """Return the flow times t with the signal-to-noise ratios of discrete timesteps: t = sigma /
    (alpha + sigma).

    Args:
        schedule: the one that the model was trained with.
        timesteps: integers in [0, T - 1]; None for all of them.

    Raises:
        TypeError, IndexError: something is no timestep.
    """
    chosen = range(schedule.num_train_timesteps) if timesteps is None else timesteps
    levels = (NoiseLevel.of_alpha_bar(schedule.level(t)) for t in chosen)
    return tuple(level.sigma / (level.alpha + level.sigma) for level in levels)


def as_flow(
    model: Model,
    schedule: NoiseSchedule | None = None,
    prediction_type: PredictionType | None = None,
    *,
    fractional_timesteps: bool = False,
) -> FlowModel:
    """Return a diffusion model as a flow-matching model, for ``DDIMSampler(FlowSchedule(...))``.

    >>> model = df.as_flow(df.load_model("fashion"))
    >>> df.DDIMSampler(df.FlowSchedule(shift=3.0), 10).sample(model, (16, 1, 28, 28), seed=0)

    It is called as ``model(x, t, **conditioning)`` with t from 1 (noise) to 0 (data), and returns
    eps - x0. At the times of the model's own timesteps (``flow_times``) it says exactly what the
    model says. Between them the model is asked at the nearest timestep; and outside of its range, as
    at t = 1, at the first or the last. Where that leaves the velocity open (of eps near t = 1, since
    pure noise says nothing about x0; of x0 near t = 0), x is taken for a sample at the last
    timestep that has some x0 in it, or the first that has some noise, as DDIM's start is.

    Args:
        model: predicts the noise, x0 or v, see ``models.Model``.
        schedule: that it was trained with. None: its attribute ``schedule``.
        prediction_type: "epsilon", "sample" or "v_prediction". None: its attribute
            ``prediction_type``.
        fractional_timesteps: tell the model a real number between two timesteps (linear in the log
            signal-to-noise ratio) instead of the nearest, for models that were trained so, or whose
            timestep embedding is smooth.

    Raises:
        TypeError, ValueError: the model does not say what it was trained with, and nothing is
            given.
    """
    schedule = getattr(model, "schedule", None) if schedule is None else schedule
    if not isinstance(schedule, NoiseSchedule):
        refuse("as_flow needs the NoiseSchedule that the model was trained with", schedule, "pass schedule=", TypeError)
    kind = getattr(model, "prediction_type", None) if prediction_type is None else prediction_type
    check_choice("prediction_type", kind, _MEANINGS)
    return FlowModel(model, schedule, str(kind), fractional_timesteps)


class FlowModel(nn.Module):
    """What ``as_flow`` returns."""

    prediction_type = "flow"

    def __init__(self, model: Model, schedule: NoiseSchedule, output_type: str, fractional_timesteps: bool):
        super().__init__()
        self.training = getattr(model, "training", False)
        self.model = model
        self.trained_schedule = schedule
        self.output_type = output_type
        self.fractional_timesteps = fractional_timesteps
        self.schedule = FlowSchedule()
        for name in _KEPT:
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))
        self._kept: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        """Return the velocity eps - x0 at x ``(B, ...)`` and flow times t ``(B,)``, in the dtype of
        the model's output."""
        t = t.to(widest_dtype(t.device))
        norm = torch.hypot(1 - t, t)
        scale = self._like(1 / norm, x)
        t = self._where_it_says_both(t)
        of_model = output_tensor(
            self.model((x.to(scale.dtype) * scale).to(x.dtype), self.timesteps(t), **conditioning), x
        )
        length = torch.hypot(1 - t, t)
        alpha, sigma = (1 - t) / length, t / length
        # x0 and eps from alpha x0 + sigma eps = x / norm and a x0 + b eps = m.
        a, b = _MEANINGS[self.output_type](alpha, sigma)
        determinant = b * alpha - a * sigma
        of_x, of_m = -(a + b) / determinant, (alpha + sigma) / determinant
        of_x, of_m = self._like(of_x / norm, x), self._like(of_m, x)
        return (of_x * x.to(of_x.dtype) + of_m * of_model.to(of_m.dtype)).to(of_model.dtype)

    def _where_it_says_both(self, t: Tensor) -> Tensor:
        """Return flow times at which x0 and eps follow from the model's output: eps says nothing
        about x0 in pure noise, and x0 nothing about eps in clean data."""
        if self.output_type == "epsilon":
            return t.clamp(max=self._ends[1])
        return t.clamp(min=self._ends[0]) if self.output_type == "sample" else t

    @cached_property
    def _ends(self) -> tuple[float, float]:
        """The first and the last flow time of the model's timesteps that hold both x0 and noise."""
        times = [t for t in flow_times(self.trained_schedule) if 0 < t < 1]
        return times[0], times[-1]

    def timesteps(self, t: Tensor) -> Tensor:
        """Return what the model is told at flow times t ``(B,)``: int64, or float32 with
        ``fractional_timesteps``."""
        noisiness = self._noisiness(t)
        wanted = torch.logit(t, eps=torch.finfo(t.dtype).tiny).clamp(noisiness[0], noisiness[-1])
        above = torch.searchsorted(noisiness, wanted).clamp(1, len(noisiness) - 1)
        low, high = noisiness[above - 1], noisiness[above]
        position = (above - 1) + (wanted - low) / (high - low)
        if not self.fractional_timesteps:
            return position.round().to(torch.int64)
        # A flow time in float32 is a timestep up to some 1e-4: a whole one is meant.
        whole = position.round()
        return torch.where((position - whole).abs() < 1e-3, whole, position).to(torch.float32)

    def _noisiness(self, like: Tensor) -> Tensor:
        """Return, of each timestep, half the log signal-to-noise ratio, turned round: increasing, as
        searchsorted needs. Infinite ends are given a finite place beyond their neighbours.

        It is no buffer, since a module is moved with its buffers, and not every device has float64.
        """
        if self._kept is None or self._kept.device != like.device:
            found = -np.nan_to_num(self.trained_schedule.log_snr / 2, neginf=-1e4, posinf=1e4)
            self._kept = torch.tensor(found, dtype=like.dtype, device="cpu").to(like.device)
        return self._kept

    @staticmethod
    def _like(values: Tensor, x: Tensor) -> Tensor:
        """Return ``(B,)`` numbers as factors of the samples in ``x``, in float32 at least."""
        return values.to(torch.promote_types(x.dtype, torch.float32)).view(-1, *[1] * (x.ndim - 1))
