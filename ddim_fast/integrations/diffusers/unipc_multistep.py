"""``UniPCMultistepScheduler``."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ..arguments import LeaveToOriginal
from ..original_results import ResultKind, coefficient, kinds_of_results
from .multistep_rows import UNIPC_CORRECTOR, MultistepRows, unipc_row
from .multistep_steps import (
    MultistepSteps,
    check_histories,
    fused,
    originals_forms,
    originals_prediction,
    sigmas_of_order,
)
from .sigma_steps import set_timesteps_on_host
from .solver_path import SolverPath, path_of_multistep
from .takes_files import with_solver

_LARGEST_ORDER = 3


def _originals_update(k: Tensor, x: Tensor, start: Tensor, earlier: tuple[Tensor, ...], end: Tensor | None) -> Tensor:
    """Run the operations of the original's predictor, or with a prediction at the end its corrector."""
    rest: Any = 0
    if earlier:
        differences = torch.stack([(value - start) / k for value in earlier], dim=1)
        weights = torch.ones(len(earlier), dtype=x.dtype, device=x.device)
        rest = torch.einsum("k,bkc...->bc...", weights, differences)
    if end is not None:
        rest = rest + k * (end - start)
    return (k * x - k * start - k * rest).to(x.dtype)


def _originals_results(
    x: Tensor, m: Tensor, last_sample: Tensor | None, *histories: Tensor, form: str, order: int, corrector_order: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the operations of the original's ``step``; return x_prev, the corrected sample and the
    prediction."""
    k = coefficient(x)
    found = originals_prediction(k, x, m, form)
    if last_sample is not None:
        x = _originals_update(k, last_sample, histories[0], histories[1:corrector_order], found)
    return _originals_update(k, x, found, histories[: order - 1], None), x, found


class FastUniPCMultistepScheduler(MultistepSteps, UniPCMultistepScheduler):
    """``diffusers.UniPCMultistepScheduler`` with its update in two or three passes.

    docs/drop_ins/diffusers.md lists every difference.

    Args:
        solver: a file that ``ddim-fast search`` wrote, or its content: see ``FastDDIMScheduler``.

    All other arguments are the original's.
    """

    predict_x0: bool
    disable_corrector: Any
    solver_p: Any
    last_sample: Any
    this_order: int
    timestep_list: list[Any]
    _row_fields = ("prediction_type", "solver_type", "use_flow_sigmas")

    set_timesteps = set_timesteps_on_host(UniPCMultistepScheduler, "timesteps")

    __init__ = with_solver(UniPCMultistepScheduler)

    def _path_of_files(self) -> SolverPath:
        return path_of_multistep(self.config, self.alphas_cumprod)

    def _kinds_of_file(self, x: Tensor, m: Tensor) -> tuple[ResultKind, ...]:
        form = originals_forms(not self.predict_x0)[self.config.prediction_type]
        return kinds_of_results(_originals_results, x, m, None, form=form, order=1, corrector_order=0)[:1]

    def _row_at(self, sigmas: list[float], index: int, *options: Any) -> StepCoefficients:
        part, order, predicts_noise = options
        config, corrects = self.config, part in UNIPC_CORRECTOR
        try:
            return unipc_row(
                part,
                sigmas_of_order(sigmas, index - 1 if corrects else index, order),
                sigmas[index],
                config.prediction_type,
                predicts_noise,
                config.solver_type,
                bool(getattr(config, "use_flow_sigmas", False)),
            )
        except np.linalg.LinAlgError as error:
            raise LeaveToOriginal(str(error)) from None

    def _take(self, rows: MultistepRows, model_output: Tensor, sample: Tensor, *options: Any) -> Tensor:
        index: Any = self._step_index
        (timestep,), noise = options, not self.predict_x0
        form = originals_forms(noise).get(self.config.prediction_type)
        if form is None or self.config.thresholding or self.solver_p is not None or sample.ndim < 2:
            raise LeaveToOriginal("thresholding, solver_p and samples without channels have no fused form")
        order, corrector_order = self._orders(index)
        histories = self._histories(max(order - 1, corrector_order), sample)
        last_sample = self.last_sample if corrector_order else None
        _check_dtypes(sample, model_output, [*histories, *([] if last_sample is None else [last_sample])], form)
        kinds = kinds_of_results(
            _originals_results,
            sample,
            model_output,
            last_sample,
            *histories,
            form=form,
            order=order,
            corrector_order=corrector_order,
        )
        prediction_kind = None if form == "m" else kinds[2]
        # What was before in a pass of its own saves copies; in half precision it would be rounded once more.
        apart = sample.dtype is torch.float32 or corrector_order == _LARGEST_ORDER
        parts = ["predicts"]
        if corrector_order:
            parts = [*(["recalls", "adds"] if apart else ["corrects"]), "goes on"]
        orders = {part: corrector_order if part in UNIPC_CORRECTOR else order for part in parts}
        found = {part: rows.row(index, part, orders[part], noise) for part in parts}  # all, before a step is taken

        def take(part: str, *args: Any) -> tuple[Tensor, Tensor | None]:
            return fused(found[part], partial(rows.table, sample.device, part, orders[part], noise), index, *args)

        if corrector_order:
            others = [last_sample, *histories[:corrector_order]]
            if apart:
                kind = ResultKind(kinds[1].strides, torch.float32)
                others = [take("recalls", *others[:2], others[2:], kind, None)[0]]
            x, prediction = take(parts[-2], sample, model_output, others, kinds[1], prediction_kind)
            m = model_output if prediction is None else prediction
            x_prev, _ = take("goes on", x, m, histories[: order - 1], kinds[0], None)
        else:
            x = sample
            x_prev, prediction = take("predicts", x, model_output, histories[: order - 1], kinds[0], prediction_kind)
        self._remember(model_output if prediction is None else prediction)
        self.timestep_list[:-1] = self.timestep_list[1:]
        self.timestep_list[-1] = timestep
        self.this_order, self.last_sample = order, x
        return x_prev

    def _orders(self, index: Any) -> tuple[int, int]:
        """Return the order of the next step, and of its corrector, as the original chooses them: 0
        for no corrector."""
        config = self.config
        left = len(self.timesteps) - index if config.lower_order_final else config.solver_order
        order, last_order = min(config.solver_order, left, self.lower_order_nums + 1), 0
        if index > 0 and index - 1 not in self.disable_corrector and self.last_sample is not None:
            last_order = getattr(self, "this_order", None) or -1
        if not 1 <= order <= _LARGEST_ORDER or not 0 <= last_order <= _LARGEST_ORDER:
            raise LeaveToOriginal(f"a step must be of order 1 to {_LARGEST_ORDER}, got {order} after {last_order}")
        return order, last_order

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """Take the original's ``step`` (Zhao et al. 2023, arXiv 2302.04867): the corrector in one
        or two passes and the predictor in another."""
        output = self._multistep(model_output, timestep, sample, return_dict, timestep)
        if output is not None:
            return output
        return super().step(model_output, timestep, sample, return_dict)  # type: ignore[misc]  # the original


def _check_dtypes(sample: Tensor, model_output: Tensor, remembered: list[Tensor], form: str) -> None:
    """Leave a step to the original unless all has one dtype, or the model's output alone fewer digits."""
    check_histories(remembered, sample)
    mixed = model_output.dtype is not sample.dtype and (sample.dtype is not torch.float32 or form == "m")
    if mixed or any(tensor.dtype is not sample.dtype for tensor in remembered):
        raise LeaveToOriginal(f"what a step remembers must be of the dtype of the sample, {sample.dtype}")
