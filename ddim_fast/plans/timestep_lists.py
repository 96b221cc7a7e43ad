"""Lists of timesteps that are the caller's own: checked, and returned as tuples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..utils.checks import check_integer, check_number


def explicit_timesteps(timesteps: Sequence[float] | np.ndarray | Tensor, num_train_timesteps: int) -> tuple[int, ...]:
    """Check a list of the caller's own and return it as a tuple of ints.

    Args:
        timesteps: 1 to T integers in [0, T-1], strictly decreasing: the order in which sampling
            visits them.
        num_train_timesteps: T >= 1.

    Raises:
        TypeError: ``timesteps`` is no list of ints.
        ValueError: the list is empty, leaves [0, T-1], or is not strictly decreasing.
    """
    num_train_timesteps = check_integer("num_train_timesteps", num_train_timesteps, at_least=1)
    values = integer_list("timesteps", timesteps)
    if not values:
        raise ValueError(f"timesteps must hold at least one timestep, got {timesteps!r}: pass for example [999, 499]")
    for index, value in enumerate(values):
        if not 0 <= value < num_train_timesteps:
            raise ValueError(
                f"timesteps must lie in [0, {num_train_timesteps - 1}], got timesteps[{index}] = {value}: "
                "count training timesteps from 0"
            )
        if index and value >= values[index - 1]:
            raise ValueError(
                f"timesteps must be strictly decreasing, got {values[index - 1]} followed by {value} at index "
                f"{index}: pass sorted(set(timesteps), reverse=True)"
            )
    return tuple(values)


def explicit_times(times: Sequence[float] | np.ndarray | Tensor) -> tuple[float, ...]:
    """Check a list of the caller's own in continuous time, and return it as floats.

    Raises:
        TypeError: it is no list of numbers.
        ValueError: it is empty, holds a time that is not greater than 0, or is not strictly
            decreasing.
    """
    values = times.tolist() if hasattr(times, "tolist") else times
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"timesteps must be a list of numbers, got {times!r}: pass for example [1.0, 0.5]")
    found = [check_number(f"timesteps[{index}]", value) for index, value in enumerate(values)]
    if not found:
        raise ValueError(f"timesteps must hold at least one time, got {times!r}: pass for example [1.0, 0.5]")
    for index, t in enumerate(found):
        if t <= 0:
            raise ValueError(
                f"timesteps must be greater than 0 in continuous time, got timesteps[{index}] = {t}: leave it out, every run leads to 0"
            )
        if index and t >= found[index - 1]:
            raise ValueError(
                f"timesteps must be strictly decreasing, got {found[index - 1]} followed by {t} at index {index}: "
                "list them from the noisiest to the cleanest"
            )
    return tuple(found)


def explicit_model_timesteps(
    model_timesteps: Sequence[float] | np.ndarray | Tensor, num_inference_steps: int, num_train_timesteps: int
) -> tuple[int, ...]:
    """Check what a model is to be told in S = ``num_inference_steps`` steps, and return it as a
    tuple of ints.

    Args:
        model_timesteps: S integers in [0, T-1], in any order.

    Raises:
        TypeError: ``model_timesteps`` is no list of ints.
        ValueError: there are not S of them, or they leave [0, T-1].
    """
    values = integer_list("model_timesteps", model_timesteps)
    if len(values) != num_inference_steps or not all(0 <= value < num_train_timesteps for value in values):
        raise ValueError(
            f"model_timesteps must be {num_inference_steps} integers, one for each timestep visited, in [0, {num_train_timesteps - 1}], "
            f"got {values}"
        )
    return tuple(values)


def integer_list(name: str, values: Any) -> list[int]:
    """Return a list of Python ints from a list, an array or an integer tensor."""
    plain = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(plain, (str, bytes)) or not isinstance(plain, (Sequence, range)):
        raise TypeError(f"{name} must be a list of ints, got {values!r}: pass for example [999, 499, 0]")
    return [check_integer(f"{name}[{index}]", value) for index, value in enumerate(plain)]


def number_list(name: str, values: Any) -> tuple[float, ...]:
    """Return a tuple of Python numbers from a list, an array or a tensor.

    Raises:
        TypeError: it is none.
    """
    plain = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(plain, (str, bytes)) or not isinstance(plain, (Sequence, range)):
        raise TypeError(f"{name} must be a list of numbers, got {values!r}: pass one for each timestep")
    return tuple(
        value if isinstance(value, int) else check_number(f"{name}[{i}]", value) for i, value in enumerate(plain)
    )
