"""What the model is given: one call for each step, the time in its own units, and the scaled x_t."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..truth.cases import Setting
from ..truth.tolerances import to_numpy, worst_share
from .base import CheckFailedError, Context, check

TIME_TOLERANCE = 1e-5
"""How far the time that a model is told may be off, relative to it: float32 rounds it, and the
exponential of its logarithm multiplies that by 4."""


@check(
    "model-input",
    proves="The model is called once for each step, is told the step's time in its own units (t, 1000 t, sigma, log(sigma) / 4), and "
    "starts from x_T times the path's input scale (c_in).",
    source="table 1 of arXiv 2206.00364 (c_noise, c_in); otherwise the schedule's definition of time",
    tolerance=f"a relative {TIME_TOLERANCE:g} of the time, and 2 eps of the input",
    any_order=True,
)
def model_input(context: Context) -> None:
    for count in (1, 4, 10):
        for setting in context.settings(num_inference_steps=count):
            _one_run(context, setting)


def _one_run(context: Context, setting: Setting) -> None:
    x_T = context.start(setting, 2, 3)
    inputs: list[torch.Tensor] = []
    told: list[float] = []

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        inputs.append(x.clone())
        told.append(float(t.reshape(-1)[0]))
        return torch.zeros_like(x)

    context.sample_as_called(setting, model, x_T.clone())
    on = f"on the path {setting.name}"
    if len(told) != setting.steps:
        raise CheckFailedError(
            f"the model must be called once for each of {setting.steps} steps {on}, got {len(told)} calls"
        )
    for level, found in zip(
        context.subject.levels_seen(setting, [setting.time_told(t) for t in told]), told, strict=True
    ):
        time = setting.time_told(found)
        off = (
            abs(time - level.t) / (TIME_TOLERANCE * abs(level.t))
            if level.t
            else math.inf * (time != 0)
            if time
            else 0.0
        )
        context.measured(off)
        if not off <= 1:
            raise CheckFailedError(
                f"the model must be told {setting.told(level.t):.9g} at t = {level.t:.9g} {on}, got {found:.9g}{_known(level.t, found)}"
            )
    scale = setting.input_scale(context.subject.levels_seen(setting, [setting.time_told(told[0])])[0].t)
    exact = scale * to_numpy(x_T)
    share, place = worst_share(
        np.abs(to_numpy(inputs[0]) - exact), 2 * torch.finfo(x_T.dtype).eps * np.abs(exact) + 1e-37
    )
    context.measured(share)
    if share > 1:
        raise CheckFailedError(
            f"the model must be given x_t times {scale:.9g} in the first step {on}, got x_t times "
            f"{float(to_numpy(inputs[0])[place] / to_numpy(x_T)[place]):.9g}"
        )


def _known(t: float, found: float) -> str:
    """Return what was told instead, in words."""
    others = {"t itself": t, "1000 t": 1000 * t, "log(t) / 4": math.log(t) / 4 if t > 0 else math.nan, "1 - t": 1 - t}
    others |= {"t cut to an integer": float(int(t)), "1000 t cut to an integer": float(int(1000 * t))}
    return next((f": it is {name}" for name, value in others.items() if abs(found - value) <= 1e-5 * abs(value)), "")
