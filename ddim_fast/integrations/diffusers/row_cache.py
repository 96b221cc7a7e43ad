"""Rows of a scheduler, and everything that they were computed from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...kernels.contract import StepCoefficients
from ..arguments import LeaveToOriginal
from ..original_results import HALF_PRECISION
from ..rows_by_timestep import RowsByTimestep
from .watched import Watched


class RowCache(Watched):
    """Rows of a scheduler. They are valid as long as ``is_valid()``.

    Args:
        scheduler: one of diffusers'.
        config_fields: the fields of its config that the rows depend on.
        clean_level: the attribute that holds alpha_bar of clean data.
    """

    def __init__(self, scheduler: Any, config_fields: Sequence[str], clean_level: str):
        explicit_pairs = scheduler._pairs_are_explicit
        levels, outside = scheduler.alphas_cumprod, getattr(scheduler, clean_level)
        if not isinstance(levels, Tensor):
            raise LeaveToOriginal(f"alphas_cumprod must be a tensor, got a {type(levels).__name__}")
        # In half precision 1 - alpha_bar has lost its digits: the results are then the original's.
        if levels.dtype in HALF_PRECISION:
            raise LeaveToOriginal(f"alphas_cumprod must not be in half precision, got {levels.dtype}")
        read = {"alphas_cumprod": levels, clean_level: outside}
        read |= {name: getattr(scheduler, name) for name in scheduler._row_attributes}
        if explicit_pairs:
            read["timesteps"] = scheduler.timesteps
        super().__init__(scheduler, [*read, "num_inference_steps"], list(read.values()), config_fields)
        self.alpha_bars: list[float] = levels.tolist()
        self.alpha_bar_outside = float(outside)
        self.timesteps: list[int] = scheduler.timesteps.tolist() if explicit_pairs else []
        self.visited = tuple(sorted(self.timesteps, reverse=True))
        attributes = [id(getattr(scheduler, name)) for name in scheduler._row_attributes]
        self.content = (
            self.alpha_bars, self.alpha_bar_outside, self.timesteps, self.fields, scheduler.num_inference_steps,
            attributes, [count for _, count in self.writes] if attributes else [],
        )  # fmt: skip
        """What rows are computed from: where it is the same, so are they."""
        self.rows: dict[Any, RowsByTimestep] = {}
        self.plain: dict[int, StepCoefficients] = {}
        """By timestep: rows of steps that add no noise and need nothing but their row."""
        self.plain_at: dict[Any, dict[int, StepCoefficients]] = {}
        """The same, by what else a row depends on."""
