"""Rows of a scheduler, and everything that they were computed from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ..original_results import HALF_PRECISION
from ..rows_by_timestep import RowsByTimestep
from . import internals
from .arguments import LeaveToOriginal


class RowCache:
    """Rows of a scheduler. They are valid as long as ``is_valid()``.

    Args:
        scheduler: one of diffusers'.
        config_fields: the fields of its config that the rows depend on.
        clean_level: the attribute that holds alpha_bar of clean data.
    """

    def __init__(self, scheduler: Any, config_fields: Sequence[str], clean_level: str):
        config, explicit_pairs = scheduler.config, scheduler._pairs_are_explicit
        levels, outside = scheduler.alphas_cumprod, getattr(scheduler, clean_level)
        if not isinstance(levels, Tensor):
            raise LeaveToOriginal(f"alphas_cumprod must be a tensor, got a {type(levels).__name__}")
        # In half precision 1 - alpha_bar has lost its digits: the results are then the original's.
        if levels.dtype in HALF_PRECISION:
            raise LeaveToOriginal(f"alphas_cumprod must not be in half precision, got {levels.dtype}")
        attributes = ["alphas_cumprod", clean_level, "num_inference_steps", *(["timesteps"] if explicit_pairs else [])]
        config_entry = internals.config_entry(scheduler)
        self._scheduler, self._config = scheduler, config
        self.values = (
            *((vars(scheduler), name, getattr(scheduler, name)) for name in attributes),
            *([] if config_entry is None else [config_entry]),
            *((vars(config), name, getattr(config, name)) for name in config_fields),
        )
        """(dictionary, key, value): each dictionary must still hold that very value."""
        read: list[Any] = [levels, outside, *([scheduler.timesteps] if explicit_pairs else [])]
        written = [t for t in read if isinstance(t, Tensor) and not t.is_inference()]  # those that count their writes
        self.writes = tuple((t, internals.write_count(t)) for t in written) if internals.COUNTS_WRITES else ()
        """(tensor, count): each tensor must have been written that often."""
        self._copies = [] if internals.COUNTS_WRITES else [(t, t.clone()) for t in written]
        self.allows_short_path = config_entry is not None and internals.COUNTS_WRITES
        """Whether ``values`` and ``writes`` are all there is to check, as ``plain_step`` does."""
        self.alpha_bars: list[float] = levels.tolist()
        self.alpha_bar_outside = float(outside)
        self.visited = tuple(sorted(scheduler.timesteps.tolist(), reverse=True)) if explicit_pairs else ()
        self.rows: dict[Any, RowsByTimestep] = {}
        self.plain: dict[int, StepCoefficients] = {}
        """By timestep: rows of steps that add no noise and need nothing but their row."""

    def is_valid(self) -> bool:
        """Return whether everything that the rows were computed from is unchanged."""
        return (
            self._scheduler.config is self._config
            and all(found.get(name) is value for found, name, value in self.values)
            and all(internals.write_count(tensor) == count for tensor, count in self.writes)
            and all(torch.equal(tensor, copy) for tensor, copy in self._copies)
        )
