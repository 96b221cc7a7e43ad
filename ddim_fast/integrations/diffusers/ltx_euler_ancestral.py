"""``LTXEulerAncestralRFScheduler``."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LTXEulerAncestralRFScheduler
from diffusers.schedulers.scheduling_ltx_euler_ancestral_rf import LTXEulerAncestralRFSchedulerOutput
from torch import Tensor

from ...kernels.contract import StepCoefficients
from .sigma_rows import ancestral_flow_row, flow_row
from .sigma_steps import SigmaSteps, set_timesteps_on_host


def _originals_results(x: Tensor, m: Tensor, noise: Tensor | None, *, last: bool) -> tuple[Tensor]:
    """Run the operations of the original's ``step``, whose coefficients have dimensions."""
    k, dtype = torch.empty([1] * x.ndim, dtype=torch.float32, device=x.device), x.dtype
    x, m = x.to(torch.float32), m.to(torch.float32)
    x_prev = x - k * m
    if not last:
        x_prev = k * x + (1.0 - k) * x_prev
    if noise is not None:
        x_prev = k * x_prev + noise * k * 1.0
    return (x_prev.to(dtype),)


class FastLTXEulerAncestralRFScheduler(SigmaSteps, LTXEulerAncestralRFScheduler):
    """``diffusers.LTXEulerAncestralRFScheduler`` with its update in one kernel.

    The arguments are the original's.
    """

    _output_kind = LTXEulerAncestralRFSchedulerOutput
    _keeps_sample_dtype = True
    _row_fields = ("eta", "s_noise")

    _originals_results = staticmethod(_originals_results)
    set_timesteps = set_timesteps_on_host(LTXEulerAncestralRFScheduler, "sigmas", "timesteps")

    def _row_between(self, sigma: float, sigma_next: float) -> StepCoefficients:
        if abs(sigma_next) < 1e-8:  # the original's rule
            return flow_row(sigma, 0.0, False)
        return ancestral_flow_row(sigma, sigma_next, float(self.config.eta), float(self.config.s_noise))

    @property
    def _leads_to_data(self) -> bool:
        """Whether the step at ``step_index``, which has a row, is the last one."""
        assert self._row_cache is not None
        assert self._step_index is not None
        return abs(self._row_cache.sigmas[self._step_index + 1]) < 1e-8

    def _noise_dtype(self, model_output: Tensor) -> torch.dtype | None:
        draws = float(self.config.eta) > 0 and float(self.config.s_noise) > 0 and not self._leads_to_data
        return torch.float32 if draws else None

    def _options_of_results(self) -> dict[str, Any]:
        return {"last": self._leads_to_data}

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take the original's ``step``, along the model's velocity and back to noise, in one pass."""
        output = self._step(model_output, timestep, sample, generator, return_dict)
        if output is not None:
            return output
        return super().step(model_output, timestep, sample, generator, return_dict)  # type: ignore[misc]  # the original
