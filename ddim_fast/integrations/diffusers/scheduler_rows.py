"""The noise levels and pairs of timesteps of a scheduler, and the rows computed from them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ...kernels.contract import StepCoefficients
from ...plans.coefficients import (
    DISCRETE_PREDICTIONS,
    PREDICTION_TYPES,
    Prediction,
    ddim_coefficients,
    noising_coefficients,
    variance_with_room,
    velocity_coefficients,
)
from ..arguments import LeaveToOriginal
from ..rows_by_timestep import RowsByTimestep, cached_rows
from .row_cache import RowCache


class SchedulerRows:
    """The rows of a scheduler, recomputed when what they depend on has changed.

    After construction, pipelines still write to a scheduler: to its config, ``alphas_cumprod`` and
    ``timesteps``.
    """

    config: Any
    num_inference_steps: int | None
    timesteps: Tensor
    alphas_cumprod: Tensor
    custom_timesteps: bool = False
    """Whether ``timesteps`` is a list that ``set_timesteps`` was given, as in diffusers' others."""

    _row_fields: tuple[str, ...] = (
        "num_train_timesteps",
        "prediction_type",
        "clip_sample",
        "clip_sample_range",
        "explicit_pairs",
    )
    """The fields of the config that rows depend on."""
    _row_attributes: tuple[str, ...] = ()
    """The attributes that rows depend on, beside the noise levels."""
    _clean_level: str
    """The attribute that holds alpha_bar of clean data: of a timestep below 0."""
    _clips = True
    """Whether the original's step clips or thresholds x0 where its config says so."""
    _row_cache: RowCache | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the rows, which are computed from this scheduler: a copy computes its own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_row_cache", "_generator_seeds")}

    # --- Timesteps and noise levels -----------------------------------------------------------------------------------

    def _pair(self, t: int) -> tuple[int, int]:
        """Return the timesteps (from, to) of the step at ``t``; one below 0 is clean data."""
        raise NotImplementedError

    def _valid_cache(self) -> RowCache:
        cache = self._row_cache
        if cache is None or not cache.is_valid():
            before, cache = cache, RowCache(self, self._row_fields, self._clean_level)
            if before is not None and before.kind is cache.kind and before.content == cache.content:
                cache.rows, cache.plain, cache.plain_at = before.rows, before.plain, before.plain_at
            self._row_cache = cache
        return cache

    def _cache(self) -> RowCache:
        """Return the cache that ``_valid_cache`` has just checked."""
        assert self._row_cache is not None
        return self._row_cache

    def _alpha_bar(self, t: int) -> float:
        return self._cache().alpha_bars[t] if t >= 0 else self._cache().alpha_bar_outside

    @property
    def _pairs_are_explicit(self) -> bool:
        """Whether a step leads to the next one of ``timesteps``."""
        return self.custom_timesteps or self.config.explicit_pairs

    def _visited(self) -> tuple[int, ...]:
        """Return the timesteps from the noisiest to the cleanest, where pairs are explicit."""
        return self._cache().visited if self._pairs_are_explicit else ()

    def _check_visited(self, t: int) -> None:
        if self._pairs_are_explicit and t not in self._cache().visited:
            raise ValueError(
                "with explicit_pairs, or a list of timesteps, a timestep must be one of scheduler.timesteps, got "
                f"{t}: set_timesteps sets them"
            )

    def _stride(self) -> int:
        assert self.num_inference_steps is not None
        return self.config.num_train_timesteps // self.num_inference_steps

    def _thresholding(self) -> bool:
        return self._clips and bool(getattr(self.config, "thresholding", False))

    def _clip_range(self) -> float | None:
        """Return what x0 is clipped to. (Dynamic thresholding always scales to [-1, 1].)"""
        if self._thresholding():
            return 1.0
        return float(self.config.clip_sample_range) if self._clips and self.config.clip_sample else None

    # --- Rows ---------------------------------------------------------------------------------------------------------

    def _rows(self, row: Callable[..., StepCoefficients], *options: Any) -> RowsByTimestep:
        """Return the rows ``row(*options, t)`` by timestep; ``row`` is a method of this object."""
        cache = self._valid_cache()
        return cached_rows(cache.rows, (row.__name__, options), len(cache.alpha_bars), partial(row, *options))

    def _sampling_row(self, eta: float, use_clipped_model_output: bool, t: int) -> StepCoefficients:
        alpha_bar_t, alpha_bar_prev = map(self._alpha_bar, self._pair(t))
        try:
            variance = variance_with_room(alpha_bar_t, alpha_bar_prev, eta, f"at timestep {t}")
        except ZeroDivisionError:
            raise LeaveToOriginal(f"a step with eta > 0 must not end at alpha_bar = 0, got timestep {t}") from None
        return self._row_between(
            alpha_bar_t, alpha_bar_prev, variance=variance, use_clipped_model_output=use_clipped_model_output
        )

    def _prediction(self, alpha_bar_t: float) -> Prediction:
        """Return what the model's output means; KeyError for what the originals do not know."""
        kind = self.config.prediction_type
        return PREDICTION_TYPES[kind if kind in DISCRETE_PREDICTIONS else ""](alpha_bar_t)

    def _row_between(self, alpha_bar_t: float, alpha_bar_prev: float, **options: Any) -> StepCoefficients:
        try:
            return ddim_coefficients(
                alpha_bar_t,
                alpha_bar_prev,
                self._prediction(alpha_bar_t),
                clip_sample_range=self._clip_range(),
                **options,
            )
        except KeyError:
            known = ", ".join(DISCRETE_PREDICTIONS)
            raise LeaveToOriginal(
                f"prediction_type must be one of {known}, got {self.config.prediction_type!r}"
            ) from None
        except (TypeError, ValueError) as error:
            # A prediction without a row: the original handles it in its own way.
            raise LeaveToOriginal(str(error)) from None

    def _noising_row(self, t: int) -> StepCoefficients:
        return noising_coefficients(self._alpha_bar(t))

    def _velocity_row(self, t: int) -> StepCoefficients:
        return velocity_coefficients(self._alpha_bar(t))
