"""``DPMSolverMultistepScheduler`` and ``EDMDPMSolverMultistepScheduler``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ...kernels.cpu_step import plain_step
from ..arguments import LeaveToOriginal
from ..original_results import ResultKind, coefficient, kinds_of_results
from .multistep_rows import MultistepRows, dpm_solver_row, edm_dpm_solver_row
from .multistep_steps import (
    MultistepSteps,
    check_histories,
    fused,
    originals_forms,
    originals_prediction,
    sigmas_of_order,
)
from .sigma_steps import set_timesteps_on_host
from .solver_path import SolverPath, path_of_edm, path_of_multistep
from .takes_files import with_solver

_FEW_STEPS = 15
"""From this many on, ``lower_order_final`` changes nothing."""


def _originals_results(
    x: Tensor, m: Tensor, noise: Tensor | None, *histories: Tensor, form: str, in_float32: bool
) -> tuple[Tensor, Tensor]:
    """Run the operations of the originals' ``step``; return x_prev and the prediction."""
    k = coefficient(x)
    found = originals_prediction(k, x, m, form)
    if in_float32:
        x = x.to(torch.float32)
    x_prev = k * x - k * found
    if len(histories) == 1:
        x_prev = x_prev - k * (k * (found - histories[0]))
    elif histories:
        last, before = k * (found - histories[0]), k * (histories[0] - histories[1])
        x_prev = x_prev + k * (last + k * (last - before)) - k * (k * (last - before))
    if noise is not None:
        x_prev = x_prev + k * noise
    return x_prev.to(found.dtype) if in_float32 else x_prev, found


class _DPMSolverSteps(MultistepSteps):
    """The steps of DPM-Solver, on any path."""

    _in_float32: bool
    """Whether the original computes in float32 whatever the sample's dtype."""

    def _order(self) -> int:
        """Return the order of the next step as the originals choose it."""
        config, count = self.config, len(self.timesteps)
        left = count - self._step_index  # type: ignore[operator] # found before
        few = config.lower_order_final and count < _FEW_STEPS
        ends_low = left == 1 and (config.euler_at_final or few or config.final_sigmas_type == "zero")
        if config.solver_order == 1 or self.lower_order_nums < 1 or ends_low:
            return 1
        return 2 if config.solver_order == 2 or self.lower_order_nums < 2 or (left == 2 and few) else 3

    def _forms(self) -> dict[str, str]:
        """Return the form of the original's prediction for each ``prediction_type``."""
        raise NotImplementedError

    def _kinds_of_file(self, x: Tensor, m: Tensor) -> tuple[ResultKind, ...]:
        form = self._forms()[self.config.prediction_type]
        return kinds_of_results(_originals_results, x, m, None, form=form, in_float32=self._in_float32)[:1]

    def _short_take(  # type: ignore[override] # with options of its own
        self, model_output: Any, sample: Any, generator: Any, variance_noise: Any
    ) -> Tensor | None:
        rows = self._row_cache
        if rows is None or not rows.short or self._step_index is None:
            return None
        if not isinstance(sample, Tensor) or getattr(model_output, "dtype", None) is not sample.dtype:
            return None
        order, outputs = self._order(), self.model_outputs
        if type(outputs) is not list or len(outputs) != self.config.solver_order:
            return None
        before = outputs[-1:-order:-1] if order > 1 else ()
        found = plain_step(
            sample,
            model_output,
            rows.short[order],
            self._step_index,
            rows.values,
            rows.writes,
            rows.remembers_x0,
            *before,
        )
        if found is None:
            return None
        x_prev, prediction = found
        self._remember(model_output if prediction is None else prediction)
        return x_prev

    def _take(  # type: ignore[override] # with options of its own
        self, rows: MultistepRows, model_output: Tensor, sample: Tensor, generator: Any, variance_noise: Any
    ) -> Tensor:
        config, index, order = self.config, self._step_index, self._order()
        if config.thresholding or getattr(config, "variance_type", None) is not None:
            raise LeaveToOriginal("thresholding and learned variances have no fused form")
        form = self._forms().get(config.prediction_type)
        if form is None:
            raise LeaveToOriginal(f"prediction_type must be one of {', '.join(self._forms())}")
        row = rows.row(index, order)
        others = histories = self._histories(order - 1, sample)
        noise = None
        if config.algorithm_type.startswith("sde-"):
            noise = self._noise(model_output, sample, generator, variance_noise)
            others = [noise, *histories]
        x_kind, prediction_kind = kinds_of_results(
            _originals_results,
            sample,
            model_output,
            noise,
            *histories,
            form=form,
            in_float32=self._in_float32,
        )
        is_output = form == "m"  # then the original remembers the tensor itself
        if noise is None and order == config.solver_order and rows.allows_short_path:
            rows.fill_short(index, order, not is_output)  # type: ignore[arg-type] # there is such a row
        x_prev, prediction = fused(
            row,
            partial(rows.table, sample.device, order),
            index,  # type: ignore[arg-type] # there is such a row
            sample,
            model_output,
            others,
            x_kind,
            None if is_output else prediction_kind,
        )
        self._remember(model_output if prediction is None else prediction)
        return x_prev

    def _noise(self, m: Tensor, sample: Tensor, generator: Any, variance_noise: Any) -> Tensor:
        """Draw noise as the original does, or convert what it was given."""
        if variance_noise is not None:
            check_histories([variance_noise], m)
            return variance_noise.to(torch.float32)
        if isinstance(generator, list) and len(generator) not in (1, len(m)):
            raise LeaveToOriginal(f"generator must be one, or one for each of the {len(m)} samples")
        dtype = torch.float32 if self._in_float32 else torch.promote_types(sample.dtype, m.dtype)
        return randn_tensor(m.shape, generator=generator, device=m.device, dtype=dtype)


