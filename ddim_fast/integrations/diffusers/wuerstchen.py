"""``DDPMWuerstchenScheduler``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.schedulers.scheduling_ddpm_wuerstchen import DDPMWuerstchenSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ...plans.coefficients import ddpm_posterior_coefficients, ddpm_variance
from ...plans.schedules import squared_cosine
from ..arguments import LeaveToOriginal, check_tensors
from ..original_results import HALF_PRECISION, kinds_of_results, step_of_kinds
from .output import step_output
from .takes_files import without_files
from .watched import Watched

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def _originals_results(
    x: Tensor, m: Tensor, noise: Tensor, *, timesteps: int, levels: torch.dtype
) -> tuple[Tensor, ...]:
    """Run the operations of the original's ``step``, whose coefficients have dimensions."""
    k = torch.empty((timesteps, *[1] * (x.ndim - 1)), dtype=levels, device=x.device)
    x_prev = k * (x - k * m / k) + k * noise * k.float()
    return (x_prev.to(m.dtype),)


class _Rows(Watched):
    """The rows of a scheduler by timestep. They are valid as long as ``is_valid()``."""

    def __init__(self, scheduler: Any):
        attributes = ["timesteps", "scaler", "s"]
        read = [getattr(scheduler, name) for name in attributes]
        super().__init__(scheduler, attributes, read, [])
        self._scaler, self._s = float(scheduler.scaler), float(scheduler.s)
        self._rows: dict[float, StepCoefficients] = {}

    def row(self, timestep: Tensor) -> StepCoefficients:
        """Return the row of the step from a timestep, the same one for all samples, to the next.

        Raises:
            LeaveToOriginal: there is no such step, or it has no row.
        """
        values = set((timestep[:1] if timestep.stride(0) == 0 else timestep).tolist())
        if len(values) != 1:
            raise LeaveToOriginal(f"all samples must be at one timestep, got {len(values)} of them")
        (t,) = values
        found = self._rows.get(t)
        if found is None:
            try:
                found = self._rows[t] = self._row(timestep[:1])
            except (IndexError, ValueError, ArithmeticError) as error:
                # A step without a row: the original handles it in its own way.
                raise LeaveToOriginal(str(error)) from None
        return found

    def _row(self, t: Tensor) -> StepCoefficients:
        t_prev = self._scheduler.previous_timestep(t)
        alpha_bar_t, alpha_bar_prev = self._alpha_bar(float(t)), self._alpha_bar(float(t_prev))
        std_dev = math.sqrt(ddpm_variance(alpha_bar_t, alpha_bar_prev)) if float(t_prev) != 0 else 0.0
        return ddpm_posterior_coefficients(alpha_bar_t, alpha_bar_prev, std_dev_added=std_dev)

    def _alpha_bar(self, t: float) -> float:
        """Return the noise level of a timestep by the original's rule, in float64."""
        t = 1 - (1 - t) ** self._scaler if self._scaler > 1 else t**self._scaler
        return float(np.clip(squared_cosine(t, self._s) / squared_cosine(0.0, self._s), 0.0001, 0.9999))


class FastDDPMWuerstchenScheduler(DDPMWuerstchenScheduler):
    """``diffusers.DDPMWuerstchenScheduler`` with its update in one kernel.

    docs/drop_ins/diffusers.md lists every difference. The arguments are the original's.
    """

    s: Tensor
    scaler: float
    _row_cache: _Rows | None = None

    set_timesteps = without_files(DDPMWuerstchenScheduler)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the rows, which are computed from this scheduler: a copy computes its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_row_cache"}

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take the original's ``step`` in one pass: that of DDPM (algorithm 2 of arXiv 2006.11239),
        between continuous timesteps.

        Raises:
            The original's errors.
        """
        if not _is_dynamo_compiling():
            try:
                found = self._checked_step(model_output, timestep, sample, generator)
                return step_output(DDPMWuerstchenSchedulerOutput, found) if return_dict else found
            except LeaveToOriginal:
                pass
        return super().step(model_output, timestep, sample, generator, return_dict)  # type: ignore[misc]  # the original

    def _checked_step(self, m: Any, timestep: Any, x: Any, generator: Any) -> tuple[Tensor, ...]:
        check_tensors(x, m)
        if not isinstance(timestep, Tensor) or timestep.ndim != 1 or not timestep.dtype.is_floating_point:
            raise LeaveToOriginal(f"timestep must be numbers in a tensor, one for each sample, got {timestep!r:.80}")
        if len(timestep) not in (1, len(x)) or timestep.device != x.device or x.device.type == "meta":
            raise LeaveToOriginal("timestep must be one, or one for each sample, on their device, and have values")
        # The original then computes its noise levels in half precision.
        if self.s.dtype in HALF_PRECISION or (timestep.dtype in HALF_PRECISION and self.scaler != 1):
            raise LeaveToOriginal("noise levels in half precision are the original's")
        rows = self._row_cache
        if rows is None or not rows.is_valid():
            rows = self._row_cache = _Rows(self)
        row = rows.row(timestep)
        noise = randn_tensor(m.shape, generator=generator, device=m.device, dtype=m.dtype)
        levels = torch.promote_types(timestep.dtype, self.s.dtype)
        kinds = kinds_of_results(_originals_results, x, m, noise, timesteps=len(timestep), levels=levels)
        x_prev, _ = step_of_kinds(kinds, x, m, row, noise=noise)
        return (x_prev,)
