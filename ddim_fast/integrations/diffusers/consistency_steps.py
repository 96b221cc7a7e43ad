"""What the schedulers of consistency models share: a step to a cleaner sample, and back to noise."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ...kernels.cpu_step import plain_step
from ...plans.coefficients import renoised_coefficients
from ..arguments import LeaveToOriginal, check_tensors, single_timestep
from ..original_results import coefficient, kinds_of_results, step_of_kind
from .fused_steps import FusedSteps
from .output import step_output

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def _originals_renoising(cleaner: Tensor, noise: Tensor) -> tuple[Tensor]:
    """Run the operations with which the originals add noise to a cleaner sample."""
    k = coefficient(cleaner)
    return (k * cleaner + k * noise,)


class ConsistencySteps(FusedSteps):
    """A scheduler of a consistency model, which counts its steps; mixed in before the original
    class."""

    begin_index: int | None
    _step_index: int | None

    _output_kind: type
    _cleaner_name: str
    """The field of the output with the sample before noise is added."""
    _clean_level = "final_alpha_cumprod"
    _returns_x0 = False

    # --- What a class of its own says ---------------------------------------------------------------------------------

    def _cleaner_row(self, index: int, options: Hashable, t: int) -> StepCoefficients:
        """Return the row from ``t``, in the step of this index, to the cleaner sample."""
        raise NotImplementedError

    def _levels(self, index: int, options: Hashable, t: int) -> tuple[float, int]:
        """Return alpha_bar of the cleaner sample, and the timestep of x_prev."""
        raise NotImplementedError

    # --- Rows ---------------------------------------------------------------------------------------------------------

    @property
    def _pairs_are_explicit(self) -> bool:
        return True

    def _check_visited(self, t: int) -> None:
        """Accept any timestep: the index says which step it is."""

    def _existing(self, t: int) -> int:
        """Return ``t``, if it is a timestep of the noise levels."""
        if not 0 <= t < len(self._cache().alpha_bars):
            raise LeaveToOriginal(f"timesteps must be 0 to {len(self._cache().alpha_bars) - 1}, got {t}")
        return t

    def _row_to_cleaner(self, index: int, options: Hashable, t: int) -> StepCoefficients:
        try:
            return self._cleaner_row(index, options, t)
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise LeaveToOriginal(str(error)) from None

    def _row_to_prev(self, index: int, options: Hashable, t: int) -> StepCoefficients:
        row = self._row_to_cleaner(index, options, t)
        level, t_prev = self._levels(index, options, t)
        try:
            return renoised_coefficients(row, level, self._alpha_bar(t_prev))
        except (ValueError, ArithmeticError) as error:
            raise LeaveToOriginal(str(error)) from None

    # --- The step -----------------------------------------------------------------------------------------------------

    def _step(
        self,
        model_output: Any,
        timestep: Any,
        sample: Any,
        generator: Any,
        return_dict: Any,
        *,
        noisy: bool,
        options: Hashable = None,
    ) -> Any:
        """Take the original's step in one pass; or return None, if it must take it itself.

        Args:
            noisy: whether the original adds noise in all steps but the last.
            options: what else the rows depend on.
        """
        if _is_dynamo_compiling() or self.num_inference_steps is None:
            return None
        found, cache = None, self._row_cache
        rows = None if cache is None else cache.plain_at.get((self._step_index, options))
        if cache is not None and rows is not None:
            found = plain_step(sample, model_output, rows, timestep, cache.values, cache.writes, False)
        if found is not None:
            found = found[0], found[0]
        else:
            try:
                found = self._checked_step(model_output, timestep, sample, generator, noisy, options)
            except LeaveToOriginal:
                return None
        self._step_index += 1  # type: ignore[operator] # a number since the first step
        return step_output(self._output_kind, found, self._cleaner_name) if return_dict else found

    def _checked_step(
        self, m: Any, timestep: Any, x: Any, generator: Any, noisy: bool, options: Hashable
    ) -> tuple[Tensor, Tensor]:
        check_tensors(x, m)
        t: Any = single_timestep(timestep)
        if x.device.type == "meta" or (isinstance(t, Tensor) and t.device.type == "meta"):
            raise LeaveToOriginal("a step needs tensors with values, got some on the device meta")
        t = t if isinstance(t, int) else int(t.item())  # the original reads it, too
        if self._step_index is None:
            self._init_step_index(timestep)  # type: ignore[attr-defined]  # the original
        index, dtype = self._step_index, torch.promote_types(x.dtype, m.dtype)
        if type(index) is not int or index < 0:
            raise LeaveToOriginal(f"step_index must be an int, at least 0, got {index!r:.80}")
        noisy = noisy and index + 1 != self.num_inference_steps

        def draw() -> Tensor:
            return randn_tensor(m.shape, generator=generator, device=m.device, dtype=dtype)

        to_cleaner = self._rows(self._row_to_cleaner, index, options)
        clips = to_cleaner.row(self._existing(t)).clipped
        if noisy and not clips:
            to_prev = self._rows(self._row_to_prev, index, options)
            return self._fused(to_prev, m, t, x, lambda: {"noise": draw()})
        t_prev = self._levels(index, options, t)[1] if noisy else t
        cleaner, _ = self._fused(to_cleaner, m, t, x, None, writes_x0=False)
        if noisy:  # what is added to a clipped x0 is no row of one step
            noise = draw()
            (kind,) = kinds_of_results(_originals_renoising, cleaner, noise)
            renoise = self._rows(self._noising_row).step
            return step_of_kind(kind, cleaner, cleaner, t_prev, noise=noise, take=renoise), cleaner
        if self._cache().allows_short_path and not self._thresholding():
            self._cache().plain_at.setdefault((index, options), {})[t] = to_cleaner.row(t)
        return cleaner, cleaner
