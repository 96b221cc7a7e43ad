"""``DDPMScheduler``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ...plans.coefficients import ddpm_posterior_coefficients, ddpm_variance, forward_variance
from ..arguments import LeaveToOriginal, check_tensors, single_timestep
from ..original_results import coefficient, originals_x0
from .fused_steps import FusedSteps
from .noise import noise_like_the_originals
from .output import step_output
from .takes_files import refuse_files

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling

_LARGE = {"fixed_small": False, "fixed_small_log": False, "fixed_large": True}
"""Whether a ``variance_type`` is beta_t, rather than the posterior's variance. ("fixed_large_log" is
NaN in the original.)"""


def originals_posterior(
    x: Tensor, m: Tensor, noise: Tensor | None, *, prediction_type: str, clip: bool, thresholding: bool
) -> tuple[Tensor, Tensor]:
    """Run the operations of the ``step`` of DDPM; return x0 and x_prev."""
    k = coefficient(x)
    x0 = originals_x0(k, x, m, prediction_type)
    if thresholding:
        x0 = (x0.reshape(len(x0), -1) / 1).reshape(x0.shape)
    elif clip:
        x0 = x0.clamp(-1, 1)
    x_prev = k * x0 + k * x
    return x0, x_prev if noise is None else x_prev + k * noise


class FastDDPMScheduler(FusedSteps, DDPMScheduler):
    """``diffusers.DDPMScheduler`` with its update in one kernel.

    docs/drop_ins/diffusers.md lists every difference. The arguments are the original's. Learned
    variances are left to it.
    """

    _clean_level = "one"
    _row_fields = (
        "prediction_type",
        "clip_sample",
        "clip_sample_range",
        "thresholding",
        "variance_type",
    )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Set the timesteps as the original does.

        Raises:
            ValueError: ``timesteps`` is a file of ``ddim-fast search``. And the original's errors.
        """
        refuse_files(self, {"timesteps": timesteps})
        self._row_cache = None
        DDPMScheduler.set_timesteps(self, num_inference_steps, device, timesteps)

    @property
    def _pairs_are_explicit(self) -> bool:
        return bool(self.custom_timesteps or self.num_inference_steps)

    def _check_visited(self, t: int) -> None:
        if self._pairs_are_explicit and t not in self._cache().visited:
            raise LeaveToOriginal(f"a timestep must be one of timesteps, got {t}")

    def _pair(self, t: int) -> tuple[int, int]:
        visited = self._visited()
        return (t, (*visited, -1)[visited.index(t) + 1]) if t in visited else (t, t - 1)

    def _posterior_row(self, t: int) -> StepCoefficients:
        levels = alpha_bar_t, alpha_bar_prev = tuple(map(self._alpha_bar, self._pair(t)))
        try:
            # The original keeps the smaller variance from 0, where it may take its logarithm.
            large = _LARGE[self.config.variance_type]
            variance = forward_variance(*levels) if large else max(ddpm_variance(*levels), 1e-20)
            return ddpm_posterior_coefficients(
                alpha_bar_t,
                alpha_bar_prev,
                self._prediction(alpha_bar_t),
                std_dev_added=math.sqrt(variance) if t > 0 else 0.0,
                clip_sample_range=self._clip_range(),
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise LeaveToOriginal(str(error)) from None

    _originals_results = staticmethod(originals_posterior)

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take the original's ``step`` in one pass: the mean of q(x_prev | x_t, x0) (equation 7 of
        DDPM, arXiv 2006.11239) and noise.

        Raises:
            The original's errors.
        """
        if not _is_dynamo_compiling():
            try:
                check_tensors(sample, model_output)
                t = single_timestep(timestep)
                t = t if isinstance(t, int) else int(t.item())  # whether noise is drawn depends on it
                noise = noise_like_the_originals(model_output, sample, generator, None) if t > 0 else None
                found = self._fused(self._rows(self._posterior_row), model_output, t, sample, noise)
                return step_output(DDPMSchedulerOutput, found) if return_dict else found
            except LeaveToOriginal:
                pass
        return DDPMScheduler.step(self, model_output, timestep, sample, generator, return_dict)
