"""Steps looked up by timestep: for loops of other libraries, which say where they are by a timestep, on the host or on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.contract import StepCoefficients, StepInputs, StepTable
from ..kernels.dispatch import ddim_step, ddim_step_from_table, run_per_sample


class StepsByTimestep:
    """One row of coefficients for each timestep, made when it is first needed.

    Args:
        num_timesteps: T. Timesteps are 0 to T - 1.
        coefficients: ``coefficients(t)`` is the row of the step that starts at timestep t.
    """

    def __init__(self, num_timesteps: int, coefficients: Callable[[int], StepCoefficients]):
        self.num_timesteps = num_timesteps
        self._make = coefficients
        self._rows: dict[int, StepCoefficients] = {}
        self._tables: dict[tuple[torch.device, float | None], StepTable] = {}

    def row(self, t: int) -> StepCoefficients:
        """The coefficients of the step that starts at timestep ``t``.

        Raises:
            ValueError: there is no such timestep, or no such step.
        """
        found = self._rows.get(t)
        if found is None:
            if not 0 <= t < self.num_timesteps:
                raise ValueError(f"a timestep must be 0 to {self.num_timesteps - 1}, got {t}")
            found = self._rows[t] = self._make(t)
        return found

    def table(self, device: torch.device, guidance_scale: float | None = None) -> StepTable:
        """All rows in device memory: row t for timestep t."""
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
        """``ddim_step`` at timestep ``t``.

        Args:
            t: a number for all samples, or a tensor, one number or ``(B,)``. Where it is on a GPU, nothing waits for it: the kernel looks
                its row up.
            noise_step: added to the timestep, modulo 2**32, it is the step of noise from seeds.
            tensors: as ``ddim_step`` takes them: ``noise``, ``seeds``, ``mask`` ...
        """
        if isinstance(t, Tensor):
            if t.device.type != "cpu":
                table = self.table(t.device, guidance_scale)
                return ddim_step_from_table(
                    x_t, model_output, table, t.reshape(-1), noise_step=noise_step, out=out, x0_out=x0_out, **tensors
                )
            if t.numel() != 1 and t.shape != x_t.shape[:1]:
                raise ValueError(
                    f"t must be one timestep, or one for each of the {len(x_t)} samples, got a tensor of shape {tuple(t.shape)}"
                )
            numbers = t.reshape(-1).tolist()
            if len(set(numbers)) > 1:
                rows = [self.row(number) for number in numbers]
                inputs = StepInputs(x_t, model_output, rows[0], x_prev=out, x0=x0_out, **tensors)
                return run_per_sample(
                    inputs, rows, [guidance_scale] * len(rows), [noise_step + number for number in numbers]
                )
            t = numbers[0] if numbers else 0
        return ddim_step(
            x_t,
            model_output,
            self.row(t),
            guidance_scale=guidance_scale,
            noise_step=(noise_step + t) & 0xFFFFFFFF,
            out=out,
            x0_out=x0_out,
            **tensors,
        )
