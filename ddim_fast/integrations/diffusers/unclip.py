"""``UnCLIPScheduler``."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import UnCLIPScheduler
from diffusers.schedulers.scheduling_unclip import UnCLIPSchedulerOutput
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ...plans.coefficients import ddpm_posterior_coefficients
from ..arguments import LeaveToOriginal, check_tensors, single_timestep
from .ddpm import originals_posterior
from .fused_steps import FusedSteps
from .noise import NoiseArguments, noise_like_the_originals
from .output import step_output
from .takes_files import without_files

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


class FastUnCLIPScheduler(FusedSteps, UnCLIPScheduler):
    """``diffusers.UnCLIPScheduler`` with its update in one kernel.

    docs/drop_ins/diffusers.md lists every difference. The arguments are the original's.
    """

    betas: Tensor
    variance_type: str
    _clean_level = "one"
    _row_fields = ("num_train_timesteps", "prediction_type", "clip_sample", "clip_sample_range", "variance_type")
    _row_attributes = ("betas",)

    _originals_results = staticmethod(originals_posterior)
    set_timesteps = without_files(UnCLIPScheduler)

    @property
    def _pairs_are_explicit(self) -> bool:
        return False

    def _posterior_row(self, t_prev: int, learned: bool, t: int) -> StepCoefficients:
        if self.config.prediction_type not in ("epsilon", "sample") or t_prev >= len(self._cache().alpha_bars):
            raise LeaveToOriginal(f"no step from {t} to {t_prev} with prediction_type {self.config.prediction_type!r}")
        alpha_bar_t, alpha_bar_prev = self._alpha_bar(t), self._alpha_bar(t_prev)
        try:
            beta, variance = self._variances(t, t_prev)
            # The original keeps the smaller variance from 0, to take its logarithm. A learned one is in the noise.
            std_dev = 1.0 if learned else math.sqrt(max(variance, 1e-20))
            return ddpm_posterior_coefficients(
                alpha_bar_t,
                alpha_bar_prev,
                self._prediction(alpha_bar_t),
                std_dev_added=std_dev if t > 0 else 0.0,
                clip_sample_range=self._clip_range(),
                beta=beta,
            )
        except (TypeError, ValueError, ArithmeticError) as error:
            raise LeaveToOriginal(str(error)) from None

    def _variances(self, t: int, t_prev: int) -> tuple[float, float]:
        """Return beta of the step from ``t`` to ``t_prev``, and the posterior's variance."""
        alpha_bar_t, alpha_bar_prev = self._alpha_bar(t), self._alpha_bar(t_prev)
        beta = float(self.betas[t]) if t_prev == t - 1 else 1 - alpha_bar_t / alpha_bar_prev
        return beta, (1 - alpha_bar_prev) / (1 - alpha_bar_t) * beta

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        prev_timestep: int | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take the original's ``step`` in one pass: the mean of q(x_prev | x_t, x0) (equation 7 of
        DDPM, arXiv 2006.11239) and noise. A learned standard deviation is first multiplied with the
        noise.

        Raises:
            The original's errors.
        """
        if not _is_dynamo_compiling():
            try:
                found = self._checked_step(model_output, timestep, sample, prev_timestep, generator)
                return step_output(UnCLIPSchedulerOutput, found) if return_dict else found
            except LeaveToOriginal:
                pass
        return UnCLIPScheduler.step(self, model_output, timestep, sample, prev_timestep, generator, return_dict)

    def _checked_step(self, m: Any, timestep: Any, x: Any, prev_timestep: Any, generator: Any) -> tuple[Tensor, Tensor]:
        variance_type, predicted = self.variance_type, None
        if variance_type != self.config.variance_type:
            raise LeaveToOriginal(f"variance_type must be that of the config, got {variance_type!r:.80}")
        if variance_type == "learned_range" and isinstance(m, Tensor) and isinstance(x, Tensor) and x.ndim > 1:
            m, predicted = m[:, : x.shape[1]], m[:, x.shape[1] :]
            check_tensors(x, predicted)
        elif variance_type != "fixed_small_log":
            raise LeaveToOriginal(f"variance_type must be one of the original's, got {variance_type!r:.80}")
        check_tensors(x, m)
        t, t_prev = (self._number(value) for value in (timestep, timestep if prev_timestep is None else prev_timestep))
        t_prev = t - 1 if prev_timestep is None else max(t_prev, -1)
        rows = self._rows(self._posterior_row, t_prev, predicted is not None)
        return self._fused(rows, m, t, x, self._noise(m, predicted, t, t_prev, x, generator) if t > 0 else None)

    @staticmethod
    def _number(timestep: Any) -> int:
        t = single_timestep(timestep)
        return t if isinstance(t, int) else int(t.item())  # whether noise is drawn depends on it

    def _noise(
        self, m: Tensor, predicted: Tensor | None, t: int, t_prev: int, x: Tensor, generator: Any
    ) -> NoiseArguments:
        draw = noise_like_the_originals(m, x, generator, None)
        if predicted is None:
            return draw

        try:
            largest, smallest = map(math.log, self._variances(t, t_prev))
        except (IndexError, ValueError, ArithmeticError) as error:
            raise LeaveToOriginal(str(error)) from None

        def scaled() -> dict[str, Any]:
            noise, share = draw()["noise"], (predicted + 1) / 2
            std_dev = (0.5 * (share * largest + (1 - share) * smallest)).exp()
            return {"noise": (std_dev * noise).to(noise.dtype)}

        return scaled