class FastDPMSolverMultistepScheduler(_DPMSolverSteps, DPMSolverMultistepScheduler):
    """``diffusers.DPMSolverMultistepScheduler`` with its update in one kernel.

    docs/drop_ins/diffusers.md lists every difference.

    Args:
        solver: a file that ``ddim-fast search`` wrote, or its content: see ``FastDDIMScheduler``.

    All other arguments are the original's.
    """

    _in_float32 = True
    _row_fields = (
        "prediction_type",
        "algorithm_type",
        "solver_type",
        "use_flow_sigmas",
        "thresholding",
        "variance_type",
    )

    set_timesteps = set_timesteps_on_host(DPMSolverMultistepScheduler, "timesteps")

    __init__ = with_solver(DPMSolverMultistepScheduler)

    def _path_of_files(self) -> SolverPath:
        return path_of_multistep(self.config, self.alphas_cumprod)

    def _forms(self) -> dict[str, str]:
        return originals_forms(predicts_noise=not self.config.algorithm_type.endswith("++"))

    def _row_at(self, sigmas: list[float], index: int, order: int) -> StepCoefficients:  # type: ignore[override] # its option
        config = self.config
        return dpm_solver_row(
            sigmas_of_order(sigmas, index, order),
            config.prediction_type,
            config.algorithm_type,
            config.solver_type,
            bool(getattr(config, "use_flow_sigmas", False)),
        )

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take the original's ``step`` in one pass (Lu et al. 2022, arXiv 2211.01095)."""
        output = self._multistep(model_output, timestep, sample, return_dict, generator, variance_noise)
        if output is not None:
            return output
        return super().step(model_output, timestep, sample, generator, variance_noise, return_dict)  # type: ignore[misc]  # the original


class FastEDMDPMSolverMultistepScheduler(_DPMSolverSteps, EDMDPMSolverMultistepScheduler):
    """``diffusers.EDMDPMSolverMultistepScheduler`` with its update in one kernel.

    Args:
        solver: a file that ``ddim-fast search`` wrote, or its content: see ``FastDDIMScheduler``.

    All other arguments are the original's.
    """

    _in_float32 = False
    _row_fields = ("prediction_type", "algorithm_type", "solver_type", "sigma_data", "thresholding")

    set_timesteps = set_timesteps_on_host(EDMDPMSolverMultistepScheduler, "timesteps")

    __init__ = with_solver(EDMDPMSolverMultistepScheduler)

    def _path_of_files(self) -> SolverPath:
        return path_of_edm(self.config)

    def _forms(self) -> dict[str, str]:
        return dict.fromkeys(("epsilon", "v_prediction"), "k x + k m")

    def _row_at(self, sigmas: list[float], index: int, order: int) -> StepCoefficients:  # type: ignore[override] # its option
        config = self.config
        return edm_dpm_solver_row(
            sigmas_of_order(sigmas, index, order),
            config.prediction_type,
            config.algorithm_type,
            config.solver_type,
            float(config.sigma_data),
        )

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take the original's ``step`` in one pass (arXiv 2211.01095, on EDM's path)."""
        output = self._multistep(model_output, timestep, sample, return_dict, generator, None)
        if output is not None:
            return output
        return super().step(model_output, timestep, sample, generator, return_dict)  # type: ignore[misc]  # the original
