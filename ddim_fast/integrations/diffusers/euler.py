"""``EulerDiscreteScheduler``, ``EulerAncestralDiscreteScheduler`` and ``EDMEulerScheduler``."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import EDMEulerScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ..original_results import coefficient
from .file_steps import FileSteps
from .next_input import NextInputSteps
from .sigma_rows import exploding_row
from .sigma_steps import originals_exploding_x0, set_timesteps_on_host
from .solver_path import SolverPath, path_of_edm, path_of_sigmas
from .takes_files import with_solver


class _EulerSteps(NextInputSteps):
    """A scheduler on the variance-exploding path, x = x0 + sigma eps."""

    _returns_x0 = True
    _row_fields: tuple[str, ...] = ("prediction_type",)

    def _row_between(self, sigma: float, sigma_next: float) -> StepCoefficients:
        return exploding_row(sigma, sigma_next, self.config.prediction_type)

    @staticmethod
    def _originals_results(x: Tensor, m: Tensor, noise: Tensor | None, *, prediction_type: str) -> tuple[Tensor, ...]:
        k, x = coefficient(x), x.to(torch.float32)
        x0 = originals_exploding_x0(k, x, m, prediction_type)
        x_prev = x + (x - x0) / k * k
        return (x_prev if noise is None else x_prev + noise * k).to(m.dtype), x0


def _churns(s_churn: float, s_tmin: float, s_tmax: float) -> bool:
    """Return whether a step may add noise before it starts, which has no fused form."""
    return s_churn != 0 or s_tmin != 0 or s_tmax != math.inf


class FastEulerDiscreteScheduler(FileSteps, _EulerSteps, EulerDiscreteScheduler):
    """``diffusers.EulerDiscreteScheduler`` with its update in one kernel.

    docs/drop_ins/diffusers.md lists every difference.

    Args:
        solver: a file that ``ddim-fast search`` wrote, or its content: see ``FastDDIMScheduler``.

    All other arguments are the original's.
    """

    _output_kind = EulerDiscreteSchedulerOutput

    set_timesteps = set_timesteps_on_host(EulerDiscreteScheduler, "timesteps")

    __init__ = with_solver(EulerDiscreteScheduler)

    def _path_of_files(self) -> SolverPath:
        return path_of_sigmas(self.config, self.alphas_cumprod, divided=True)

    @property
    def init_noise_sigma(self) -> Any:
        """The standard deviation of the first sample as the original has it; with a file, that of a
        sample at the first noise level."""
        if self._solver is None:
            return super().init_noise_sigma  # type: ignore[misc]  # the original
        return math.hypot(float(self.sigmas[0]), 1.0)

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
        return_dict: bool = True,
    ) -> Any:
        """Take the original's ``step`` in one pass (Karras et al. 2022, arXiv 2206.00364)."""
        if not _churns(s_churn, s_tmin, s_tmax):
            output = self._step(model_output, timestep, sample, generator, return_dict)
            if output is not None:
                return output
        self._leave_to_original()
        return super().step(model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, return_dict)  # type: ignore[misc]  # the original


class FastEulerAncestralDiscreteScheduler(_EulerSteps, EulerAncestralDiscreteScheduler):
    """``diffusers.EulerAncestralDiscreteScheduler`` with its update in one kernel.

    The arguments are the original's.
    """

    _output_kind = EulerAncestralDiscreteSchedulerOutput

    set_timesteps = set_timesteps_on_host(EulerAncestralDiscreteScheduler, "timesteps")

    def _row_between(self, sigma: float, sigma_next: float) -> StepCoefficients:
        return exploding_row(sigma, sigma_next, self.config.prediction_type, ancestral=True)

    def _noise_dtype(self, model_output: Tensor) -> torch.dtype | None:
        return model_output.dtype

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take the original's ``step``, DDPM's on the variance-exploding path, in one pass."""
        if self.config.prediction_type in ("epsilon", "v_prediction"):
            output = self._step(model_output, timestep, sample, generator, return_dict)
            if output is not None:
                return output
        return super().step(model_output, timestep, sample, generator, return_dict)  # type: ignore[misc]  # the original


class FastEDMEulerScheduler(FileSteps, _EulerSteps, EDMEulerScheduler):
    """``diffusers.EDMEulerScheduler`` with its update in one kernel.

    Args:
        solver: a file that ``ddim-fast search`` wrote, or its content: see ``FastDDIMScheduler``.

    All other arguments are the original's.
    """

    _output_kind = EDMEulerSchedulerOutput
    _row_fields = ("prediction_type", "sigma_data")

    set_timesteps = set_timesteps_on_host(EDMEulerScheduler, "timesteps")

    __init__ = with_solver(EDMEulerScheduler)

    def _path_of_files(self) -> SolverPath:
        return path_of_edm(self.config)

    def _row_between(self, sigma: float, sigma_next: float) -> StepCoefficients:
        return exploding_row(sigma, sigma_next, self.config.prediction_type, float(self.config.sigma_data))

    @staticmethod
    def _originals_results(x: Tensor, m: Tensor, noise: Tensor | None, *, prediction_type: str) -> tuple[Tensor, ...]:
        k, x = coefficient(x), x.to(torch.float32)
        x0 = k * x + k * m
        return (x + (x - x0) / k * k).to(m.dtype), x0

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
        return_dict: bool = True,
        pred_original_sample: Tensor | None = None,
    ) -> Any:
        """Take the original's ``step`` in one pass (Karras et al. 2022, arXiv 2206.00364).

        With ``pred_original_sample``, or ``s_churn``, it is left to the original.
        """
        if pred_original_sample is None and not _churns(s_churn, s_tmin, s_tmax):
            output = self._step(model_output, timestep, sample, generator, return_dict)
            if output is not None:
                return output
        self._leave_to_original()
        options = {} if pred_original_sample is None else {"pred_original_sample": pred_original_sample}
        return super().step(  # type: ignore[misc]  # the original
            model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, return_dict, **options
        )
