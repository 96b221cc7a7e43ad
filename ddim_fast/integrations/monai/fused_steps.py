"""What the fast schedulers of MONAI share: checks, values on the host, and the fused step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ...kernels.cpu_step import plain_step
from ...plans.coefficients import DISCRETE_PREDICTIONS
from ...utils.checks import refuse
from ..arguments import LeaveToOriginal, check_tensors, single_timestep
from ..host_copy import HostCopy
from ..original_results import (
    HALF_PRECISION,
    kinds_of_results,
    step_of_kind,
    step_with_x0,
)


class FusedSteps:
    """A scheduler whose steps are fused; mixed in before the original class."""

    explicit_pairs = False
    _host_copies: dict[str, HostCopy] = {}  # noqa: RUF012 (replaced, never written to)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is computed from this scheduler: a copy computes its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_host_copies"}

    def _values(self, name: str) -> Any:
        """Return the values of a tensor of this scheduler: waits only for what others have set."""
        tensor, copy = getattr(self, name), self._host_copies.get(name)
        if copy is None or not copy.is_of(tensor):
            if not isinstance(tensor, Tensor) or tensor.dtype in HALF_PRECISION or tensor.device.type == "meta":
                raise LeaveToOriginal(f"{name} must be a tensor with values, not in half precision, got {tensor!r:.80}")
            copy = HostCopy.of(tensor)
            self._host_copies = {**self._host_copies, name: copy}
        return copy.values

    def _checked_timestep(self, model_output: Any, timestep: Any, sample: Any) -> int:
        check_plain(model_output, sample)
        t = single_timestep(timestep)
        t = t if isinstance(t, int) else int(t.item())  # which step follows depends on it
        if not 0 <= t < (count := len(self._values("alphas_cumprod"))):
            raise LeaveToOriginal(f"timestep must be 0 to {count - 1}, got {t}")
        return t

    def _next_of(self, t: int) -> int:
        """Return the timestep that follows ``t`` in ``timesteps``; -1 is clean data."""
        visited = self._values("timesteps")
        if any(later >= earlier for earlier, later in pairwise(visited)):
            raise ValueError(
                f"with explicit_pairs, timesteps must be strictly decreasing, got {visited!r:.80}: choose fewer steps"
            )
        if t not in visited:
            raise ValueError(f"with explicit_pairs, timestep must be one of scheduler.timesteps, got {t}")
        return (*visited, -1)[visited.index(t) + 1]

    def _prediction_type(self) -> str:
        kind: Any = cast(Any, self).prediction_type
        for known in DISCRETE_PREDICTIONS:
            if kind == known:  # the originals' names are enumerations, with hashes of their own
                return known
        raise LeaveToOriginal(f"prediction_type must be one of {', '.join(DISCRETE_PREDICTIONS)}, got {kind!r:.80}")

    def _clip(self) -> float | None:
        scheduler = cast(Any, self)
        if not scheduler.clip_sample:
            return None
        low, high = scheduler.clip_sample_values
        if not 0 <= high == -low:
            raise LeaveToOriginal(f"clip_sample_min must be -clip_sample_max, got {low!r:.40} and {high!r:.40}")
        return float(high)

    def _no_row(self, reason: LeaveToOriginal) -> None:
        """Raise ValueError, with the reason, where the original does not know ``explicit_pairs``."""
        if self.explicit_pairs:
            raise ValueError(f"{reason}. (explicit_pairs works in fused steps only; explicit_pairs=False turns it off)")


def check_plain(model_output: Any, sample: Any) -> None:
    check_tensors(sample, model_output)
    if type(sample) is not Tensor or type(model_output) is not Tensor or sample.device.type == "meta":
        raise LeaveToOriginal(
            "sample and model_output must be plain tensors with values, got "
            f"{type(sample).__name__} and {type(model_output).__name__} on {sample.device}: of a MetaTensor pass as_tensor()"
        )


def take(
    row: StepCoefficients, model_output: Tensor, sample: Tensor, noise: Tensor | None, operations: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """Take a step; return (x_prev, x0) of the kinds that the original's ``operations`` return."""
    returns_output = options.get("prediction_type") == "sample" and not row.clipped
    if noise is None and not returns_output:
        found = plain_step(sample, model_output, {0: row}, 0, (), ())
        if found is not None:
            return cast(tuple[Tensor, Tensor], found)
    x0_kind, kind = kinds_of_results(operations, sample, model_output, noise, **options)
    if returns_output:  # the original's x0 is that tensor itself
        return step_of_kind(kind, sample, model_output, row, noise=noise), model_output
    return step_with_x0(x0_kind, kind, sample, model_output, row, noise=noise)


def noise_like(model_output: Tensor, generator: torch.Generator | None) -> Tensor:
    m = model_output
    return torch.randn(m.shape, dtype=m.dtype, generator=generator, device=m.device)


def checked_flag(explicit_pairs: object) -> bool:
    if not isinstance(explicit_pairs, bool):
        refuse("explicit_pairs must be True or False", explicit_pairs, kind=TypeError)
    return explicit_pairs
