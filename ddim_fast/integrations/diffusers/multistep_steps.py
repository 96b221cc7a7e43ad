"""What multistep schedulers share: a step that reads the predictions of the steps before.

They are kept where the original keeps them, in ``model_outputs``: what somebody reads, copies,
replaces or resets there is what the next step sees, whoever takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ...kernels.contract import StepCoefficients
from ...kernels.cpu_step import plain_step
from ...kernels.dispatch import ddim_step, ddim_step_from_table
from ...kernels.layout import DTYPES_OF_KERNELS, is_wrapped
from ..arguments import LeaveToOriginal
from ..original_results import ResultKind, converted, readable
from .file_steps import FileSteps
from .multistep_rows import MultistepRows
from .output import step_output

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_SLOTS = ("noise", "history", "history_2")


class MultistepSteps(FileSteps):
    """A scheduler with a list of ``sigmas`` and one of ``model_outputs``; mixed in before the
    original class."""

    model_outputs: list[Any]
    lower_order_nums: int
    _rows_kind = MultistepRows

    # --- What a class of its own says ---------------------------------------------------------------------------------

    def _row_at(self, sigmas: list[float], index: int, *options: Any) -> StepCoefficients:
        """Return the row of the step at this index."""
        raise NotImplementedError

    def _take(self, rows: MultistepRows, model_output: Tensor, sample: Tensor, *options: Any) -> Tensor:
        """Take the step of checked tensors at ``_step_index``; return x_prev."""
        raise NotImplementedError

    def _short_take(self, model_output: Any, sample: Any, *options: Any) -> Tensor | None:
        """Take a step as one that was taken before, if it needs no more than to look up its row; return
        x_prev, or None, having changed nothing."""
        return None

    # --- The step -----------------------------------------------------------------------------------------------------

    def _multistep(self, model_output: Any, timestep: Any, sample: Any, return_dict: Any, *options: Any) -> Any:
        """Take the original's step; or return None, having changed nothing, if it must take it
        itself."""
        if self._solver is not None:
            found = self._step_of_file(self._solver, model_output, timestep, sample)
            return step_output(SchedulerOutput, found) if return_dict else found
        if _is_dynamo_compiling() or self.num_inference_steps is None:
            return None
        try:
            x_prev = self._short_take(model_output, sample, *options)
            if x_prev is None:
                rows = self._rows_of_checked(model_output, timestep, sample)
                x_prev = self._take(rows, model_output, sample, *options)
        except LeaveToOriginal:
            return None
        if self.lower_order_nums < self.config.solver_order:
            self.lower_order_nums += 1
        self._step_index += 1  # type: ignore[operator] # a number since the first step
        return step_output(SchedulerOutput, (x_prev,)) if return_dict else (x_prev,)

    def _histories(self, count: int, like: Tensor) -> list[Tensor]:
        """Return this many of ``model_outputs``, the last one first.

        Raises:
            LeaveToOriginal: they are not there, or do not fit ``like``.
        """
        outputs = self.model_outputs
        if type(outputs) is not list or len(outputs) != self.config.solver_order or len(outputs) < count:
            raise LeaveToOriginal(f"model_outputs must be a list of {self.config.solver_order}, got {outputs!r:.80}")
        found = [outputs[-1 - i] for i in range(count)]
        check_histories(found, like)
        return found

    def _remember(self, prediction: Tensor) -> None:
        """Put a prediction in ``model_outputs``, which the original writes to in place."""
        outputs = self.model_outputs
        outputs[:-1] = outputs[1:]
        outputs[-1] = prediction


def check_histories(tensors: Sequence[Any], like: Tensor) -> None:
    """Leave a step to the original unless all are tensors that a kernel reads beside ``like``."""
    for tensor in tensors:
        if (
            not isinstance(tensor, Tensor)
            or tensor.shape != like.shape
            or tensor.dtype not in DTYPES_OF_KERNELS
            or tensor.device != like.device
            or is_wrapped(tensor)
        ):
            raise LeaveToOriginal("what a step remembers must be tensors like the sample")


def fused(
    row: StepCoefficients,
    table: Callable[[], tuple[Any, Tensor]],
    index: int,
    x: Tensor,
    m: Tensor,
    others: Sequence[Tensor],
    x_kind: ResultKind,
    prediction_kind: ResultKind | None,
) -> tuple[Tensor, Tensor | None]:
    """Take a step in one pass; return its result, and the model's prediction of x0 or eps.

    The first of the others is only read. Where there are more, a step writes to them, so it gets
    copies, the second of which becomes the prediction.

    Args:
        table, index: the same row on the device of ``x``: the number of ``table()``.
        others: what the row adds beside x and m: as its noise, history and history_2, in this order.
        x_kind, prediction_kind: of the results; None for no prediction.
    """
    # A step keeps the dtype of x: that is float32 where any other tensor is to keep its digits.
    dtypes = {x.dtype, m.dtype, x_kind.dtype, *(tensor.dtype for tensor in others)}
    as_x = x.stride()
    results_are_as_x = x_kind.strides == as_x and (prediction_kind is None or prediction_kind.strides == as_x)
    if len(dtypes) == 1 and results_are_as_x and len(others) < len(_SLOTS):
        found = plain_step(x, m, {0: row}, 0, (), (), prediction_kind is not None, *others)
        if found is not None:
            return found
    dtype = x.dtype if len(dtypes) == 1 else torch.float32
    prediction = None if prediction_kind is None else prediction_kind.empty(x, dtype)
    tensors: dict[str, Any] = {"out": x_kind.empty(x, dtype)}
    for slot, tensor in zip(_SLOTS, others, strict=False):
        if slot == "noise":
            tensors[slot] = converted(tensor, dtype)
        elif slot == "history" and prediction is not None:
            tensors[slot] = prediction.copy_(tensor)
        else:
            tensors[slot] = tensor.to(dtype, copy=True)
    if "history" not in tensors:
        tensors["x0_out"] = prediction
    x, m = converted(x, dtype), readable(m, dtype)
    if x.device.type == "cuda":  # a row of its own would be copied there in each step
        rows, indices = table()
        x_prev = ddim_step_from_table(x, m, rows, indices[index], **tensors)
    else:
        x_prev = ddim_step(x, m, row, **tensors)
    if prediction is not None and prediction_kind is not None:
        prediction = converted(prediction, prediction_kind.dtype)
    return converted(x_prev, x_kind.dtype), prediction


def originals_prediction(k: Tensor, x: Tensor, m: Tensor, form: str) -> Tensor:
    """Run the operations of the originals' ``convert_model_output``, by their form."""
    if form == "m":
        return m
    if form == "(x - m) / k":
        return (x - k * m) / k
    if form == "x - m":
        return x - k * m
    return k * m + k * x if form == "k m + k x" else k * x + k * m


def originals_forms(predicts_noise: bool) -> dict[str, str]:
    """Return the form of those operations for each ``prediction_type``."""
    if predicts_noise:
        return {"epsilon": "m", "sample": "(x - m) / k", "v_prediction": "k m + k x"}
    return {"epsilon": "(x - m) / k", "sample": "m", "v_prediction": "k x + k m", "flow_prediction": "x - m"}


def sigmas_of_order(sigmas: list[float], index: int, order: int) -> tuple[float, ...]:
    """Return where the step at this index leads, where it starts, and where ``order`` - 1 steps
    before it started.

    Raises:
        LeaveToOriginal: there are not so many before.
    """
    if index + 1 < order:
        raise LeaveToOriginal(f"a step of order {order} needs {order - 1} before it, got index {index}")
    return tuple(sigmas[index + 1 - i] for i in range(order + 1))
