"""Choose the timesteps of a run: from a count, a list, a respacing string, or a file of searched
timesteps."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..utils.checks import check_choice, check_number, refuse
from ..utils.warn import warn_caller
from .continuous import ContinuousSchedule
from .files import SUFFIX, TimestepList, read_timesteps
from .history_weights import HistoryWeights, Rows, explicit_history_weights, histories_read, weights_of_rows
from .path import NoisePath
from .schedules import NoiseSchedule
from .timestep_lists import explicit_timesteps, number_list
from .timesteps import SPACINGS, respaced_timesteps, select_timesteps

DEFAULT_STEPS = 50

_Time = TypeVar("_Time", int, float)

TimestepsArgument = Sequence[float] | str | os.PathLike[str] | TimestepList | None


@dataclass(frozen=True)
class ChosenTimesteps:
    """Which timesteps a run visits, and what a file of timesteps says beside them.

    Attributes:
        timesteps: strictly decreasing.
        model_timesteps: the timestep given to the model at each of them.
        order: of the steps.
        eps_residual: the mean squared error of the model's eps at each of them; None where no
            analytic variance is asked for.
        history_weights: the weights of earlier predictions in each step; None for those of the
            order.
        rows, prediction_type: the coefficients in a file that these weights are from, and what the
            model predicts that they are for.
    """

    timesteps: tuple[float, ...]
    model_timesteps: tuple[float, ...]
    order: int
    eps_residual: tuple[float, ...] | None
    history_weights: HistoryWeights | None = None
    rows: Rows | None = None
    prediction_type: str | None = None


def read_if_file(timesteps: TimestepsArgument) -> TimestepsArgument:
    """Return the list in a file where ``timesteps`` names one (a path, or a string that ends in
    .json)."""
    if isinstance(timesteps, os.PathLike) or (isinstance(timesteps, str) and timesteps.endswith(SUFFIX)):
        return read_timesteps(timesteps)
    return timesteps


def choose_timesteps(
    schedule: NoisePath,
    num_inference_steps: int | None = None,
    *,
    timesteps: TimestepsArgument = None,
    timesteps_name: str = "the list of timesteps",
    model_timesteps: Sequence[float] | None = None,
    timestep_spacing: str | None = None,
    steps_offset: int = 0,
    order: int | None = None,
    analytic_variance: bool | Sequence[float] = False,
    history_weights: Sequence[Sequence[float]] | None = None,
) -> ChosenTimesteps:
    """Choose the timesteps of a run, with what else a file of timesteps decides.

    Args:
        timesteps_name: what to call a ``TimestepList`` in errors, such as its path.

    The other arguments are those of ``DDIMSampler``.

    Raises:
        TypeError, ValueError: an argument breaks a rule.
    """
    of_file = timesteps if isinstance(timesteps, TimestepList) else None
    residual = _residual(of_file, timesteps_name, analytic_variance)
    visited: tuple[float, ...]
    if of_file is not None:
        visited = _checked_count(of_file.for_schedule(schedule, timesteps_name), num_inference_steps)
        if isinstance(schedule, ContinuousSchedule):
            visited = schedule.explicit(visited)
    elif isinstance(schedule, ContinuousSchedule):
        visited = _visited_times(schedule, num_inference_steps, timesteps, timestep_spacing, steps_offset)
    elif isinstance(schedule, NoiseSchedule):
        visited = _visited_timesteps(schedule, num_inference_steps, timesteps, timestep_spacing, steps_offset)
    else:
        refuse("schedule must be a NoiseSchedule, or one in continuous time", schedule, kind=TypeError)
    if residual is not None and len(residual) != len(visited):
        refuse(
            f"analytic_variance must be one finite number, 0 or more, for each of the {len(visited)} timesteps",
            residual,
        )
    if model_timesteps is None and of_file is not None:
        model_timesteps = of_file.model_timesteps
    seen = visited if model_timesteps is None else number_list("model_timesteps", model_timesteps)
    schedule.check_model_timesteps(seen, len(visited))
    if history_weights is not None:
        if order is not None:
            refuse(
                "order is the textbook's weights of earlier predictions, and must not be given beside history_weights",
                order,
                "leave one of them out",
            )
        weights = explicit_history_weights(history_weights, len(visited))
        return ChosenTimesteps(visited, seen, 1 + histories_read(weights), residual, weights)
    if order is None and of_file is not None and of_file.coefficients is not None:
        weights = weights_of_rows(of_file.coefficients)
        return ChosenTimesteps(
            visited, seen, of_file.order, residual, weights, of_file.coefficients, of_file.prediction_type
        )
    if order is None:
        order = 1 if of_file is None else of_file.order
    return ChosenTimesteps(visited, seen, order, residual)


def _residual(
    of_file: TimestepList | None, name: str, analytic_variance: bool | Sequence[float]
) -> tuple[float, ...] | None:
    if analytic_variance is False:
        return None
    if analytic_variance is not True:
        if isinstance(analytic_variance, (str, bytes)) or not isinstance(analytic_variance, Iterable):
            refuse("analytic_variance must be True, False or a list of numbers", analytic_variance, kind=TypeError)
        values = analytic_variance.tolist() if hasattr(analytic_variance, "tolist") else list(analytic_variance)
        if not isinstance(values, list):
            refuse("analytic_variance must be one number for each timestep", values, kind=TypeError)
        return (
            tuple(check_number(f"analytic_variance[{i}]", value, at_least=0) for i, value in enumerate(values)) or None
        )
    if of_file is None:
        raise ValueError(
            "analytic_variance=True takes the mean squared error of eps from a file of timesteps that ddim-fast "
            "search made, got none: pass timesteps='FILE.json', or the numbers themselves"
        )
    if of_file.eps_residual is None:
        raise ValueError(
            f"analytic_variance=True needs the mean squared error of eps, and {name} holds none: search again, or "
            "pass the numbers"
        )
    return of_file.eps_residual


def _visited_times(
    schedule: ContinuousSchedule,
    count: int | None,
    timesteps: TimestepsArgument,
    spacing: str | None,
    steps_offset: int,
) -> tuple[float, ...]:
    if steps_offset:
        refuse("steps_offset belongs to the discrete timesteps of a NoiseSchedule", steps_offset, "leave it out")
    if timesteps is None:
        return schedule.select(DEFAULT_STEPS if count is None else count, spacing)
    if isinstance(timesteps, str):
        refuse(
            "timesteps must be a list of times, or a file of them, in continuous time",
            timesteps,
            "respacing strings are for discrete timesteps",
        )
    assert not isinstance(timesteps, (os.PathLike, TimestepList))  # files were read before
    return _checked_count(schedule.explicit(timesteps), count)


def _visited_timesteps(
    schedule: NoiseSchedule,
    count: int | None,
    timesteps: TimestepsArgument,
    spacing: str | None,
    steps_offset: int,
) -> tuple[int, ...]:
    total = schedule.num_train_timesteps
    spacing = schedule.default_spacing if spacing is None else spacing
    if timesteps is None:
        check_choice("timestep_spacing", spacing, SPACINGS, "for a list of your own pass timesteps=[...]")
        if count is None and total < DEFAULT_STEPS:
            refuse(
                f"num_inference_steps must be given for a schedule of fewer than {DEFAULT_STEPS} timesteps",
                None,
                f"pass 1 to {total}",
            )
        count = DEFAULT_STEPS if count is None else count
        visited = select_timesteps(count, total, spacing, steps_offset=steps_offset, schedule=schedule)  # type: ignore[arg-type]  # it checks
        if len(visited) == 1 and visited[0] < total - 1:
            warn_caller(
                f"one step from noise must be taken at the noisiest timestep, got {visited[0]} of 0 to {total - 1} from "
                f"{spacing!r} spacing, whose samples are noise: use 'trailing' spacing, or timesteps=[{total - 1}]"
            )
        return visited
    if isinstance(timesteps, str):
        return _checked_count(respaced_timesteps(timesteps, total, name="timesteps"), count)
    assert not isinstance(timesteps, (os.PathLike, TimestepList))  # files were read before
    return _checked_count(explicit_timesteps(timesteps, total), count)  # type: ignore[arg-type]  # it checks


def _checked_count(visited: tuple[_Time, ...], count: int | None) -> tuple[_Time, ...]:
    if count not in (None, len(visited)):
        raise ValueError(
            f"timesteps has {len(visited)} entries, so num_inference_steps must be that or left out, got {count}: "
            "leave num_inference_steps out"
        )
    return visited
