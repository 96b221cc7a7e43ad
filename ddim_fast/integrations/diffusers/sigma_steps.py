"""What the schedulers share that look a step up by its index, in a list of ``sigmas``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ...kernels.cpu_step import plain_step
from ...kernels.dispatch import ddim_step, ddim_step_from_table
from ...kernels.torch_internals import shares_storage
from ..arguments import LeaveToOriginal
from ..host_copy import HostCopy
from ..original_results import HALF_PRECISION, kinds_of_results, step_of_kinds
from .arguments import check_kernel_tensors
from .output import step_output
from .sigma_rows import SigmaRows
from .solver_file import SolverFile
from .takes_files import given_to, refuse_files

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_TIMESTEPS = (torch.float32, torch.float64, *HALF_PRECISION)


def set_timesteps_on_host(original: type, *moved: str) -> Callable[..., None]:
    """Return the ``set_timesteps`` of a class, which keeps the values of what it moves to a device.

    No step then waits for the device to know them. They are computed on the CPU, with the same
    results.

    Args:
        moved: the attributes that the original moves to ``device``.
    """
    of_original = original.set_timesteps  # type: ignore[attr-defined] # each of diffusers' has one
    signature = inspect.signature(of_original)

    @functools.wraps(of_original)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        given = given_to(signature, self, *args, **kwargs)
        if given is None:  # the original raises its own error
            return of_original(self, *args, **kwargs)
        solver, device = self._file_asked_for(given), given.get("device")
        if solver is not None:
            return self._visit(solver, device, moved)
        if device is None or torch.device(device).type == "cpu":
            of_original(self, *args, **kwargs)
            self._solver = None
            return None
        bound = signature.bind(self, *args, **kwargs)
        bound.arguments["device"] = "cpu"
        of_original(*bound.args, **bound.kwargs)
        copies = {}
        for name in moved:
            on_host = getattr(self, name)
            on_device = on_host.to(device)
            setattr(self, name, on_device)
            copies[name] = HostCopy.of(on_device, on_host.tolist())
        self._host_copies = copies
        self._solver = None
        return None

    return set_timesteps


def originals_exploding_x0(k: Tensor, x: Tensor, m: Tensor, prediction_type: str) -> Tensor:
    """Run the operations of the originals' prediction of x0 from x = x0 + sigma eps."""
    if prediction_type == "epsilon":
        return x - k * m
    return m * k + x / k if prediction_type == "v_prediction" else m


