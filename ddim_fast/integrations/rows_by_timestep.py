"""Rows of coefficients looked up by timestep.

Loops of other libraries pass a timestep to each step, as a number or as a tensor on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.contract import StepCoefficients, StepInputs, StepTable
from ..kernels.dispatch import ddim_step, ddim_step_from_table, run_per_sample
from ..utils.checks import refuse

_MAX_CACHED = 64


class RowsByTimestep:
    """One row of coefficients for each timestep, computed when it is first needed.

    Args:
        num_timesteps: T. Timesteps are 0 to T - 1.
        coefficients: ``coefficients(t)`` is the row of the step that starts at timestep t.
        remedy: what an error about another ``t`` advises.
    """

    def __init__(self, num_timesteps: int, coefficients: Callable[[int], StepCoefficients], remedy: str = ""):
        self.num_timesteps = num_timesteps
        self._coefficients = coefficients
        self._remedy = remedy
        self._rows: dict[int, StepCoefficients] = {}
        self._tables: dict[tuple[torch.device, float | None], StepTable] = {}

    def row(self, t: int) -> StepCoefficients:
        """Return the coefficients of the step that starts at timestep ``t``.

        Raises:
            ValueError: there is no such timestep, or no such step.
        """
        found = self._rows.get(t)
        if found is None:
            if not 0 <= t < self.num_timesteps:
                refuse(f"t must be 0 to {self.num_timesteps - 1}", t, self._remedy)
            found = self._rows[t] = self._coefficients(t)
        return found

    def table(self, device: torch.device, guidance_scale: float | None = None) -> StepTable:
        """Return all rows in device memory: row t for timestep t."""
        key = (device, guidance_scale)
        if key not in self._tables:
            rows = [self.row(t) for t in range(self.num_timesteps)]
            self._tables[key] = StepTable.of(rows, device, guidance_scale)
        return self._tables[key]

    def step(
        self,
        x_t: Tensor,
        model_output: Tensor,
        t: int | Tensor,
        *,
        guidance_scale: float | None = None,
        noise_step: int = 0,
        out: Tensor | None = None,
        x0_out: Tensor | None = None,
        **tensors: Any,
    ) -> Tensor:
        """Take the step of timestep ``t``.

        All other arguments, the result and the errors are those of ``ddim_step``.

        Args:
            t: a number for all samples, or a tensor: one number, or ``(B,)``. A tensor on a GPU is
                not copied to the host: the kernel looks its rows up.
            noise_step: plus the timestep, modulo 2**32, it is the step number of noise from seeds.
            tensors: any of ``noise``, ``seeds``, ``mask`` and the other tensors of ``ddim_step``.
        """
        if not isinstance(t, Tensor):
            number = t
        elif t.device.type != "cpu":
            table = self.table(t.device, guidance_scale)
            return ddim_step_from_table(
                x_t, model_output, table, t.reshape(-1), noise_step=noise_step, out=out, x0_out=x0_out, **tensors
            )
        elif t.numel() != 1 and t.shape != x_t.shape[:1]:
            raise ValueError(
                f"t must be one timestep, or one for each of the {len(x_t)} samples, "
                f"got a tensor of shape {tuple(t.shape)}"
            )
        else:
            numbers = t.reshape(-1).tolist()
            if len(set(numbers)) > 1:
                rows = [self.row(number) for number in numbers]
                inputs = StepInputs(
                    x_t=x_t, model_output=model_output, coefficients=rows[0], x_prev=out, x0=x0_out, **tensors
                )
                return run_per_sample(
                    inputs, rows, [guidance_scale] * len(rows), [noise_step + number for number in numbers]
                )
            number = numbers[0] if numbers else 0
        return ddim_step(
            x_t,
            model_output,
            self.row(number),
            guidance_scale=guidance_scale,
            noise_step=(noise_step + number) & 0xFFFFFFFF,
            out=out,
            x0_out=x0_out,
            **tensors,
        )


def cached_rows(
    cache: dict[Any, RowsByTimestep], key: Any, num_timesteps: int, coefficients: Callable[[int], StepCoefficients]
) -> RowsByTimestep:
    """Return ``cache[key]``, created where it is missing.

    A full cache is emptied first: some callers sweep over eta.
    """
    found = cache.get(key)
    if found is None:
        if len(cache) >= _MAX_CACHED:
            cache.clear()
        found = cache[key] = RowsByTimestep(num_timesteps, coefficients)
    return found
