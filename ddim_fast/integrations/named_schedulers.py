"""Schedulers with diffusers' interface, named on a command line and configured for a noise path.

    named = named_scheduler("diffusers:UniPCMultistepScheduler?solver_order=3", "a scheduler")
    scheduler = configured(named, path, "epsilon")

Nothing here imports diffusers: a scheduler of one's own is named alike.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..plans.continuous import EDMSchedule, FlowSchedule
from ..plans.path import NoisePath
from ..plans.schedules import NoiseSchedule
from ..utils.files import first_line
from ..utils.import_string import import_string
from ..utils.named_options import split_options

EXAMPLE = "diffusers:UniPCMultistepScheduler?solver_order=3"


@dataclass(frozen=True)
class NamedScheduler:
    """A scheduler's class, and the options of its config that its name gives.

    Attributes:
        text: the name as it was given.
        make: the class.
        fields: the names that it takes.
    """

    text: str
    make: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    fields: frozenset[str] = frozenset()


def is_scheduler(value: Any) -> bool:
    """Return whether an object or a class has diffusers' interface: ``set_timesteps`` and ``step``."""
    return callable(getattr(value, "set_timesteps", None)) and callable(getattr(value, "step", None))


def named_scheduler(text: str, what: str) -> NamedScheduler:
    """Import the scheduler class of ``module:Class?option=value&option=value``.

    Args:
        what: what the name stands for, in words, for the error.

    Raises:
        TypeError: what is named is no class with ``set_timesteps`` and ``step``.
        ValueError: it cannot be imported, or has no such option.
    """
    name, options = split_options(text, what, EXAMPLE, words=True)
    make = import_string(name, what)
    if not inspect.isclass(make) or not is_scheduler(make):
        raise TypeError(
            f"{what} must be a class with set_timesteps and step, got {make!r:.80} from {name}: for instance {EXAMPLE}"
        )
    fields = frozenset(inspect.signature(make).parameters)
    if unknown := [key for key in options if key not in fields]:
        taken = ", ".join(sorted(name for name in fields if name != "kwargs"))
        raise ValueError(f"{name} takes {taken}, got {unknown[0]!r}: leave it out or correct its spelling")
    return NamedScheduler(text, make, options, fields)


def configured(
    named: NamedScheduler,
    path: NoisePath,
    prediction_type: str,
    clip_sample_range: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """Make a scheduler for a noise path, as the owner of a pipeline with this path has it.

    The path and what the model predicts are the scheduler's configuration; what is left is the
    scheduler's own default, such as the spacing of its timesteps. Options of its name come first.

    Args:
        clip_sample_range: that x0 is clipped to; None for no clipping.
        settings: further fields of the model's configuration, set where the class has them.

    Raises:
        ValueError: the class has no configuration for this path or prediction, or refuses it.
    """
    config = _of_path(named, path, prediction_type)
    config |= dict(clip_sample=clip_sample_range is not None)
    if clip_sample_range is not None:
        config["clip_sample_range"] = clip_sample_range
    config |= settings or {}
    config = {name: value for name, value in config.items() if name in named.fields} | dict(named.options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its defaults, which are not ours to choose
            return named.make(**config)
    except Exception as error:  # whatever the class does
        given = ", ".join(f"{name}={value!r:.40}" for name, value in config.items())
        raise ValueError(
            f"{named.text} cannot be made with {given} ({type(error).__name__}: {first_line(error)})"
        ) from error


def _of_path(named: NamedScheduler, path: NoisePath, prediction_type: str) -> dict[str, Any]:
    """Return the fields of a config that say a path and what the model predicts on it."""
    if isinstance(path, NoiseSchedule):
        return _of_betas(named, path, prediction_type)
    for kind, of_path in _CONTINUOUS.items():
        if isinstance(path, kind):
            return of_path(named, path, prediction_type)
    raise _unfit(named, f"no scheduler of diffusers has the path {path.name!r}")


def _of_betas(named: NamedScheduler, path: NoiseSchedule, prediction_type: str) -> dict[str, Any]:
    if "trained_betas" not in named.fields:
        raise _unfit(named, f"it takes no trained_betas, and the model's path {path.name!r} is one of discrete betas")
    if "prediction_type" not in named.fields and prediction_type != "epsilon":
        raise _unfit(named, f"it takes predictions of epsilon only, and the model's are {prediction_type}")
    return {
        "num_train_timesteps": path.num_train_timesteps,
        "trained_betas": path.betas.tolist(),
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": bool(path.alphas_cumprod[-1] == 0),
    }


def _of_flow(named: NamedScheduler, path: FlowSchedule, prediction_type: str) -> dict[str, Any]:
    if prediction_type != "flow":
        raise _unfit(
            named, f"on flow matching's path the model must predict flow, and its predictions are {prediction_type}"
        )
    common: dict[str, Any] = {"num_train_timesteps": path.num_train_timesteps}
    if path.shift_terminal is not None:
        common["shift_terminal"] = path.shift_terminal
        if "shift_terminal" not in named.fields:
            raise _unfit(named, f"it takes no shift_terminal, which is {path.shift_terminal:g} on the model's path")
    if {"use_flow_sigmas", "flow_shift"} <= named.fields:
        return common | {"use_flow_sigmas": True, "flow_shift": path.shift, "prediction_type": "flow_prediction"}
    if "shift" in named.fields:
        return common | {"shift": path.shift}
    raise _unfit(named, "it takes neither flow_shift nor shift, and the model's path is flow matching's")


def _of_edm(named: NamedScheduler, path: EDMSchedule, prediction_type: str) -> dict[str, Any]:
    if path.preconditioned or prediction_type != "edm":
        raise _unfit(
            named,
            "on EDM's path it preconditions the raw network itself, and the model predicts with EDM's preconditioning inside",
        )
    if not {"sigma_min", "sigma_max", "sigma_data"} <= named.fields:
        raise _unfit(named, "it takes no sigma_data, and the model's path is EDM's")
    return {
        "sigma_min": path.sigma_min,
        "sigma_max": path.sigma_max,
        "sigma_data": path.sigma_data,
        "rho": path.rho,
        "prediction_type": "epsilon",  # diffusers' word for what the raw network F is
    }


_CONTINUOUS: dict[type, Callable[[NamedScheduler, Any, str], dict[str, Any]]] = {
    FlowSchedule: _of_flow,
    EDMSchedule: _of_edm,
}
"""How the paths in continuous time are written in a config."""


def told_time(path: NoisePath, timestep: float) -> float:
    """Return what the model is told at a timestep of a scheduler that is configured for this path.

    Schedulers count flow times in training timesteps.
    """
    if isinstance(path, FlowSchedule):
        return path.model_time(timestep / path.num_train_timesteps)
    return timestep


def _unfit(named: NamedScheduler, reason: str) -> ValueError:
    return ValueError(f"a scheduler must be one for the model's path and prediction, got {named.text}: {reason}")
