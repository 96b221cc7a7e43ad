"""``CogVideoXDDIMScheduler``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler
from diffusers.schedulers.scheduling_ddim_cogvideox import DDIMSchedulerOutput
from torch import Tensor

from ...plans.schedules import NoiseSchedule
from ..original_results import coefficient, originals_x0
from .config_fields import add_config_fields, check_flags
from .sampling_step import SamplingSteps
from .solver_path import SolverPath, path_of_ddim


class FastCogVideoXDDIMScheduler(SamplingSteps, CogVideoXDDIMScheduler):
    """``diffusers.CogVideoXDDIMScheduler`` with its update in one kernel.

    docs/drop_ins/diffusers.md lists every difference.

    Args:
        explicit_pairs, solver: as of ``FastDDIMScheduler``. A file is one for the schedule
            ``NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod)``.

    All other arguments are the original's.
    """

    _output_kind = DDIMSchedulerOutput
    _row_fields = ("num_train_timesteps", "prediction_type", "explicit_pairs")
    _clips = False

    @add_config_fields(CogVideoXDDIMScheduler)
    def __init__(self, *args: Any, explicit_pairs: bool = False, solver: Any = None, **kwargs: Any):
        check_flags(explicit_pairs=explicit_pairs)
        super().__init__(*args, **kwargs)
        self._keep_solver(solver)

    def _path_of_files(self) -> SolverPath:
        found = path_of_ddim(self.config, NoiseSchedule.from_alphas_cumprod(self.alphas_cumprod))
        return replace(
            found, sampler_options={**found.sampler_options, "clip_sample": False, "clip_sample_range": None}
        )

    @staticmethod
    def _originals_results(
        x: Tensor,
        m: Tensor,
        noise: Tensor | None,
        *,
        prediction_type: str,
        clip: bool,
        thresholding: bool,
        recomputed: bool,
    ) -> tuple[Tensor, Tensor]:
        """Run the operations of the original's ``step``; return x0 and x_prev."""
        k = coefficient(x)
        x0 = originals_x0(k, x, m, prediction_type)
        return x0, k * x + k * x0

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take the original's ``step`` in one pass: that of DDIM without noise (equation 12 of the
        DDIM paper). Like it, read no ``eta``, ``use_clipped_model_output``, ``generator`` and
        ``variance_noise``.

        Raises:
            ValueError: with ``explicit_pairs``, the timestep is not one of ``timesteps``. And the
                original's errors.
        """
        return super().step(model_output, timestep, sample, return_dict=return_dict)
