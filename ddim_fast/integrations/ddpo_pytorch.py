"""Drop-in for DDPO's step with its log-probability (kvablack/ddpo-pytorch,
``ddpo_pytorch/diffusers_patch/ddim_with_logprob.py``): ``ddim_step_with_logprob``.

docs/drop_ins/log_probs.md lists every difference.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..kernels.contract import StepCoefficients
from ..plans.coefficients import DISCRETE_PREDICTIONS, check_eta, ddim_coefficients, variance_with_room
from ..utils.checks import check_choice, refuse
from .scored_steps import Rows, check_given, check_pair, drawn, log_prob_of, numbers_of, one_or_each


def ddim_step_with_logprob(
    self: DDIMScheduler,
    model_output: Tensor,
    timestep: int | Tensor,
    sample: Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: Any = None,
    prev_sample: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one step of ``DDIMScheduler``, or evaluate one, with its log-probability.

    Args:
        self: the scheduler, after ``set_timesteps``.
        model_output: ``(B, ...)``.
        timestep: one, or one for each sample, ``(B,)``.
        sample: x_t, ``(B, ...)``.
        eta: 1 adds as much noise as DDPM. A step without noise has no density: at 0 a step can be
            drawn, with the log-probability NaN.
        use_clipped_model_output: derive eps again from the clipped x0.
        generator: draws the noise as diffusers does, ``randn_tensor`` of the model's output.
        prev_sample: the x_prev that was sampled, instead of drawing one: a constant.

    Returns:
        (prev_sample, log_prob): in the dtype of ``sample``; and its log-probability, the mean over
        all dimensions but the first, ``(B,)`` float32, float64 for float64 tensors. Where gradients
        are recorded it has those of ``model_output`` and ``sample``.

    Raises:
        TypeError, ValueError: an argument breaks a rule; or a step adds no noise, and eta is above 0
            or ``prev_sample`` given. Nothing has been drawn.
    """
    _check_scheduler(self)
    check_pair(model_output, sample)
    check_eta(eta)
    timesteps = one_or_each(numbers_of("timestep", timestep, sample))
    if prev_sample is not None:
        check_given("prev_sample", prev_sample, sample, generator)
    rows = [_row_at(self, t, float(eta), bool(use_clipped_model_output)) for t in timesteps]
    if eta > 0 or prev_sample is not None:
        _check_density(rows, timesteps, eta)
    if prev_sample is not None:
        return prev_sample.to(sample.dtype), log_prob_of(prev_sample, sample, model_output, rows)
    m = model_output
    return drawn(sample, m, rows, lambda: randn_tensor(m.shape, generator=generator, device=m.device, dtype=m.dtype))


def _check_scheduler(scheduler: Any) -> None:
    if not issubclass(type(scheduler), DDIMScheduler):
        refuse("the scheduler must be diffusers' DDIMScheduler", type(scheduler), kind=TypeError)
    if scheduler.num_inference_steps is None:
        raise ValueError("a step needs the number of steps, got None: call scheduler.set_timesteps first")
    if scheduler.config.thresholding:
        raise ValueError(
            "the log-probability of a step is known without dynamic thresholding, got thresholding=True: "
            "use clip_sample=True, or neither"
        )
    check_choice("prediction_type", scheduler.config.prediction_type, DISCRETE_PREDICTIONS)


def _row_at(scheduler: Any, t: Any, eta: float, use_clipped_model_output: bool) -> StepCoefficients:
    config, levels = scheduler.config, scheduler.alphas_cumprod
    last = len(levels) - 1
    if not 0 <= t <= last or t != int(t):
        refuse(f"timestep must be an integer from 0 to {last}", t, "one of scheduler.timesteps")
    # As the original: never below timestep 0, whatever final_alpha_cumprod is.
    target = max(int(t) - config.num_train_timesteps // scheduler.num_inference_steps, 0)
    clip = float(config.clip_sample_range) if config.clip_sample else None
    return _row(
        float(levels[int(t)]), float(levels[target]), config.prediction_type, eta, clip, use_clipped_model_output
    )


@lru_cache(4096)
def _row(
    alpha_bar_t: float,
    alpha_bar_prev: float,
    prediction_type: str,
    eta: float,
    clip: float | None,
    use_clipped_model_output: bool,
) -> StepCoefficients:
    return ddim_coefficients(
        alpha_bar_t,
        alpha_bar_prev,
        prediction_type,
        variance=variance_with_room(alpha_bar_t, alpha_bar_prev, eta),
        clip_sample_range=clip,
        use_clipped_model_output=use_clipped_model_output,
    )


def _check_density(rows: Rows, timesteps: list[Any], eta: float) -> None:
    for row, t in zip(rows, timesteps, strict=True):
        if not row.has_density():
            raise ValueError(
                f"the log-probability of a step needs noise, got eta = {eta} at timestep {t}, where the step adds none: "
                "use eta above 0, and leave the step from timestep 0 out (steps_offset=1 has none)"
            )


__all__ = ["ddim_step_with_logprob"]
