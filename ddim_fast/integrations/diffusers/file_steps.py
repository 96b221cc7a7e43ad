"""Steps of a file in the schedulers that look a step up by its index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...utils.checks import refuse
from ...utils.untraced import untraced
from ..arguments import LeaveToOriginal, check_no_gradients
from ..host_copy import HostCopy
from ..original_results import ResultKind, converted, kinds_of_results, readable
from .arguments import check_kernel_tensors
from .sigma_steps import SigmaSteps
from .solver_file import SolverFile, is_file, solver_of
from .takes_files import TakesFiles

_NEAR = 1e-6
"""How far ``sigmas`` may be from those that pipelines pass of themselves, in float32."""


class FileSteps(TakesFiles, SigmaSteps):
    """A scheduler with a list of ``sigmas`` that takes files; mixed in before the original class.

    ``sigmas`` are the noise levels that a file visits, and ``timesteps`` what the model is told:
    ``scale_model_input``, ``add_noise`` and ``scale_noise`` are the original's.
    """

    num_inference_steps: int | None
    alphas_cumprod: Tensor
    _begin_index: int | None

    def _file_asked_for(self, given: Mapping[str, Any]) -> SolverFile | None:
        count, timesteps, sigmas = (given.get(name) for name in ("num_inference_steps", "timesteps", "sigmas"))
        files = [value for value in (timesteps, sigmas) if is_file(value)]
        if files:
            solver = self._solver_file(*solver_of(files[0]))
            if len(files) > 1 or (timesteps is not None and sigmas is not None) or count not in (None, len(solver)):
                refuse(
                    f"a file of timesteps must be given alone, or with its number of steps, {len(solver)}",
                    {"num_inference_steps": count, "timesteps": timesteps, "sigmas": sigmas},
                    "leave the others out",
                )
            return solver
        if timesteps is not None or not (sigmas is None or _is_default(sigmas)):
            return None
        return self._kept_solver(count if sigmas is None else len(sigmas))

    def _visit(self, solver: SolverFile, device: Any, moved: Sequence[str]) -> None:
        copies = {}
        for name, values in {"sigmas": solver.sigmas, "timesteps": solver.told}.items():
            dtype = torch.int64 if isinstance(values[0], int) else torch.float32
            there = torch.tensor(values, dtype=dtype, device="cpu")
            there = there.to(device) if name in moved and device is not None else there
            setattr(self, name, there)
            if there.device.type != "cpu":
                copies[name] = HostCopy.of(there, values)
        self._host_copies = copies
        self.num_inference_steps = len(solver)
        self._step_index = self._begin_index = None
        self._solver = solver

    def _leave_to_original(self) -> None:
        if self._solver is not None:
            raise ValueError(
                "a step of a file must be given no options that the step of this scheduler is left to the original for, such as "
                "s_churn: leave them out, or call set_timesteps with a number"
            )

    def index_for_timestep(self, timestep: Any, *args: Any) -> Any:
        """Return the index of a step as the original does; with a file, of the first one at this timestep."""
        if self._solver is None:
            return super().index_for_timestep(timestep, *args)  # type: ignore[misc]  # the original
        value = self._value_of_view(timestep)
        return self._solver.index_of(float(timestep) if value is None else value)

    def _init_step_index(self, timestep: Any) -> None:
        if self._solver is None:
            return super()._init_step_index(timestep)
        index = self.index_for_timestep(timestep) if self.begin_index is None else self.begin_index
        self._solver.begin_at(index)
        self._step_index = index
        return None

    @untraced
    def _step_of_file(self, solver: SolverFile, m: Any, timestep: Any, x: Any) -> tuple[Tensor, ...]:
        try:
            check_kernel_tensors(x, m)
            if solver.sampler.order > 1:
                check_no_gradients(x, m)
        except LeaveToOriginal as reason:
            raise ValueError(f"{reason}. (A file of timesteps works in fused steps only)") from None
        if self._step_index is None:
            self._init_step_index(timestep)
        index: Any = self._step_index
        number = solver.number_at_index(index)
        kinds = self._kinds_of_file(x, m)
        dtype = torch.promote_types(x.dtype, m.dtype)
        for kind in kinds:
            dtype = torch.promote_types(dtype, kind.dtype)
        x0 = kinds[1].empty(x, dtype) if len(kinds) > 1 else None
        tensors: dict[str, Any] = {"out": kinds[0].empty(x, dtype), "x0_out": x0, **solver.histories(number, x, dtype)}
        where = solver.on_device(number, x.device)
        x_prev = solver.rows(0.0, False).step(converted(x, dtype), readable(m, dtype), where, **tensors)
        solver.took()
        self._step_index = index + 1
        x_prev = converted(x_prev, kinds[0].dtype)
        return (x_prev,) if x0 is None else (x_prev, converted(x0, kinds[1].dtype))

    def _kinds_of_file(self, x: Tensor, m: Tensor) -> tuple[ResultKind, ...]:
        """Return the kinds of what the original's step returns: x_prev, and x0 if it does."""
        found = kinds_of_results(self._originals_results, x, m, None, **self._options_of_results())
        return found if self._returns_x0 else found[:1]


def _is_default(sigmas: Any) -> bool:
    """Return whether these are what pipelines for flow matching pass where nobody asked for sigmas:
    1 to 1 / S in S even steps."""
    try:
        given = [float(sigma) for sigma in sigmas]
    except (TypeError, ValueError, RuntimeError):  # the original says what is wrong with them
        return False
    count = len(given)
    return count > 0 and all(abs(sigma - (1 - i / count)) <= _NEAR for i, sigma in enumerate(given))
