"""``HeunDiscreteScheduler``."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteSchedulerOutput
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ...kernels.cpu_step import plain_step
from ..arguments import LeaveToOriginal, check_no_gradients, check_tensors
from ..original_results import coefficient, kinds_of_results, step_of_kinds
from .output import step_output
from .sigma_rows import SigmaRows, derivative_row, exploding_row, heun_row
from .sigma_steps import SigmaSteps, originals_exploding_x0, set_timesteps_on_host

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def _originals_x0(k: Tensor, x: Tensor, m: Tensor, prediction_type: str, clip: bool) -> Tensor:
    """Run the operations of the original's predictions of x0."""
    x0 = originals_exploding_x0(k, x, m, prediction_type)
    return x0.clamp(-1, 1) if clip else x0


def _originals_first(x: Tensor, m: Tensor, *, prediction_type: str, clip: bool) -> tuple[Tensor, ...]:
    """Run the operations of the original's first half; return x_prev, x0 and the derivative."""
    k = coefficient(x)
    x0 = _originals_x0(k, x, m, prediction_type, clip)
    derivative = (x - x0) / k
    return x + derivative * k, x0, derivative


def _originals_second(
    x: Tensor, m: Tensor, began: Tensor, derivative: Tensor, *, prediction_type: str, clip: bool
) -> tuple[Tensor, ...]:
    """Run the operations of the original's second half; return x_prev and x0."""
    k = coefficient(x)
    x0 = _originals_x0(k, x, m, prediction_type, clip)
    return began + (derivative + (x - x0) / k) / 2 * k, x0


def _have_one_dtype(x: Any, m: Any) -> bool:
    return isinstance(x, Tensor) and isinstance(m, Tensor) and x.dtype == m.dtype


class FastHeunDiscreteScheduler(SigmaSteps, HeunDiscreteScheduler):
    """``diffusers.HeunDiscreteScheduler`` with the updates of its two half-steps in the kernel.

    The arguments are the original's, and what it keeps between the halves.
    """

    _row_fields = ("prediction_type", "clip_sample", "clip_sample_range")
    prev_derivative: Tensor | None
    dt: Tensor | None
    sample: Tensor | None
    state_in_first_order: bool

    set_timesteps = set_timesteps_on_host(HeunDiscreteScheduler, "timesteps")

    def _prediction(self) -> tuple[str, float | None]:
        """Return the prediction type, and what x0 is clipped to."""
        config = self.config
        if config.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise LeaveToOriginal(f"prediction_type must be one of the original's, got {config.prediction_type!r:.80}")
        return config.prediction_type, float(config.clip_sample_range) if config.clip_sample else None

    def _row_between(self, sigma: float, sigma_next: float) -> StepCoefficients:
        prediction_type, clip = self._prediction()
        return exploding_row(sigma, sigma_next, prediction_type, clip=clip)

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """Take the original's ``step``: the first half (Euler's) in two passes, one of which computes
        the derivative that the second half reads, and the second (Karras et al. 2022, arXiv
        2206.00364, algorithm 1) in one.

        Raises:
            The original's errors.
        """
        if not _is_dynamo_compiling():
            try:
                found = self._half_step(model_output, timestep, sample)
            except LeaveToOriginal:
                pass
            else:
                self._step_index += 1  # type: ignore[operator] # a number since the first step
                return step_output(HeunDiscreteSchedulerOutput, found) if return_dict else found
        return HeunDiscreteScheduler.step(self, model_output, timestep, sample, return_dict)

    def _half_step(self, m: Any, timestep: Any, x: Any) -> tuple[Tensor, Tensor]:
        if self._row_cache is not None:
            short = self._short_first_half if self.state_in_first_order else self._short_second_half
            found = short(self._row_cache, m, x)
            if found is not None:
                return found
        rows = self._rows_of_checked(m, timestep, x)
        try:
            return self._first_half(rows, m, x) if self.state_in_first_order else self._second_half(rows, m, x)
        except (TypeError, ValueError, ArithmeticError) as error:
            # A step without a row: the original handles it in its own way.
            raise LeaveToOriginal(str(error)) from None

    def _short_first_half(self, rows: SigmaRows, m: Any, x: Any) -> tuple[Tensor, Tensor] | None:
        """Take a first half of plain tensors of one dtype, if its rows are known."""
        index = self._step_index
        if index not in rows.derivatives or not _have_one_dtype(x, m):
            return None
        found = plain_step(x, m, rows.plain, index, rows.values, rows.writes, not rows.output_is_x0)
        derivative = None if found is None else plain_step(x, m, rows.derivatives, index, (), (), False)
        if found is None or derivative is None:
            return None
        self._begin_second_half(index, derivative[0], x)
        return found[0], m if found[1] is None else found[1]

    def _short_second_half(self, rows: SigmaRows, m: Any, x: Any) -> tuple[Tensor, Tensor] | None:
        """Take a second half of plain tensors of one dtype, after a first half whose rows are known."""
        index, dt = self._step_index, self.dt
        if type(index) is not int or index - 1 not in rows.derivatives or dt is None or not _have_one_dtype(x, m):
            return None
        row = {0: heun_row(rows.sigmas[index], float(dt), *self._prediction())}
        writes_x0 = not rows.output_is_x0
        found = plain_step(x, m, row, 0, rows.values, rows.writes, writes_x0, self.sample, self.prev_derivative)
        if found is None:
            return None
        self.prev_derivative = self.dt = self.sample = None
        return found[0], m if found[1] is None else found[1]

    def _begin_second_half(self, index: int, derivative: Tensor, x: Tensor) -> None:
        self.prev_derivative = derivative
        self.dt, self.sample = self.sigmas[index + 1] - self.sigmas[index], x

    def _first_half(self, rows: SigmaRows, m: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        index = self._step_index
        row, (kind, clip) = rows.row(index), self._prediction()
        assert index is not None  # it has a row
        derivative_of = derivative_row(rows.sigmas[index], kind, clip)
        kinds = kinds_of_results(_originals_first, x, m, prediction_type=kind, clip=clip is not None)
        is_x0 = kind == "sample" and clip is None
        x_prev, x0 = step_of_kinds(kinds, x, m, row, writes_x0=not is_x0)
        derivative, _ = step_of_kinds(kinds[2:], x, m, derivative_of)
        self._begin_second_half(index, derivative, x)
        if rows.allows_short_path and is_x0 == rows.output_is_x0:
            rows.fill_plain(index)
            rows.derivatives = {each: derivative_row(rows.sigmas[each], kind, clip) for each in rows.plain}
        return x_prev, m if x0 is None else x0

    def _second_half(self, rows: SigmaRows, m: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        index, began, derivative = self._step_index, self.sample, self.prev_derivative
        check_tensors(x, began)
        check_tensors(x, derivative)
        if type(index) is not int or not 0 < index < len(rows.sigmas):
            raise LeaveToOriginal(f"step_index must be 1 to {len(rows.sigmas) - 1}, got {index!r:.80}")
        assert began is not None  # checked
        assert derivative is not None
        assert self.dt is not None  # it is, before a first half
        check_no_gradients(x, m, began, derivative)
        kind, clip = self._prediction()
        row = heun_row(rows.sigmas[index], float(self.dt), kind, clip)
        kinds = kinds_of_results(
            _originals_second, x, m, began, derivative, prediction_type=kind, clip=clip is not None
        )
        is_x0 = kind == "sample" and clip is None
        x_prev, x0 = step_of_kinds(kinds, x, m, row, noise=began, history=derivative, writes_x0=not is_x0)
        self.prev_derivative = self.dt = self.sample = None
        return x_prev, m if x0 is None else x0
