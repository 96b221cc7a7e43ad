"""What all fast schedulers share: the timesteps, the fused step, and the forward process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...kernels.dispatch import ddim_step
from ...kernels.thresholding import dynamic_thresholds
from ...plans.coefficients import DISCRETE_PREDICTIONS
from ...plans.timesteps import select_timesteps
from ...utils.untraced import untraced
from ..arguments import LeaveToOriginal
from ..original_results import (
    coefficient,
    kinds_of_results,
    originals_eps,
    originals_x0,
    per_sample_coefficient,
    readable,
    step_of_kind,
    strides_when_traced,
)
from ..rows_by_timestep import RowsByTimestep
from .arguments import batch_of_timesteps, thresholding_options
from .noise import NoiseArguments
from .scheduler_rows import SchedulerRows
from .traced_step import step_between_levels

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_kinds_of_results = untraced(kinds_of_results)


def _originals_results(
    x: Tensor,
    m: Tensor,
    noise: Tensor | None,
    *,
    prediction_type: str,
    clip: bool,
    thresholding: bool,
    recomputed: bool,
) -> tuple[Tensor, Tensor]:
    """Run the operations of the originals' ``step``; return x0 and x_prev."""
    k = coefficient(x)
    predicted = originals_x0(k, x, m, prediction_type)
    x0 = predicted
    if thresholding:
        x0 = (x0.reshape(len(x0), -1) / 1).reshape(x0.shape)
    elif clip:
        x0 = x0.clamp(-1, 1)
    x_prev = k * x0 + k * originals_eps(k, x, m, x0 if recomputed else predicted, prediction_type, recomputed)
    return x0, x_prev if noise is None else x_prev + k * noise


def _originals_sum(first: Tensor, second: Tensor) -> tuple[Tensor]:
    """Run the operations of the originals' ``add_noise`` and ``get_velocity``."""
    k = per_sample_coefficient(first, first.dtype)
    return (k * first + k * second,)


