"""``TCDScheduler``."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import TCDScheduler
from diffusers.schedulers.scheduling_tcd import TCDSchedulerOutput
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ...plans.coefficients import ddim_coefficients
from ..original_results import coefficient, originals_x0
from .consistency_steps import ConsistencySteps
from .takes_files import without_files


class FastTCDScheduler(ConsistencySteps, TCDScheduler):
    """``diffusers.TCDScheduler`` with its update in one kernel.

    docs/drop_ins/diffusers.md lists every difference. The arguments are the original's.
    """

    _output_kind = TCDSchedulerOutput
    _cleaner_name = "pred_noised_sample"
    _row_fields = ("prediction_type",)
    _clips = False

    set_timesteps = without_files(TCDScheduler)

    def _cleaner_row(self, index: int, options: Any, t: int) -> StepCoefficients:
        alpha_bar_t = self._alpha_bar(t)
        return ddim_coefficients(alpha_bar_t, self._levels(index, options, t)[0], self._prediction(alpha_bar_t))

    def _levels(self, index: int, options: Any, t: int) -> tuple[float, int]:
        visited, (eta, dtype) = self._cache().timesteps, options
        t_prev = self._existing(visited[index + 1] if index + 1 < len(visited) else 0)
        # The original multiplies in torch's default dtype, which may round to another timestep.
        t_cleaner = int(torch.floor((1 - eta) * torch.tensor(t_prev, dtype=dtype, device="cpu")))
        return self._alpha_bar(t_cleaner), t_prev

    @staticmethod
    def _originals_results(
        x: Tensor, m: Tensor, noise: Tensor | None, *, prediction_type: str, clip: bool, thresholding: bool
    ) -> tuple[Tensor, Tensor]:
        """Run the operations of the original's ``step``; return the cleaner sample and x_prev."""
        k = coefficient(x)
        x0 = originals_x0(k, x, m, prediction_type)
        eps = {"epsilon": lambda: m, "sample": lambda: (x - k * x0) / k}.get(prediction_type, lambda: k * m + k * x)()
        cleaner = k * x0 + k * eps
        return cleaner, cleaner if noise is None else k * cleaner + k * noise

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take the original's ``step`` (Zheng et al. 2024, arXiv 2402.19159, algorithm 4, whose
        gamma is ``eta``) in one pass.

        Raises:
            The original's errors.
        """
        if type(eta) in (float, int) and 0 <= eta <= 1:
            output = self._step(
                model_output,
                timestep,
                sample,
                generator,
                return_dict,
                noisy=eta > 0,
                options=(eta, torch.get_default_dtype()),
            )
            if output is not None:
                return output
        return TCDScheduler.step(self, model_output, timestep, sample, eta, generator, return_dict)