class SigmaSteps:
    """A scheduler with a list of ``sigmas``; mixed in before the original class."""

    config: Any
    sigmas: Tensor
    timesteps: Tensor
    begin_index: int | None
    _step_index: int | None
    is_scale_input_called: bool = True
    """The originals that scale the model's input have their own, and warn if it is False."""

    _output_kind: type
    _returns_x0 = False
    _keeps_sample_dtype = False
    """Whether x_prev has the dtype of the sample, rather than of the model's output."""
    _timesteps_are_floats = True
    """Whether the original raises an error with an integer as the timestep."""
    _row_fields: tuple[str, ...] = ()
    """The fields of the config that rows depend on."""
    _row_attributes: tuple[str, ...] = ("sigmas",)
    """The attributes that rows depend on."""
    _rows_kind: type = SigmaRows
    _row_cache: Any = None
    """The rows, of that kind."""
    _solver: SolverFile | None = None
    """The file whose steps are taken; None: those of ``sigmas``."""
    _host_copies: dict[str, HostCopy] = {}  # noqa: RUF012 (replaced, never written to)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is computed from this scheduler: a copy computes its own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_row_cache", "_host_copies")}

    # --- What a class of its own says ---------------------------------------------------------------------------------

    def _file_asked_for(self, given: Mapping[str, Any]) -> SolverFile | None:
        """Return the file that ``set_timesteps`` was given, or that the config holds; None for none.

        Raises:
            ValueError: it does not fit, or this scheduler takes none.
        """
        refuse_files(self, given)
        return None

    def _step_of_file(self, solver: SolverFile, m: Any, timestep: Any, x: Any) -> tuple[Tensor, ...]:
        """Take the step of a file; return what the original's step does.

        Raises:
            ValueError: it has no fused form, or is not the next one.
        """
        raise NotImplementedError  # a scheduler that takes files has them

    def _row_between(self, sigma: float, sigma_next: float) -> StepCoefficients:
        """Return the row of the step from one of ``sigmas`` to the next."""
        raise NotImplementedError

    def _noise_dtype(self, model_output: Tensor) -> torch.dtype | None:
        """Return the dtype in which the original draws noise in this step, or None for no noise."""
        return None

    _originals_results: Callable[..., tuple[Tensor, ...]]
    """Runs the operations of the original's ``step``; returns x_prev, and x0 if it does."""

    def _options_of_results(self) -> dict[str, Any]:
        """Return what else ``_originals_results`` takes."""
        return {"prediction_type": getattr(self.config, "prediction_type", "")}

    def _key(self, rows: SigmaRows, timestep: Any) -> int | None:
        """Return the index of the step in ``sigmas``: any, or None, where the step has none."""
        return self._step_index

    # --- Where a run is -----------------------------------------------------------------------------------------------

    def _values_on_host(self, name: str) -> list[float]:
        """Return the values of ``sigmas`` or ``timesteps``: waits only for what others have set."""
        tensor, copy = getattr(self, name), self._host_copies.get(name)
        return copy.values if copy is not None and copy.is_of(tensor) else tensor.tolist()

    def _init_step_index(self, timestep: Any) -> None:
        """Find the index of the first step as the original does.

        A timestep that is a view into ``timesteps``, as in a loop over them, is found without
        waiting for its device.
        """
        index = None if self.begin_index is not None or _is_dynamo_compiling() else self._index_of_view(timestep)
        if index is None:
            super()._init_step_index(timestep)  # type: ignore[misc]  # the original
        else:
            self._step_index = index

    def _index_of_view(self, timestep: Any) -> int | None:
        value = self._value_of_view(timestep)
        if value is None:
            return None
        # The original takes the second of equal timesteps.
        equal = [i for i, other in enumerate(self._host_copies["timesteps"].values) if other == value]
        return equal[min(len(equal), 2) - 1] if equal else None

    def _value_of_view(self, timestep: Any) -> float | None:
        """Return the value of a view into ``timesteps`` without waiting for its device."""
        timesteps = self.timesteps
        if not isinstance(timestep, Tensor) or timestep.ndim != 0 or timesteps.ndim != 1:
            return None
        if timestep.dtype != timesteps.dtype or timestep.device != timesteps.device:
            return None
        copy = self._host_copies.get("timesteps")
        if copy is None or not copy.is_of(timesteps) or not shares_storage(timestep, timesteps):
            return None
        place, left = divmod(int(timestep.storage_offset() - timesteps.storage_offset()), max(timesteps.stride(0), 1))
        return None if left or not 0 <= place < len(copy.values) else copy.values[place]

    # --- The step -----------------------------------------------------------------------------------------------------

    def _step(self, model_output: Any, timestep: Any, sample: Any, generator: Any, return_dict: Any) -> Any:
        """Take the original's step in one pass, or that of a file; or return None, if it must take it
        itself."""
        if self._solver is not None:
            of_file = self._step_of_file(self._solver, model_output, timestep, sample)
            return step_output(self._output_kind, of_file) if return_dict else of_file
        if _is_dynamo_compiling() or not self.is_scale_input_called:
            return None
        is_float = type(timestep) is float or (isinstance(timestep, Tensor) and timestep.dtype in _TIMESTEPS)
        if self._timesteps_are_floats and not is_float:
            return None
        found, rows = None, self._row_cache
        try:
            if rows is not None and self._step_index is not None:
                found = self._short_step(rows, self._key(rows, timestep), model_output, sample)
            if found is None:
                found = self._checked_step(model_output, timestep, sample, generator)
        except LeaveToOriginal:
            return None
        self._step_index += 1  # type: ignore[operator] # a number since the first step
        return step_output(self._output_kind, found) if return_dict else found

    def _short_step(
        self, rows: SigmaRows, key: int | None, model_output: Any, sample: Any
    ) -> tuple[Tensor, ...] | None:
        """Take a step that needs nothing but its row, if that row is known."""
        writes_x0 = rows.writes_x0
        # x0 is float32, and has the dtype of x_t in a step.
        if writes_x0 and isinstance(sample, Tensor) and sample.dtype in HALF_PRECISION:
            sample = sample.to(torch.float32)
        found = plain_step(sample, model_output, rows.plain, key, rows.values, rows.writes, writes_x0)
        if found is None:
            return None
        x_prev, x0 = found
        if not self._keeps_sample_dtype and x_prev.dtype is not model_output.dtype:
            x_prev = x_prev.to(model_output.dtype)
        if not self._returns_x0:
            return (x_prev,)
        return x_prev, model_output if x0 is None else x0

    def _rows_of_checked(self, model_output: Any, timestep: Any, sample: Any) -> Any:
        """Check the tensors of a step, find out where the run is, and return valid rows."""
        check_kernel_tensors(sample, model_output)
        if self._step_index is None:
            self._init_step_index(timestep)
        rows = self._row_cache
        if rows is None or not rows.is_valid():
            rows = self._row_cache = self._rows_kind(self)
        return rows

    def _checked_step(self, model_output: Any, timestep: Any, sample: Any, generator: Any) -> tuple[Tensor, ...]:
        rows = self._rows_of_checked(model_output, timestep, sample)
        key = self._key(rows, timestep)
        row, noise_dtype = rows.row(key), self._noise_dtype(model_output)
        if noise_dtype is None and rows.allows_short_path:
            rows.fill_plain(key)  # type: ignore[arg-type] # there is such a row
            found = self._short_step(rows, key, model_output, sample)
            if found is not None:
                return found
        m = model_output
        noise = (
            None
            if noise_dtype is None
            else randn_tensor(m.shape, generator=generator, device=m.device, dtype=noise_dtype)
        )
        return self._whole_step(rows, key, row, model_output, sample, noise)

    def _whole_step(
        self,
        rows: SigmaRows,
        key: int | None,
        row: StepCoefficients,
        model_output: Tensor,
        sample: Tensor,
        noise: Tensor | None,
        **also: Tensor,
    ) -> tuple[Tensor, ...]:
        """Take a step of checked tensors by ``ddim_step``, with the original's dtypes and layouts.

        Args:
            also: other tensors that ``ddim_step`` takes.
        """
        options = self._options_of_results()
        kinds = kinds_of_results(self._originals_results, sample, model_output, noise, **options)
        take: Any = ddim_step
        step: Any = row
        if sample.device.type == "cuda":  # a row of its own would be copied there in each step
            table, indices = rows.table(sample.device)
            take, step = functools.partial(ddim_step_from_table, index=indices[key]), table
        take = functools.partial(take, **also) if also else take
        x_prev, x0 = step_of_kinds(kinds, sample, model_output, step, noise=noise, writes_x0=rows.writes_x0, take=take)
        if not self._returns_x0:
            return (x_prev,)
        return x_prev, model_output if x0 is None else x0
