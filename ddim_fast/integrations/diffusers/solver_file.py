"""The steps of a file that ``ddim-fast search`` wrote, in the loop of somebody else's pipeline.

A loop knows one list of timesteps, which it gives to the model. So that list is the file's model
timesteps; the noise levels visited, the weights of earlier predictions and these predictions stay
here. The steps are those of ``DDIMSampler`` with the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...plans.files import SUFFIX, TimestepList, read_timesteps
from ...plans.levels import level_of
from ...sampler import DDIMSampler
from ...utils.checks import refuse
from ..rows_by_timestep import RowsByTimestep
from .solver_path import SolverPath


def is_file(timesteps: object) -> bool:
    """Return whether timesteps are a file's, rather than a list of numbers."""
    return isinstance(timesteps, (str, os.PathLike, TimestepList))


def solver_of(given: Any) -> tuple[TimestepList, str]:
    """Return the list in a file, or in the content of one, and what to call it in errors.

    Raises:
        FileNotFoundError, TypeError, ValueError: there is no such file, or it holds no such list.
    """
    if isinstance(given, TimestepList):
        return given, "the list of timesteps"
    if isinstance(given, Mapping):
        return TimestepList.of_content(given, "solver"), "solver"
    if isinstance(given, (str, os.PathLike)):
        if not os.fspath(given).endswith(SUFFIX):
            refuse(f"a file of timesteps must end in {SUFFIX}", os.fspath(given), "make one with ddim-fast search")
        return read_timesteps(given), os.fspath(given)
    refuse("solver must be a file of ddim-fast search, or its content", given, kind=TypeError)


class SolverFile:
    """A file's steps for a scheduler, and where its loop is.

    Args:
        found: the file's list.
        name: what to call it in errors.
        path: the path that the scheduler samples along.

    Raises:
        ValueError: the file is for another noise schedule or prediction type, or needs what the
            config does not have.
    """

    def __init__(self, found: TimestepList, name: str, path: SolverPath):
        found.for_schedule(path.schedule, name)  # with its name in the errors
        if found.prediction_type not in (None, path.prediction_type):
            raise ValueError(
                f"{name} holds coefficients for a model with prediction_type {found.prediction_type!r}, got a scheduler whose config "
                f"says {path.said!r}: make the scheduler with the model's prediction_type, or search again with this model. (The "
                f"file's timesteps alone, {list(found.timesteps)}, are for any model: {path.alone})"
            )
        self.path = path
        self.sampler = DDIMSampler(
            path.schedule, timesteps=found, prediction_type=path.prediction_type, **path.sampler_options
        )
        self._steps = self.sampler.plan().steps  # its errors now
        self.visited = [step.t for step in self._steps]
        self.told: list[Any] = [path.timestep_of(step.model_time) for step in self._steps]
        """What the loop is given."""
        self._begun = 0
        self._next: int | None = None
        self._rows: dict[Any, RowsByTimestep] = {}
        self._histories: list[Tensor] = []
        self._numbers: dict[torch.device, Tensor] = {}

    @property
    def sigmas(self) -> list[float]:
        """The noise levels visited, and the last one that steps lead to, as diffusers writes them."""
        levels = [*(step.level_t for step in self._steps), self._steps[-1].level_prev]
        return [self.path.sigma_of(level_of(level)) for level in levels]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is computed from the rest: a copy computes its own."""
        return {**self.__dict__, "_rows": {}, "_numbers": {}}

    def __len__(self) -> int:
        return len(self.told)

    def number_at(self, t: int | Tensor) -> int:
        """Return the number of the step at ``t`` in the run that it continues or begins.

        A run may begin at any step, as img2img does. Where steps read the ones before, they must
        come in order. A tensor on a GPU is not waited for within a run.

        Raises:
            ValueError: there is no such step, or it is not the next one.
        """
        if self._next is None or (isinstance(t, int) and self.told[self._next] != t):
            self._begin(int(t))
        assert self._next is not None
        return self._next - self._begun

    def index_of(self, t: float) -> int:
        """Return the number of the first step of the file that the loop takes at ``t``.

        Raises:
            ValueError: there is no such step.
        """
        if t not in self.told:
            raise ValueError(
                f"a timestep must be one of scheduler.timesteps, {self.told}, got {t}: set_timesteps sets them"
            )
        return self.told.index(t)

    def begin_at(self, index: int) -> None:
        """Begin a run at a step of the file.

        Raises:
            ValueError: there is no such step.
        """
        if not 0 <= index < len(self.told):
            refuse(
                f"a run of this file has the steps 0 to {len(self.told) - 1}", index, "call set_timesteps before a run"
            )
        self._begun = self._next = index
        self._histories = []

    def number_at_index(self, index: int) -> int:
        """Return the number of the step of this index within the run that ``begin_at`` began.

        Raises:
            ValueError: it is not the next one.
        """
        if index != self._next:
            wanted = "no more" if self._next is None else f"{self._next} next"
            raise ValueError(
                f"steps of a file must come in order, {wanted}, got step_index = {index}: call set_timesteps to begin another run"
            )
        return index - self._begun

    def _begin(self, t: int) -> None:
        index = self.index_of(t)
        if self._next is not None and t != self.told[0] and self.sampler.order > 1:
            raise ValueError(
                f"a step of this solver reads the steps before it, so timesteps must come in order, {self.told[self._next]} next, "
                f"got {t}: call set_timesteps to begin another run"
            )
        self._begun = self._next = index

    def rows(self, eta: float, use_clipped_model_output: bool) -> RowsByTimestep:
        """Return the rows of this run, by the number of the step.

        Raises:
            ValueError: eta is more than a step has room for, or these steps are deterministic.
        """
        key = self._begun, eta, use_clipped_model_output
        if key not in self._rows:
            sampler = self.sampler.replace(eta=eta, use_clipped_model_output=use_clipped_model_output)
            steps = sampler.plan().last_steps(len(self.told) - self._begun).steps
            self._rows[key] = RowsByTimestep(len(steps), lambda number: self.path.row_of(steps[number]))
        return self._rows[key]

    def on_device(self, number: int, device: torch.device) -> int | Tensor:
        """Return the number of a step, for a GPU in its memory, where rows are looked up."""
        if device.type == "cpu":
            return number
        if device not in self._numbers:
            self._numbers[device] = torch.arange(len(self), dtype=torch.int64, device=device)
        return self._numbers[device][number]

    def histories(self, number: int, like: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the memory of earlier predictions, as arguments of ``ddim_step``, which replaces
        them by its own."""
        count = self.sampler.order - 1
        if count and (number == 0 or len(self._histories) != count):
            self._histories = [torch.zeros_like(like, dtype=dtype) for _ in range(count)]
        return dict(zip(("history", "history_2"), self._histories, strict=False))

    def took(self) -> None:
        """Go on to the next step: after the last one, another run begins."""
        assert self._next is not None
        self._next = self._next + 1 if self._next + 1 < len(self.told) else None
        if self._next is None:
            self._histories = []

    def visited_at(self, timesteps: Tensor) -> Tensor:
        """Return the timesteps whose noise levels the steps at these start from; others stay."""
        visited = dict(zip(reversed(self.told), reversed(self.visited), strict=True))  # the first of equal ones
        found = timesteps.clone()
        for told, level in visited.items():
            found[timesteps == told] = level
        return found