class FusedSteps(SchedulerRows):
    """A scheduler whose steps are fused; mixed in before the original class."""

    _noisiest_first = True
    """The order of ``timesteps``."""
    _originals_results: Callable[..., tuple[Tensor, ...]] = staticmethod(_originals_results)
    """The operations of the original's ``step``, for the layouts and dtypes of x0 and x_prev."""
    _returns_x0 = True
    """Whether the step returns x0, and with "sample" prediction the model's output as it is."""

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the timesteps as the original does.

        With ``explicit_pairs`` they are always exactly ``num_inference_steps`` distinct ones.
        """
        config = self.config
        if not config.explicit_pairs:
            return super().set_timesteps(num_inference_steps, device)  # type: ignore[misc]  # the original
        timesteps = select_timesteps(
            num_inference_steps,
            config.num_train_timesteps,
            config.timestep_spacing,
            steps_offset=config.steps_offset,
        )
        self.num_inference_steps = num_inference_steps
        ordered = timesteps if self._noisiest_first else timesteps[::-1]
        self.timesteps = torch.tensor(ordered, dtype=torch.int64, device="cpu" if device is None else device)
        return None

    def _refuse_what_the_original_ignores(self, reason: LeaveToOriginal, *fields: str) -> None:
        """Raise ValueError, with the reason, if one of these fields is on: the original has none."""
        if self.num_inference_steps is None:
            return
        for field in fields:
            if getattr(self.config, field, False):
                raise ValueError(f"{reason}. ({field} works in fused steps only; {field}=False turns it off)")
        if self.custom_timesteps:
            raise ValueError(f"{reason}. (A list of timesteps works in fused steps only)")

    # --- The step -----------------------------------------------------------------------------------------------------

    def _between_levels(
        self,
        model_output: Tensor,
        t: int | Tensor,
        sample: Tensor,
        eta: float,
        use_clipped_model_output: bool,
        noise: NoiseArguments | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (prev_sample, pred_original_sample) of the step at ``t``.

        Traced by ``torch.compile``, it is one operator. Where the operator cannot do it, the graph
        breaks; a step that is differentiated is left to the original.
        """
        only_fused = ("explicit_pairs", "philox_noise", "thresholding")
        if (
            not _is_dynamo_compiling()
            or self.custom_timesteps
            or any(getattr(self.config, field, False) for field in only_fused)
        ):
            rows = self._rows(self._sampling_row, eta, use_clipped_model_output)
            return self._fused(rows, model_output, t, sample, noise, recomputed=use_clipped_model_output)
        return self._traced(model_output, t, sample, eta, use_clipped_model_output, noise)

    def _fused(
        self,
        rows: RowsByTimestep,
        model_output: Tensor,
        t: int | Tensor,
        sample: Tensor,
        noise: NoiseArguments | None,
        writes_x0: bool = True,
        histories: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Take the step in one launch, after those of dynamic thresholding.

        Args:
            writes_x0: return x0; the model's output in its place otherwise.
            histories: what a multistep row reads and replaces, by the names of ``ddim_step``.
            options: those that ``_originals_results`` takes beside the configuration's.
        """
        if isinstance(t, int):
            self._check_visited(t)
            if not 0 <= t < rows.num_timesteps:
                raise LeaveToOriginal(f"timestep must be 0 to {rows.num_timesteps - 1}, got {t}")
        row: Any = rows.row(t) if isinstance(t, int) else rows.table(t.device)
        if sample.dtype != model_output.dtype:
            sample = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
        thresholds = None
        if self._thresholding():
            ratio, maximum = thresholding_options(self.config, sample)
            index = None if isinstance(t, int) else t.reshape(-1)
            thresholds = dynamic_thresholds(sample, model_output, row, ratio, maximum, index=index)
        # Where the model predicts x0 and nothing clips it, its output is x0.
        predicts_x0 = self._returns_x0 and self.config.prediction_type == "sample"
        is_x0 = not writes_x0 or (predicts_x0 and not row.clipped)
        arguments: dict[str, Any] = dict(histories or {})
        if noise is not None:
            arguments |= noise()  # last, after every check: it may draw from a generator
        x0_kind, kind = _kinds_of_results(
            self._originals_results,
            sample,
            model_output,
            arguments.get("noise"),
            prediction_type=self.config.prediction_type,
            clip=row.clipped,
            thresholding=thresholds is not None,
            **options,
        )
        out, x0_out = kind.empty(sample), None if is_x0 else x0_kind.empty(sample, sample.dtype)
        model_output_read = readable(model_output, sample.dtype)
        if isinstance(t, int):
            prev_sample = ddim_step(
                sample,
                model_output_read,
                row,
                thresholds=thresholds,
                noise_step=t,
                out=out,
                x0_out=x0_out,
                **arguments,
            )
        else:
            prev_sample = rows.step(
                sample, model_output_read, t, thresholds=thresholds, out=out, x0_out=x0_out, **arguments
            )
        if x0_out is None:
            return prev_sample, model_output
        return prev_sample, x0_out.to(model_output.dtype) if predicts_x0 else x0_out

    def _traced(
        self,
        model_output: Tensor,
        t: int | Tensor,
        sample: Tensor,
        eta: float,
        use_clipped_model_output: bool,
        noise: NoiseArguments | None,
    ) -> tuple[Tensor, Tensor]:
        """Take the step by the operator that looks the noise levels up when it runs."""
        config = self.config
        if torch.is_grad_enabled() and (sample.requires_grad or model_output.requires_grad):
            raise LeaveToOriginal("a traced step is not differentiable")
        if (
            type(t) is not int
            or not 0 <= t < config.num_train_timesteps
            or config.prediction_type not in DISCRETE_PREDICTIONS
        ):
            raise LeaveToOriginal("a traced step needs a timestep that exists, and a known prediction_type")
        drawn = None if noise is None else noise()["noise"]
        x0_strides, prev_strides = strides_when_traced(
            self._originals_results,
            sample,
            model_output,
            drawn,
            prediction_type=config.prediction_type,
            clip=bool(config.clip_sample),
            thresholding=False,
            recomputed=use_clipped_model_output,
        )
        if sample.dtype != model_output.dtype:
            sample = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
        prev_sample, x0 = step_between_levels(
            sample,
            model_output,
            drawn,
            self.alphas_cumprod,
            getattr(self, self._clean_level),
            *self._pair(t),
            config.prediction_type,
            self._clip_range(),
            eta,
            use_clipped_model_output,
            prev_strides,
            x0_strides,
        )
        if config.prediction_type != "sample":
            return prev_sample, x0
        return prev_sample, model_output if self._clip_range() is None else x0.to(model_output.dtype)

    # --- The forward process ------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise samples (equation 4 of the DDIM paper) as the original does."""
        try:
            t = batch_of_timesteps(timesteps, original_samples, noise, len(self.alphas_cumprod))
            (kind,) = kinds_of_results(_originals_sum, original_samples, noise)
            x0 = original_samples.to(kind.dtype)
            return step_of_kind(kind, x0, x0, t, noise=noise, take=self._rows(self._noising_row).step)
        except LeaveToOriginal:
            return super().add_noise(original_samples, noise, timesteps)  # type: ignore[misc]  # the original

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Compute the target of v-prediction (Salimans and Ho 2022) as the original does."""
        try:
            t = batch_of_timesteps(timesteps, sample, noise, len(self.alphas_cumprod))
            (kind,) = kinds_of_results(_originals_sum, noise, sample)
            return step_of_kind(kind, sample, noise.to(kind.dtype), t, take=self._rows(self._velocity_row).step)
        except LeaveToOriginal:
            return super().get_velocity(sample, noise, timesteps)  # type: ignore[misc]  # the original
