"""``DDIMScheduler``, ``DDPMScheduler`` and ``RFlowScheduler``."""

from __future__ import annotations

import math
from typing import Any

import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, RFlowScheduler
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ...plans.coefficients import variance_with_room
from ...utils.untraced import untraced
from ..arguments import LeaveToOriginal
from .fused_steps import FusedSteps, check_plain, checked_flag, noise_like, take
from .rows import ddim_row, ddpm_row, flow_row, originals_flow_results, originals_results, row_of


class FastDDIMScheduler(FusedSteps, DDIMScheduler):
    """``monai.networks.schedulers.DDIMScheduler`` with its update in one kernel.

    docs/drop_ins/monai.md lists every difference.

    Args:
        explicit_pairs: step from each timestep to the next one of ``timesteps``. The original steps
            to ``timestep - num_train_timesteps // num_inference_steps``, which is another timestep
            for most numbers of steps.

    All other arguments are the original's.
    """

    def __init__(self, *args: Any, explicit_pairs: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.explicit_pairs = checked_flag(explicit_pairs)

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Take the original's ``step`` in one pass (equation 12 of the DDIM paper).

        Raises:
            ValueError: ``eta`` asks for more noise than the step has room for; with
                ``explicit_pairs``, the timestep is not one of ``timesteps``, or this call has no
                fused form. And the original's errors.
        """
        if torch.compiler.is_dynamo_compiling() and not self.explicit_pairs:
            return super().step(model_output, timestep, sample, eta, generator)
        return self._step(model_output, timestep, sample, eta, generator)

    @untraced
    def _step(
        self, model_output: Tensor, timestep: int, sample: Tensor, eta: float, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        try:
            prediction_type = self._prediction_type()
            row = self._row(model_output, timestep, sample, eta, prediction_type)
        except LeaveToOriginal as reason:
            self._no_row(reason)
            return super().step(model_output, timestep, sample, eta, generator)
        noise = noise_like(model_output, generator) if eta > 0 else None
        options = {"prediction_type": prediction_type, "clip": row.clipped, "posterior": False}
        return take(row, model_output, sample, noise, originals_results, **options)

    def _row(self, model_output: Any, timestep: Any, sample: Any, eta: Any, prediction_type: str) -> StepCoefficients:
        if type(eta) not in (int, float) or not 0 <= eta < math.inf:
            raise LeaveToOriginal(f"eta must be a float, 0 or more and finite, got {eta!r:.80}: pass float(eta)")
        t = self._checked_timestep(model_output, timestep, sample)
        if self.explicit_pairs:
            before = self._next_of(t)
        elif type(self.num_inference_steps) is not int or self.num_inference_steps < 1:
            raise LeaveToOriginal(f"num_inference_steps must be at least 1, got {self.num_inference_steps!r:.80}")
        else:
            before = t - self.num_train_timesteps // self.num_inference_steps
        levels = self._values("alphas_cumprod")
        alpha_bar_prev = levels[before] if before >= 0 else self._values("final_alpha_cumprod")
        try:
            variance = variance_with_room(levels[t], alpha_bar_prev, eta, f"at timestep {t}")
        except ArithmeticError as error:
            raise LeaveToOriginal(str(error)) from None
        return row_of(ddim_row, levels[t], alpha_bar_prev, prediction_type, self._clip(), variance)


class FastDDPMScheduler(FusedSteps, DDPMScheduler):
    """``monai.networks.schedulers.DDPMScheduler`` with its update in one kernel.

    docs/drop_ins/monai.md lists every difference. Learned variances are left to the original.

    Args:
        explicit_pairs: step from each timestep to the next one of ``timesteps``. The original steps
            to ``timestep - 1``, which is another timestep unless it takes all of them.

    All other arguments are the original's.
    """

    def __init__(self, *args: Any, explicit_pairs: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.explicit_pairs = checked_flag(explicit_pairs)

    def _get_name(self) -> str:
        """Return the name that ``DiffusionInferer.get_likelihood`` asks for."""
        return "DDPMScheduler"

    def step(
        self, model_output: Tensor, timestep: int, sample: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take the original's ``step`` in one pass: the mean of q(x_prev | x_t, x0) (equation 7 of
        DDPM, arXiv 2006.11239) and noise.

        Raises:
            ValueError: with ``explicit_pairs``, the timestep is not one of ``timesteps``, or this
                call has no fused form. And the original's errors.
        """
        if torch.compiler.is_dynamo_compiling() and not self.explicit_pairs:
            return super().step(model_output, timestep, sample, generator)
        return self._step(model_output, timestep, sample, generator)

    @untraced
    def _step(
        self, model_output: Tensor, timestep: int, sample: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        try:
            prediction_type = self._prediction_type()
            row, adds_noise = self._row(model_output, timestep, sample, prediction_type)
        except LeaveToOriginal as reason:
            self._no_row(reason)
            return super().step(model_output, timestep, sample, generator)
        noise = noise_like(model_output, generator) if adds_noise else None
        options = {"prediction_type": prediction_type, "clip": row.clipped, "posterior": True}
        return take(row, model_output, sample, noise, originals_results, **options)

    def _row(
        self, model_output: Any, timestep: Any, sample: Any, prediction_type: str
    ) -> tuple[StepCoefficients, bool]:
        t = self._checked_timestep(model_output, timestep, sample)
        variance_type = str(self.variance_type)
        if variance_type not in ("fixed_small", "fixed_large"):
            raise LeaveToOriginal(f"variance_type must be 'fixed_small' or 'fixed_large', got {variance_type!r}")
        before = self._next_of(t) if self.explicit_pairs else t - 1
        levels = self._values("alphas_cumprod")
        alpha_bar_prev = levels[before] if before >= 0 else self._values("one")
        beta = self._values("betas")[t] if before == t - 1 else None
        adds_noise = before >= 0
        options = (prediction_type, self._clip(), beta, variance_type, adds_noise)
        return row_of(ddpm_row, levels[t], alpha_bar_prev, *options), adds_noise


class FastRFlowScheduler(FusedSteps, RFlowScheduler):
    """``monai.networks.schedulers.RFlowScheduler`` with its update in one kernel.

    docs/drop_ins/monai.md lists every difference. The arguments are the original's.
    """

    def step(
        self, model_output: Tensor, timestep: int, sample: Tensor, next_timestep: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take the original's ``step``, along the model's velocity, in one pass.

        Raises:
            The original's errors.
        """
        if not torch.compiler.is_dynamo_compiling():
            try:
                row = self._row(model_output, timestep, sample, next_timestep)
                return take(row, model_output, sample, None, originals_flow_results)
            except LeaveToOriginal:
                pass
        return super().step(model_output, timestep, sample, next_timestep)

    def _row(self, model_output: Any, timestep: Any, sample: Any, next_timestep: Any) -> StepCoefficients:
        check_plain(model_output, sample)
        count = getattr(self, "num_inference_steps", None)
        if type(count) is not int or count < 1:
            raise LeaveToOriginal("a step needs timesteps: call set_timesteps first")
        if type(timestep) not in (int, float) and not (isinstance(timestep, Tensor) and timestep.ndim == 0):
            raise LeaveToOriginal(f"timestep must be one number, got {timestep!r:.80}")
        try:
            # In the dtype of the timestep, and to an integer, as the original.
            ahead = None if next_timestep is None else float(timestep - int(next_timestep))
            length = 1.0 / count if ahead is None else ahead / self.num_train_timesteps
            time = float(timestep) / self.num_train_timesteps
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise LeaveToOriginal(str(error)) from None
        return row_of(flow_row, time, length)
