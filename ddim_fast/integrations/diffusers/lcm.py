"""``LCMScheduler``."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from diffusers import LCMScheduler
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ...plans.coefficients import consistency_coefficients
from ..original_results import coefficient, originals_x0
from .consistency_steps import ConsistencySteps
from .takes_files import without_files


class FastLCMScheduler(ConsistencySteps, LCMScheduler):
    """``diffusers.LCMScheduler`` with its update in one kernel.

    docs/drop_ins/diffusers.md lists every difference. The arguments are the original's.
    """

    _output_kind = LCMSchedulerOutput
    _cleaner_name = "denoised"
    _row_fields = (
        "prediction_type",
        "clip_sample",
        "clip_sample_range",
        "thresholding",
        "timestep_scaling",
    )

    set_timesteps = without_files(LCMScheduler)

    def _cleaner_row(self, index: int, options: Hashable, t: int) -> StepCoefficients:
        c_skip, c_out = self.get_scalings_for_boundary_condition_discrete(t)  # type: ignore[attr-defined]  # the original
        alpha_bar_t = self._alpha_bar(t)
        return consistency_coefficients(
            alpha_bar_t, self._prediction(alpha_bar_t), c_skip=c_skip, c_out=c_out, clip_sample_range=self._clip_range()
        )

    def _levels(self, index: int, options: Hashable, t: int) -> tuple[float, int]:
        visited = self._cache().timesteps
        return 1.0, self._existing(visited[index + 1] if index + 1 < len(visited) else t)

    @staticmethod
    def _originals_results(
        x: Tensor, m: Tensor, noise: Tensor | None, *, prediction_type: str, clip: bool, thresholding: bool
    ) -> tuple[Tensor, Tensor]:
        """Run the operations of the original's ``step``; return the denoised sample and x_prev."""
        k = coefficient(x)
        x0 = originals_x0(k, x, m, prediction_type)
        if thresholding:
            x0 = (x0.reshape(len(x0), -1) / 1).reshape(x0.shape)
        elif clip:
            x0 = x0.clamp(-1, 1)
        denoised = k * x0 + k * x
        return denoised, denoised if noise is None else k * denoised + k * noise

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take the original's ``step`` (Luo et al. 2023, arXiv 2310.04378, algorithm 3) in one
        pass; where x0 is clipped and noise is added, in two.

        Raises:
            The original's errors.
        """
        output = self._step(model_output, timestep, sample, generator, return_dict, noisy=True)
        if output is not None:
            return output
        return LCMScheduler.step(self, model_output, timestep, sample, generator, return_dict)
