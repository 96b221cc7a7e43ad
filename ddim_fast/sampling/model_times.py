"""What a model is told in each step: the timesteps, as the tensors that it is called with."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ..kernels.torch_internals import is_wrapped, modes_active, write_count
from ..plans.plan import SamplingPlan
from ..utils.transfer import to_device

_MOST = 32
_kept: dict[Hashable, Sequence[Tensor]] = {}


def model_times(plan: SamplingPlan, device: torch.device, batch_size: int) -> Tensor:
    """Return ``(S, B)``: what the model is told in each step, for each sample."""
    times = torch.tensor(plan.model_times, dtype=plan.schedule.time_dtype, device="cpu")
    return to_device(times, device).unsqueeze(1).expand(-1, batch_size)


class LentTimes:
    """The rows of ``model_times``, the same tensors from run to run: to make them takes as long as
    several small steps.

    One run has them at a time. Those that a model has written to are not lent again.
    """

    def __init__(self, plan: SamplingPlan, like: Tensor) -> None:
        times = plan, like.device, like.shape[0]
        self._key = plan.model_times, plan.schedule.time_dtype, *times[1:]
        # What torch.compile or a mode such as that of fake tensors sees made lasts no longer than it.
        self._last = not (torch.compiler.is_dynamo_compiling() or modes_active())
        if not self._last:
            self.rows: Sequence[Tensor] = model_times(*times).unbind()
            return
        rows = _kept.pop(self._key, None)
        if rows is None or write_count(rows[0]) != 0:
            with torch.inference_mode(False):
                rows = model_times(*times).unbind()
            self._last = not is_wrapped(rows[0])
        self.rows = rows

    def give_back(self) -> None:
        if self._last:
            if len(_kept) >= _MOST:
                _kept.clear()
            _kept[self._key] = self.rows
