"""Noise schedules by name, discrete or in continuous time: what a command line or a file says."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

from ..utils.checks import check_choice
from ..utils.named_options import split_options
from .continuous import CONTINUOUS_SCHEDULES
from .path import NoisePath
from .schedules import SCHEDULES
from .words import ScheduleName

__all__ = ["ALL_SCHEDULES", "make_schedule", "schedule_from_text"]

ALL_SCHEDULES: dict[str, Callable[..., NoisePath]] = {**SCHEDULES, **CONTINUOUS_SCHEDULES}
"""Schedules by name; each takes its own keyword arguments."""


def make_schedule(name: ScheduleName, num_train_timesteps: int | None = None, **kwargs: Any) -> NoisePath:
    """Return the schedule of this name.

    Args:
        name: a key of ``ALL_SCHEDULES``: "linear", "cosine", "flow", "edm", ...
        num_train_timesteps: T >= 1, for a schedule that has such an argument; None for its default,
            1000.
        **kwargs: the schedule's own arguments, for example ``beta_start`` or ``shift``.

    Raises:
        ValueError: the name is unknown, or an argument is out of range.
        TypeError: the schedule has no such argument, or an argument is of the wrong type.
    """
    check_choice(
        "name", name, ALL_SCHEDULES, "for another schedule use NoiseSchedule.from_betas or from_alphas_cumprod"
    )
    if num_train_timesteps is not None:
        kwargs["num_train_timesteps"] = num_train_timesteps
    known = list(inspect.signature(ALL_SCHEDULES[name]).parameters)
    if unknown := [key for key in kwargs if key not in known]:
        raise TypeError(
            f"schedule {name!r} takes {', '.join(known)}, got {unknown[0]!r}: leave it out or choose another schedule"
        )
    return ALL_SCHEDULES[name](**kwargs)


def schedule_from_text(text: str) -> NoisePath:
    """Return the schedule that a command line names: "flow", or "edm?sigma_max=50&rho=5" with its
    arguments.

    Raises:
        TypeError, ValueError: as ``make_schedule``; or an argument is not written as name=value.
    """
    name, arguments = split_options(text, "a schedule", "flow?shift=3")
    return make_schedule(cast(ScheduleName, name), **arguments)  # it checks
