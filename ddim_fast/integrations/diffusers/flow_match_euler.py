"""``FlowMatchEulerDiscreteScheduler``."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ..original_results import coefficient
from .file_steps import FileSteps
from .sigma_rows import flow_row
from .sigma_steps import set_timesteps_on_host
from .solver_path import SolverPath, path_of_flow
from .takes_files import with_solver


def originals_flow(x: Tensor, m: Tensor, noise: Tensor | None, *, prediction_type: str) -> tuple[Tensor]:
    """Run the operations of the ``step`` of diffusers' schedulers of flow matching."""
    k, x = coefficient(x), x.to(torch.float32)
    x_prev = x + k * m if noise is None else k * (x - k * m) + k * noise
    return (x_prev.to(m.dtype),)


class FastFlowMatchEulerDiscreteScheduler(FileSteps, FlowMatchEulerDiscreteScheduler):
    """``diffusers.FlowMatchEulerDiscreteScheduler`` with its update in one kernel.

    docs/drop_ins/diffusers.md lists every difference.

    Args:
        solver: a file that ``ddim-fast search`` wrote, or its content: see ``FastDDIMScheduler``.

    All other arguments are the original's.
    """

    _output_kind = FlowMatchEulerDiscreteSchedulerOutput
    _row_fields = ("stochastic_sampling",)

    _originals_results = staticmethod(originals_flow)
    set_timesteps = set_timesteps_on_host(FlowMatchEulerDiscreteScheduler, "sigmas", "timesteps")

    __init__ = with_solver(FlowMatchEulerDiscreteScheduler)

    def _path_of_files(self) -> SolverPath:
        return path_of_flow(self.config)

    @property
    def _renoises(self) -> bool:
        return bool(getattr(self.config, "stochastic_sampling", False))  # not in old versions

    def _row_between(self, sigma: float, sigma_next: float) -> StepCoefficients:
        return flow_row(sigma, sigma_next, self._renoises)

    def _noise_dtype(self, model_output: Tensor) -> torch.dtype | None:
        return torch.float32 if self._renoises else None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take the original's ``step``, along the model's velocity, in one pass."""
        if per_token_timesteps is None:
            output = self._step(model_output, timestep, sample, generator, return_dict)
            if output is not None:
                return output
        self._leave_to_original()
        return super().step(  # type: ignore[misc]  # the original
            model_output,
            timestep,
            sample,
            s_churn,
            s_tmin,
            s_tmax,
            s_noise,
            generator,
            per_token_timesteps,
            return_dict,
        )
