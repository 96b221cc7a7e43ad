"""What a file of timesteps is for, in the words of a scheduler of diffusers: a path, what the model
predicts, and how the scheduler writes samples and noise levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ...models.loading import schedule_of_config
from ...plans.continuous import EDMSchedule, FlowSchedule
from ...plans.levels import NoiseLevel, level_of
from ...plans.path import NoisePath
from ...plans.plan import PlannedStep
from ...plans.schedules import NoiseSchedule
from ...plans.words import PredictionType
from ...utils.checks import refuse

_NEAR = 1e-4
"""How far alpha_bar of a scheduler, in float32, may be from that of its config."""


def _row(step: PlannedStep) -> StepCoefficients:
    return step.coefficients


def _exploding_row(step: PlannedStep) -> StepCoefficients:
    """Return the row of a step between samples divided by their alpha, x0 + sigma eps."""
    row, alpha, target = step.coefficients, level_of(step.level_t).alpha, level_of(step.level_prev).alpha
    return replace(
        row,
        x0_x=row.x0_x * alpha,
        eps_x=row.eps_x * alpha,
        prev_x0=row.prev_x0 / target,
        prev_eps=row.prev_eps / target,
        prev_history=row.prev_history / target,
        prev_history_2=row.prev_history_2 / target,
    )


def _ratio(level: NoiseLevel) -> float:
    return level.sigma / level.alpha


def _in_float32(value: float) -> float:
    return float(np.float32(value))


def _sigma(level: NoiseLevel) -> float:
    return level.sigma


@dataclass(frozen=True)
class SolverPath:
    """The path of a scheduler.

    Args:
        schedule: the noise levels that a file counts in.
        prediction_type: what the model predicts, in the words of a file.
        said: the same in the words of the scheduler's config.
        sampler_options: further arguments of ``DDIMSampler``.
        timestep_of: returns what ``scheduler.timesteps`` has for what the model is told.
        sigma_of: returns what ``scheduler.sigmas`` has for a level.
        row_of: returns the row of a step in the scheduler's samples.
        alone: how the timesteps of a file alone are used.
    """

    schedule: NoisePath
    prediction_type: PredictionType
    said: str
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    timestep_of: Callable[[float], float] = _in_float32
    sigma_of: Callable[[NoiseLevel], float] = _ratio
    row_of: Callable[[PlannedStep], StepCoefficients] = _row
    alone: str = "a TimestepList of them is a file, too"


def schedule_of_betas(config: Any, alphas_cumprod: Tensor) -> NoiseSchedule:
    """Return the noise schedule of a scheduler with betas, in float64.

    Raises:
        ValueError: its levels are not those of its config.
    """
    schedule = schedule_of_config(config, "the scheduler's config")
    ours, theirs = schedule.alphas_cumprod, np.array(alphas_cumprod.tolist())
    if ours.shape != theirs.shape or not np.allclose(theirs, ours, rtol=_NEAR, atol=_NEAR**2):
        raise ValueError(
            "a file of timesteps is for the noise schedule of the scheduler's config, and alphas_cumprod holds another one: make "
            "the scheduler with the betas that are in use (trained_betas)"
        )
    return schedule


def path_of_ddim(config: Any, schedule: NoiseSchedule) -> SolverPath:
    """Return the path of a scheduler that clips or thresholds where its config says so."""
    thresholds = (
        {"thresholding", "dynamic_thresholding_ratio", "sample_max_value"} if config.get("thresholding") else ()
    )
    clips = bool(config.clip_sample) and not thresholds
    return SolverPath(
        schedule,
        config.prediction_type,
        config.prediction_type,
        {
            "set_alpha_to_one": config.set_alpha_to_one,
            "clip_sample": clips,
            "clip_sample_range": float(config.clip_sample_range) if clips else None,
            **{option: config[option] for option in thresholds},
        },
        int,
        alone="set_timesteps takes such a list",
    )


def path_of_sigmas(config: Any, alphas_cumprod: Tensor, divided: bool = False) -> SolverPath:
    """Return the path of a scheduler with betas that counts in ``sigmas``.

    Args:
        divided: its samples are x0 + sigma eps.

    Raises:
        ValueError: the config asks for what the steps of a file do not have.
    """
    check_config(config, "rescale_betas_zero_snr", [False], "FastDDIMScheduler.from_config(config) takes it")
    check_config(config, "final_sigmas_type", ["zero", "sigma_min"])
    check_config(config, "timestep_type", ["discrete"])
    options = {"set_alpha_to_one": config.get("final_sigmas_type", "zero") == "zero", "clip_sample": False}
    schedule = schedule_of_betas(config, alphas_cumprod)
    kind = check_config(config, "prediction_type", ["epsilon", "sample", "v_prediction"])
    if divided:
        return SolverPath(schedule, kind, kind, options, row_of=_exploding_row)
    return SolverPath(schedule, kind, kind, options, int)


def path_of_flow(config: Any) -> SolverPath:
    """Return the path of a scheduler of flow matching: its shifts choose sigmas, which a file has.

    Raises:
        ValueError: the config asks for what the steps of a file do not have.
    """
    check_config(config, "final_sigmas_type", ["zero"])
    check_config(config, "stochastic_sampling", [False])
    check_config(config, "invert_sigmas", [False])
    kind = check_config(config, "prediction_type", ["flow_prediction", "epsilon", "sample"], default="flow_prediction")
    schedule = FlowSchedule(time_scale=float(config.num_train_timesteps))
    ours: Any = "flow" if kind == "flow_prediction" else kind
    return SolverPath(schedule, ours, kind, {"clip_sample": False}, sigma_of=_sigma)


def path_of_multistep(config: Any, alphas_cumprod: Tensor) -> SolverPath:
    """Return the path of DPM-Solver or UniPC, with betas or of flow matching.

    Raises:
        ValueError: the config asks for what the steps of a file do not have.
    """
    check_config(config, "algorithm_type", ["dpmsolver++", "dpmsolver"])
    check_config(config, "thresholding", [False])
    check_config(config, "variance_type", [None])
    return path_of_flow(config) if config.get("use_flow_sigmas") else path_of_sigmas(config, alphas_cumprod)


def path_of_edm(config: Any) -> SolverPath:
    """Return EDM's path (Karras et al. 2022, arXiv 2206.00364), whose "epsilon" is the raw network's
    output.

    Raises:
        ValueError: the config asks for what the steps of a file do not have.
    """
    check_config(config, "final_sigmas_type", ["zero"])
    kind = check_config(
        config, "prediction_type", ["epsilon"], "ddim-fast search has the network of EDM with its own sign"
    )
    schedule = EDMSchedule(float(config.sigma_min), float(config.sigma_max), sigma_data=float(config.sigma_data))
    return SolverPath(schedule, "edm", kind, {"clip_sample": False})


def check_config(config: Any, name: str, allowed: list[Any], remedy: str = "", default: Any = None) -> Any:
    """Return a field of a scheduler's config, which a file's steps need to have one of these values;
    one that the config lacks, or that is None, has the first or the default.

    Raises:
        ValueError: it has another value.
    """
    value = config.get(name)
    if value is None:
        return allowed[0] if default is None else default
    if value not in allowed:
        which = " or ".join(map(str, allowed))
        refuse(
            f"{name} in the scheduler's config must be {which}, with a file of timesteps",
            value,
            remedy or f"make the scheduler with from_config(config, {name}={allowed[0]!r}), or use no file",
        )
    return value
