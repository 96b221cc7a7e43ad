"""``scale_model_input`` of schedulers on the variance-exploding path: written by the step itself."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ...kernels.torch_internals import write_count
from . import internals
from .sigma_rows import SigmaRows
from .sigma_steps import SigmaSteps

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_WORTH_IT = 1 << 17
"""From so many elements on, on a CPU: below, the step's shortest way saves more."""


class _Written(NamedTuple):
    """The model's next input, and what it was computed from."""

    x_prev: weakref.ref[Tensor]
    write_count: int | None
    rows: SigmaRows
    step_index: int
    model_input: Tensor

    def is_for(self, sample: Any, index: int | None) -> bool:
        if index != self.step_index or self.x_prev() is not sample:
            return False
        return write_count(sample) == self.write_count and self.rows.is_valid()


class NextInputSteps(SigmaSteps):
    """A scheduler with sigmas whose model's input is c_in x_t.

    Where a loop gives ``scale_model_input`` the very x_prev that a step returned, the steps after it
    write the next input, too, in the same pass. (With guidance in one batch a loop gives it a larger
    tensor, which is scaled as the original does.)
    """

    _last_x_prev: weakref.ref[Tensor] | None = None
    _written: _Written | None = None
    _writes_next_input = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a run."""
        return {
            name: value for name, value in super().__getstate__().items() if name not in ("_last_x_prev", "_written")
        }

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """Return c_in times the sample, as the original does; without a pass over memory, if the step
        before has written it.

        Raises:
            The original's errors.
        """
        written, self._written = self._written, None
        if _is_dynamo_compiling():
            return super().scale_model_input(sample, timestep)  # type: ignore[misc]  # the original
        if written is not None and written.is_for(sample, self._step_index):
            self.is_scale_input_called = True
            return written.model_input
        last = self._last_x_prev
        self._writes_next_input = (
            internals.COUNTS_WRITES
            and last is not None
            and last() is sample
            and (sample.device.type != "cpu" or sample.numel() >= _WORTH_IT)
        )
        return super().scale_model_input(sample, timestep)  # type: ignore[misc]  # the original

    def _step(self, *args: Any) -> Any:
        self._written = None
        return super()._step(*args)

    def _short_step(self, rows: SigmaRows, *args: Any) -> tuple[Tensor, ...] | None:
        found = None if self._writes_next_input else super()._short_step(rows, *args)
        if found is not None:
            self._last_x_prev = weakref.ref(found[0])
        return found

    def _whole_step(
        self,
        rows: SigmaRows,
        key: int | None,
        row: StepCoefficients,
        model_output: Tensor,
        sample: Tensor,
        noise: Tensor | None,
        **also: Tensor,
    ) -> tuple[Tensor, ...]:
        has_gradient = torch.is_grad_enabled() and (sample.requires_grad or model_output.requires_grad)
        is_last = key is None or key + 2 >= len(rows.sigmas)
        if self._writes_next_input and not (is_last or has_gradient or torch.is_inference_mode_enabled()):
            # In the dtype of x_prev, which the original's product with a number keeps.
            also["model_input_out"] = torch.empty_like(sample, dtype=model_output.dtype)
        found = super()._whole_step(rows, key, row, model_output, sample, noise, **also)
        self._last_x_prev = weakref.ref(found[0])
        model_input = also.get("model_input_out")
        if model_input is not None and key is not None and model_input.stride() == found[0].stride():
            self._written = _Written(self._last_x_prev, write_count(found[0]), rows, key + 1, model_input)
        return found
