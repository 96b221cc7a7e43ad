"""Drop-in for Flow-GRPO's step with its log-probability (yifan123/flow_grpo,
``flow_grpo/diffusers_patch/sd3_sde_with_logprob.py``): ``sde_step_with_logprob``.

docs/drop_ins/log_probs.md lists every difference.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..kernels.contract import StepCoefficients
from ..kernels.dispatch import ddim_step
from ..kernels.gaussian import mean_square
from ..plans.coefficients import ddim_coefficients, mean_as_x0
from ..plans.eta import ETA_SCALES, flow_grpo_diffusion
from ..plans.levels import NoiseLevel
from ..utils.checks import check_choice, check_number, refuse
from ..utils.transfer import to_device
from .host_copy import HostCopy
from .scored_steps import check_given, check_pair, drawn, log_prob_of, numbers_of, one_or_each

_NO_NOISE = 2.0**-20
"""The standard deviation that squares are weighed with where a step adds no noise."""


class _Step(NamedTuple):
    """A step between two levels.

    Attributes:
        row: with the mean in the place of x0.
        std_dev_t: what the original calls so: of "sde" the diffusion, of "cps" the standard
            deviation of the noise.
        sqrt_dt: the root of the step's length in sigma.
    """

    row: StepCoefficients
    std_dev_t: float
    sqrt_dt: float


def sde_step_with_logprob(
    self: FlowMatchEulerDiscreteScheduler,
    model_output: Tensor,
    timestep: float | Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: Any = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
    log_density: bool = False,
) -> tuple[Tensor, ...]:
    """Take one stochastic step of flow matching, or evaluate one, with its log-probability.

    Args:
        self: the scheduler, after ``set_timesteps``.
        model_output: the velocity eps - x0, ``(B, ...)``.
        timestep: one of ``scheduler.timesteps``, or one for each sample, ``(B,)``.
        sample: x_t, ``(B, ...)``.
        noise_level: of Flow-GRPO (arXiv 2505.05470) or of Coefficients-Preserving Sampling (arXiv
            2509.05952). At 0 a step is Euler's, and has no density: its log-probability is NaN in
            "sde", and cannot be asked of a given ``prev_sample``.
        prev_sample: the x_prev that was sampled, instead of drawing one: a constant.
        generator: draws the noise as diffusers does, ``randn_tensor`` of the model's output in
            float32.
        sde_type: "sde" or "cps".
        return_sqrt_dt: also return sqrt(-dt), like std_dev_t.
        log_density: of "cps", return the log-density; the original's is -(x_prev - mean)^2 alone.

    Returns:
        (prev_sample, log_prob, prev_sample_mean, std_dev_t): all float32. log_prob is the mean over
        all dimensions but the first, ``(B,)``. std_dev_t has one number for each timestep, ``(B, 1,
        ...)`` or ``(1, 1, ...)``; of "sde" it is the diffusion, and the noise has the standard
        deviation std_dev_t sqrt(-dt). Where gradients are recorded, log_prob and prev_sample_mean
        have those of ``model_output`` and ``sample``.

    Raises:
        TypeError, ValueError: an argument breaks a rule. Nothing has been drawn.
    """
    _check_scheduler(self)
    check_pair(model_output, sample)
    check_number("noise_level", noise_level, at_least=0)
    check_choice("sde_type", sde_type, _ETA_SCALES)
    each = numbers_of("timestep", timestep, sample)
    timesteps = one_or_each(each)
    sample, model_output = sample.float(), model_output.float()
    if prev_sample is not None:
        check_given("prev_sample", prev_sample, sample, None)
        prev_sample = prev_sample.float()
    steps = [_step_at(self, t, sde_type, float(noise_level)) for t in timesteps]
    if sde_type == "sde" and prev_sample is not None:
        _check_density(steps, timesteps, noise_level)
    # The squares of "cps" are those of any density: where there is no noise, of a narrow one.
    min_std = _NO_NOISE if sde_type == "cps" and not log_density else None
    if prev_sample is None:
        x_prev, log_prob, mean = _drawn(sample, model_output, steps, generator, min_std)
    else:
        x_prev, log_prob, mean = _given(prev_sample, sample, model_output, steps, min_std)
    if min_std is not None:
        log_prob = -_mean_squares(log_prob, steps, min_std)
    std_dev_t, sqrt_dt = (
        _per_sample(values, len(each), sample)
        for values in zip(*((s.std_dev_t, s.sqrt_dt) for s in steps), strict=True)
    )
    found = (x_prev, log_prob, mean, std_dev_t)
    return (*found, sqrt_dt) if return_sqrt_dt else found


def _drawn(
    sample: Tensor, model_output: Tensor, steps: list[_Step], generator: Any, min_std: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    m, mean = model_output, torch.empty_like(sample)
    x_prev, log_prob = drawn(
        sample,
        m,
        [step.row for step in steps],
        lambda: randn_tensor(m.shape, generator=generator, device=m.device, dtype=m.dtype),
        min_std=min_std,
        x0_out=mean,
    )
    return x_prev, log_prob, mean


def _given(
    prev_sample: Tensor, sample: Tensor, model_output: Tensor, steps: list[_Step], min_std: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    log_prob = log_prob_of(prev_sample, sample, model_output, [step.row for step in steps], min_std=min_std)
    rows = [replace(step.row, prev_noise=0.0) for step in steps]
    if len(rows) == 1:
        return prev_sample, log_prob, ddim_step(sample, model_output, rows[0])
    parts = [ddim_step(sample[i : i + 1], model_output[i : i + 1], row) for i, row in enumerate(rows)]
    return prev_sample, log_prob, torch.cat(parts)


def _mean_squares(log_prob: Tensor, steps: list[_Step], min_std: float) -> Tensor:
    scale, offset = zip(*(step.row.scale_and_offset(min_std) for step in steps), strict=True)
    numbers = torch.tensor([scale, offset], dtype=log_prob.dtype, device="cpu")
    return mean_square(log_prob, *to_device(numbers, log_prob.device))


def _per_sample(values: tuple[float, ...], count: int, sample: Tensor) -> Tensor:
    """Return one number for each of ``count`` timesteps, shaped to broadcast against the samples."""
    numbers = (
        torch.tensor(values, dtype=torch.float32, device="cpu").expand(count).reshape(-1, *[1] * (sample.ndim - 1))
    )
    return to_device(numbers, sample.device)


# --- Levels and rows --------------------------------------------------------------------------------------------------


def _check_scheduler(scheduler: Any) -> None:
    if not issubclass(type(scheduler), FlowMatchEulerDiscreteScheduler):
        refuse("the scheduler must be diffusers' FlowMatchEulerDiscreteScheduler", type(scheduler), kind=TypeError)
    if len(scheduler.sigmas) != len(scheduler.timesteps) + 1:
        raise ValueError("a step needs the sigmas of a run, got those of training: call scheduler.set_timesteps first")


_on_host: WeakKeyDictionary[Any, tuple[HostCopy, HostCopy]] = WeakKeyDictionary()


def _lists(scheduler: Any) -> tuple[list[float], list[float]]:
    """Return the sigmas and timesteps of a run, copied to the host once."""
    found = _on_host.get(scheduler)
    if found is None or not (found[0].is_of(scheduler.sigmas) and found[1].is_of(scheduler.timesteps)):
        found = _on_host[scheduler] = (HostCopy.of(scheduler.sigmas), HostCopy.of(scheduler.timesteps))
    return found[0].values, found[1].values


def _step_at(scheduler: Any, t: float, sde_type: str, noise_level: float) -> _Step:
    sigmas, timesteps = _lists(scheduler)
    places = [i for i, one in enumerate(timesteps) if one == t]
    if not places:
        refuse("timestep must be one of scheduler.timesteps", t, "pass it as it is there, in float32")
    index = places[min(1, len(places) - 1)]  # as the scheduler's index_for_timestep: the second of equal ones
    try:
        return _step_between(sigmas[index], sigmas[index + 1], sde_type, noise_level)
    except ValueError as error:
        raise ValueError(f"at timestep {t:g}: {error}") from None


_ETA_SCALES = {"sde": "flow_grpo", "cps": "cps"}
"""The conventions of eta by the values of ``sde_type``."""


@lru_cache(4096)
def _step_between(sigma: float, sigma_prev: float, sde_type: str, noise_level: float) -> _Step:
    level_t, level_prev = NoiseLevel(1 - sigma, sigma), NoiseLevel(1 - sigma_prev, sigma_prev)
    noise = ETA_SCALES[_ETA_SCALES[sde_type]].noise(level_t, level_prev, noise_level)
    row = mean_as_x0(ddim_coefficients(level_t, level_prev, "flow", **noise._asdict()))
    of_sde = sde_type == "sde"
    std_dev_t = flow_grpo_diffusion(level_t, level_prev, noise_level) if of_sde else row.prev_noise
    return _Step(row, std_dev_t, (sigma - sigma_prev) ** 0.5)


def _check_density(steps: list[_Step], timesteps: list[Any], noise_level: float) -> None:
    for step, t in zip(steps, timesteps, strict=True):
        if not step.row.has_density():
            raise ValueError(
                f"the log-probability of a step needs noise, got noise_level = {noise_level} at timestep {t:g}, where the "
                "step adds none: use a noise_level above 0"
            )


__all__ = ["sde_step_with_logprob"]
