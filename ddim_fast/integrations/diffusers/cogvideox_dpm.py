"""``CogVideoXDPMScheduler``."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import CogVideoXDPMScheduler
from diffusers.schedulers.scheduling_dpm_cogvideox import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ...plans.coefficients import ddim_coefficients, ddpm_variance, multistep_coefficients
from ..arguments import LeaveToOriginal, check_no_gradients, check_tensors, single_timestep
from ..original_results import coefficient, kinds_of_results, step_of_kinds
from .fused_steps import FusedSteps, originals_x0
from .output import step_output
from .takes_files import without_files

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def _originals_results(
    x: Tensor, m: Tensor, noise: Tensor, last_x0: Tensor | None, *, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """Run the operations of the original's ``step``; return x_prev and x0."""
    k = coefficient(x)
    x0 = originals_x0(k, x, m, prediction_type)
    extrapolated = x0 if last_x0 is None else k * x0 - k * last_x0
    return k * x - k * extrapolated + k * noise, x0


class FastCogVideoXDPMScheduler(FusedSteps, CogVideoXDPMScheduler):
    """``diffusers.CogVideoXDPMScheduler`` with its update in one kernel.

    docs/drop_ins/diffusers.md lists every difference. The arguments are the original's.
    """

    _row_fields = ("num_train_timesteps", "prediction_type")
    _clean_level = "final_alpha_cumprod"
    _clips = False

    set_timesteps = without_files(CogVideoXDPMScheduler)

    @property
    def _pairs_are_explicit(self) -> bool:
        return False

    def _pair(self, t: int) -> tuple[int, int]:
        return t, t - self._stride()

    def _solver_row(self, back: int | None, t: int) -> StepCoefficients:
        """Return the row of the step from ``t``.

        Args:
            back: how much later the timestep of the step before is; None for a step of first order.
        """
        t, t_prev = self._pair(t)
        levels = alpha_bar_t, _ = self._alpha_bar(t), self._alpha_bar(t_prev)
        try:
            variance = ddpm_variance(*levels)
            if back is None:
                return ddim_coefficients(*levels, self._prediction(alpha_bar_t), variance=variance)
            if not 0 <= t + back < len(self._cache().alpha_bars):
                raise LeaveToOriginal(f"timestep_back must be a timestep, got {t + back}")
            return multistep_coefficients(
                self._alpha_bar(t + back),
                *levels,
                self._prediction(alpha_bar_t),
                variance=variance,
                max_extrapolation=math.inf,
            )
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise LeaveToOriginal(str(error)) from None

    def step(
        self,
        model_output: Tensor,
        old_pred_original_sample: Tensor | None,
        timestep: int,
        timestep_back: int | None,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = False,
    ) -> Any:
        """Take the original's ``step`` in one pass: SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv
        2211.01095). Like it, read no ``eta``, ``use_clipped_model_output`` and ``variance_noise``;
        draw noise twice in a step of second order, and use the second.

        Raises:
            The original's errors.
        """
        if not _is_dynamo_compiling():
            try:
                *found, second_order = self._checked_step(
                    model_output, old_pred_original_sample, timestep, timestep_back, sample, generator
                )
                # The original returns a tuple from the other steps, whatever ``return_dict`` says.
                return step_output(DDIMSchedulerOutput, tuple(found)) if return_dict and second_order else tuple(found)
            except LeaveToOriginal:
                pass
        return super().step(  # type: ignore[misc]  # the original
            model_output,
            old_pred_original_sample,
            timestep,
            timestep_back,
            sample,
            eta,
            use_clipped_model_output,
            generator,
            variance_noise,
            return_dict,
        )

    def _checked_step(
        self, m: Any, last_x0: Any, timestep: Any, timestep_back: Any, x: Any, generator: Any
    ) -> tuple[Tensor, Tensor, bool]:
        check_tensors(x, m)
        if self.num_inference_steps is None or x.device.type == "meta":
            raise LeaveToOriginal("a step needs timesteps, and tensors with values")
        t = self._number(timestep)
        second_order = last_x0 is not None and self._pair(t)[1] >= 0
        if second_order:
            check_tensors(x, last_x0)
            check_no_gradients(x, m, last_x0)
        back = self._number(timestep_back) - t if second_order else None
        rows = self._rows(self._solver_row, back)
        if not 0 <= t < rows.num_timesteps:
            raise LeaveToOriginal(f"timestep must be 0 to {rows.num_timesteps - 1}, got {t}")
        row, prediction_type = rows.row(t), self.config.prediction_type
        for _ in range(1 + second_order):  # the second one counts
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        history = last_x0 if second_order else None
        kinds = kinds_of_results(_originals_results, x, m, noise, history, prediction_type=prediction_type)
        is_x0 = prediction_type == "sample"
        # A row may read no history, where the step before started from pure noise.
        read = history if row.reads_history else None
        x_prev, x0 = step_of_kinds(kinds, x, m, row, noise=noise, history=read, writes_x0=not is_x0)
        return x_prev, m if is_x0 or x0 is None else x0, second_order

    @staticmethod
    def _number(timestep: Any) -> int:
        t = single_timestep(timestep)
        return t if isinstance(t, int) else int(t.item())  # what is drawn depends on it
