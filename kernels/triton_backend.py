"""The step in Triton, as a backend. Triton itself is imported by the first step that needs it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .coefficients import StepCoefficients, StepTable
from .density import DensityInputs
from .fields import StepInputs
from .layout import as_rows, lay_out, plain_memory_reasons

name = "triton"


def unsupported_reasons(inputs: StepInputs, more: Iterable[Tensor] = ()) -> list[str]:
    """Return why this backend cannot run these (valid) inputs; empty if it can."""
    reasons = []
    if find_spec("triton") is None:
        reasons.append("Triton is not installed: pip install triton")
    if inputs.x_t.device.type != "cuda":
        reasons.append(f"tensors are on {inputs.x_t.device}, it runs on cuda")
    return reasons + plain_memory_reasons(inputs, more)


@lru_cache(maxsize=4096)
def _one_row(
    coefficients: StepCoefficients, guidance_scale: float | None, device: torch.device, min_std: float | None = None
) -> StepTable:
    return StepTable.of([coefficients], device, guidance_scale, min_std)


def run(inputs: StepInputs) -> Tensor:
    """Run checked inputs, in one launch; log-probabilities of samples of more than ``gaussian.BLOCK``
    elements take a second one.

    A row that is not in a table is copied to the device, once for each device.
    """
    from . import triton_step

    x_t, table, log_prob = inputs.x_t, inputs.coefficients, inputs.log_prob_out
    result = inputs.x_prev if inputs.x_prev is not None else torch.empty_like(x_t)
    if x_t.numel() == 0:
        if log_prob is not None:
            log_prob.zero_()
        return result
    if not isinstance(table, StepTable):
        table = _one_row(table, inputs.guidance_scale, x_t.device, inputs.min_std)
    dense = None if log_prob is None else log_prob.detach().contiguous()
    rows = as_rows(inputs, result)
    if not inputs.adds_noise:
        rows.tensors.pop("noise", None)
    with torch.cuda.device_of(x_t):
        triton_step.launch(
            rows,
            table,
            None if inputs.index is None else inputs.index.contiguous(),
            seeds=inputs.seeds.contiguous() if inputs.seeds is not None and inputs.generates_noise else None,
            thresholds=inputs.thresholds.contiguous() if inputs.thresholds is not None else None,
            noise_step=inputs.noise_step,
            noise_stream=inputs.noise_stream,
            normals=inputs.normals,
            log_prob=dense,
            log_prob_reduction=inputs.log_prob_reduction,
        )
    if log_prob is not None and dense is not None and not log_prob.is_contiguous():
        log_prob.copy_(dense)
    rows.copy_back()
    return result


def dynamic_thresholds(inputs: StepInputs, ratio: float, maximum: float, out: Tensor | None = None) -> Tensor:
    """Return ``thresholding.dynamic_thresholds`` of checked inputs, ``(B,)`` float32.

    This is one launch, and x0 is never in memory.
    """
    from . import triton_thresholds

    x_t, table = inputs.x_t, inputs.coefficients
    thresholds = torch.empty(len(x_t), dtype=torch.float32, device=x_t.device) if out is None else out
    if x_t.numel() == 0:
        return thresholds.fill_(1.0)  # there are no elements to scale: any number will do
    if not isinstance(table, StepTable):
        table = _one_row(table, inputs.guidance_scale, x_t.device)
    inputs = replace(inputs, thresholds=thresholds)  # keeps samples from being joined into one row
    with torch.cuda.device_of(x_t):
        triton_thresholds.launch(as_rows(inputs, x_t), table, inputs.index, thresholds, ratio=ratio, maximum=maximum)
    return thresholds


def density(inputs: DensityInputs, counts: Tensor | None = None) -> Tensor:
    """Return the log-density or divergence of checked inputs, ``(B,)`` float32; see
    ``reference.density``. This is one launch, or two for samples of more than ``gaussian.BLOCK``
    elements."""
    x_t = inputs.step.x_t
    result = torch.empty(len(x_t), dtype=torch.float32, device=x_t.device)
    if x_t.numel() == 0:
        if counts is not None:
            counts.zero_()
        return result.zero_()
    _launch_density(inputs, {}, results=result, counts=counts)
    return result


def density_backward(inputs: DensityInputs, factors: Tensor, gradients: dict[str, Tensor]) -> None:
    """Fill the gradients; see ``reference.density_backward``. This is one launch."""
    if inputs.step.x_t.numel():
        _launch_density(inputs, gradients, factors=factors.contiguous())


def _launch_density(inputs: DensityInputs, gradients: dict[str, Tensor], **results: Tensor | None) -> None:
    from . import triton_density

    table = _one_row(inputs.row, inputs.step.guidance_scale, inputs.step.x_t.device, inputs.min_std)
    read = {name: tensor.detach() for name, tensor in inputs.tensors.items()}
    rows = lay_out(read, {f"of_{name}": gradient for name, gradient in gradients.items()})
    with torch.cuda.device_of(inputs.step.x_t):
        triton_density.launch(rows, table, mean=inputs.reduction == "mean", **results)
    rows.copy_back()
