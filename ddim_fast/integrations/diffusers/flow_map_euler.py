"""``FlowMapEulerDiscreteScheduler``."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from diffusers import FlowMapEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_map_euler_discrete import FlowMapEulerDiscreteSchedulerOutput
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ..arguments import LeaveToOriginal
from ..original_results import HALF_PRECISION
from .sigma_rows import SigmaRows, flow_row
from .sigma_steps import SigmaSteps, set_timesteps_on_host


def _originals_results(x: Tensor, m: Tensor, noise: None, *, prediction_type: str) -> tuple[Tensor]:
    """Run the operations of the original's ``step``, whose coefficients have dimensions."""
    k = torch.empty([1] * x.ndim, dtype=torch.float64, device=x.device)
    return ((x - k * m).to(m.dtype),)


class FastFlowMapEulerDiscreteScheduler(SigmaSteps, FlowMapEulerDiscreteScheduler):
    """``diffusers.FlowMapEulerDiscreteScheduler`` with its update in one kernel.

    The arguments are the original's. It computes in float64: a step whose result is float32 is left
    to it, and so is one to a ``r_timestep``.
    """

    _output_kind = FlowMapEulerDiscreteSchedulerOutput
    _timesteps_are_floats = False
    _row_attributes = ("sigmas", "timesteps")

    _originals_results = staticmethod(_originals_results)
    set_timesteps = set_timesteps_on_host(FlowMapEulerDiscreteScheduler, "sigmas", "timesteps")

    def _row_between(self, sigma: float, sigma_next: float) -> StepCoefficients:
        return flow_row(sigma, sigma_next, False)

    def _key(self, rows: SigmaRows, timestep: Any) -> int | None:
        """Return the index of a timestep: the step depends on it, not on ``step_index``."""
        value = self._value_of(timestep)
        if value not in rows.index_of_timestep:
            rows.index_of_timestep[value] = self._index_of(value)
        return rows.index_of_timestep[value]

    def _value_of(self, timestep: Any) -> float:
        value = self._value_of_view(timestep)
        if value is not None:
            return value
        try:
            return float(timestep.flatten()[0].item() if isinstance(timestep, Tensor) else timestep)
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise LeaveToOriginal(str(error)) from None

    def _index_of(self, value: float) -> int | None:
        """Return the nearest timestep's index by the original's rule, without waiting for a device."""
        with np.errstate(all="ignore"):
            off = np.abs(np.array(self._values_on_host("timesteps"), np.float32) - np.float32(value))
        if not len(off):
            raise LeaveToOriginal("a step needs timesteps, got none")
        nearest = int(off.argmin())
        return nearest if float(off[nearest]) <= 1e-3 else None

    def index_for_timestep(self, timestep: Any) -> int | None:
        """Return the index of a timestep as the original does, without waiting for a device."""
        if self.timesteps is not None and not torch.compiler.is_dynamo_compiling():
            with suppress(LeaveToOriginal):
                return self._index_of(self._value_of(timestep))
        return super().index_for_timestep(timestep)  # type: ignore[no-any-return,misc]  # the original

    def _init_step_index(self, timestep: Any) -> None:
        """Find the index of the first step by the original's own rule: 0 for a timestep of no step."""
        FlowMapEulerDiscreteScheduler._init_step_index(self, timestep)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        r_timestep: float | Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take the original's ``step``, along the model's mean velocity, in one pass."""
        if r_timestep is None and isinstance(model_output, Tensor) and model_output.dtype in HALF_PRECISION:
            output = self._step(model_output, timestep, sample, None, return_dict)
            if output is not None:
                return output
        return super().step(model_output, timestep, sample, r_timestep, return_dict)  # type: ignore[misc]  # the original
