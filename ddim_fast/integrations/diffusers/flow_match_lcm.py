"""``FlowMatchLCMScheduler``."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchLCMScheduler
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMSchedulerOutput
from torch import Tensor

from ...kernels.contract import StepCoefficients
from . import internals
from .flow_match_euler import originals_flow
from .sigma_rows import flow_row
from .sigma_steps import SigmaSteps, set_timesteps_on_host


class FastFlowMatchLCMScheduler(SigmaSteps, FlowMatchLCMScheduler):
    """``diffusers.FlowMatchLCMScheduler`` with its update in one kernel.

    A step that scales the sample up is left to the original.
    """

    _output_kind = FlowMatchLCMSchedulerOutput
    _init_size: torch.Size | None

    set_timesteps = set_timesteps_on_host(FlowMatchLCMScheduler, "sigmas", "timesteps")
    _originals_results = staticmethod(originals_flow)

    def _row_between(self, sigma: float, sigma_next: float) -> StepCoefficients:
        return flow_row(sigma, sigma_next, True)

    def _noise_dtype(self, model_output: Tensor) -> torch.dtype | None:
        return torch.float32

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take the original's ``step``, to x0 and back to noise, in one pass."""
        if not internals.scales_up(self):
            starts = self._init_size is None or self._step_index is None
            output = self._step(model_output, timestep, sample, generator, return_dict)
            if output is not None:
                if starts:
                    self._init_size = model_output.size()[2:]
                return output
        return super().step(model_output, timestep, sample, generator, return_dict)  # type: ignore[misc]  # the original
