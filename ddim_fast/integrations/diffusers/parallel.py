"""``DDIMParallelScheduler``."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMParallelScheduler
from diffusers.schedulers.scheduling_ddim_parallel import DDIMParallelSchedulerOutput
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ..arguments import LeaveToOriginal
from ..original_results import kinds_of_results, originals_eps, originals_x0, per_sample_coefficient, step_of_kind
from .arguments import batch_of_timesteps
from .config_fields import add_config_fields, check_flags
from .sampling_step import SamplingSteps


def _originals_batch_step(
    x: Tensor, m: Tensor, *, levels: torch.dtype, prediction_type: str, clip: bool, recomputed: bool
) -> tuple[Tensor]:
    """Run the operations of the original's ``batch_step_no_noise``.

    Its coefficients have dimensions, so half precision is promoted.
    """
    k = per_sample_coefficient(x, levels)
    predicted = originals_x0(k, x, m, prediction_type)
    x0 = predicted.clamp(-1, 1) if clip else predicted
    return (k * x0 + k * originals_eps(k, x, m, x0 if recomputed else predicted, prediction_type, recomputed),)


class FastDDIMParallelScheduler(SamplingSteps, DDIMParallelScheduler):
    """``diffusers.DDIMParallelScheduler`` with its updates in one kernel.

    Its arguments are those of ``FastDDIMScheduler``.
    """

    _output_kind = DDIMParallelSchedulerOutput

    @add_config_fields(DDIMParallelScheduler)
    def __init__(
        self, *args: Any, explicit_pairs: bool = False, philox_noise: bool = False, solver: Any = None, **kwargs: Any
    ):
        check_flags(explicit_pairs=explicit_pairs, philox_noise=philox_noise)
        super().__init__(*args, **kwargs)
        self._keep_solver(solver)

    def batch_step_no_noise(
        self,
        model_output: Tensor,
        timesteps: Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
    ) -> Tensor:
        """Take the original's step of each sample's own timestep, without noise.

        It always ends at alpha_bar = 1.
        """
        try:
            if self._solver is not None:
                raise LeaveToOriginal("a step of each sample's own timestep must be between timesteps, not of a solver")
            if eta != 0 or self.num_inference_steps is None or self.config.thresholding:
                raise LeaveToOriginal(f"batch_step_no_noise needs eta = 0 and no thresholding, got eta={eta!r:.40}")
            t = batch_of_timesteps(timesteps, sample, model_output, len(self.alphas_cumprod))
            rows = self._rows(self._parallel_row, bool(use_clipped_model_output))
            (kind,) = kinds_of_results(
                _originals_batch_step,
                sample,
                model_output,
                levels=self.alphas_cumprod.dtype,
                prediction_type=self.config.prediction_type,
                clip=bool(self.config.clip_sample),
                recomputed=bool(use_clipped_model_output),
            )
            return step_of_kind(kind, sample, model_output, t, take=rows.step)
        except LeaveToOriginal as reason:
            self._refuse_what_the_original_ignores(reason, "explicit_pairs")
            return super().batch_step_no_noise(model_output, timesteps, sample, eta, use_clipped_model_output)  # type: ignore[misc]  # the original

    def _parallel_row(self, use_clipped_model_output: bool, t: int) -> StepCoefficients:
        origin, target = self._pair(t)
        alpha_bar_prev = self._alpha_bar(target) if target >= 0 else 1.0
        return self._row_between(
            self._alpha_bar(origin), alpha_bar_prev, use_clipped_model_output=use_clipped_model_output
        )
