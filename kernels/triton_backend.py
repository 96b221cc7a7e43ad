"""The step in Triton, as a backend. Triton itself is imported by the first step that needs it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .coefficients import StepCoefficients, StepTable
from .fields import StepInputs
from .layout import as_rows, plain_memory_reasons

name = "triton"


def missing_reason() -> str | None:
    """Return why this backend runs nowhere; None if it does on some device."""
    return "Triton is not installed: pip install triton" if find_spec("triton") is None else None


def unsupported_reasons(inputs: StepInputs) -> list[str]:
    """Return why this backend cannot run these (valid) inputs; empty if it can."""
    missing = missing_reason()
    reasons = [] if missing is None else [missing]
    if inputs.x_t.device.type != "cuda":
        reasons.append(f"tensors are on {inputs.x_t.device}, it runs on cuda")
    return reasons + plain_memory_reasons(inputs)


@lru_cache(maxsize=4096)
def _one_row(coefficients: StepCoefficients, guidance_scale: float | None, device: torch.device) -> StepTable:
    return StepTable.of([coefficients], device, guidance_scale)


def run(inputs: StepInputs) -> Tensor:
    """Run checked inputs, in one launch.

    A row that is not in a table is copied to the device, once for each device.
    """
    from . import triton_step

    x_t, table = inputs.x_t, inputs.coefficients
    result = inputs.x_prev if inputs.x_prev is not None else torch.empty_like(x_t)
    if x_t.numel() == 0:
        return result
    if not isinstance(table, StepTable):
        table = _one_row(table, inputs.guidance_scale, x_t.device)
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
        )
    rows.copy_back()
    return result


def workspace_size(x_t: Tensor) -> int:
    """Return how many int64 numbers ``dynamic_thresholds`` of such samples works on."""
    if x_t.device.type != "cuda" or missing_reason() is not None or x_t.numel() == 0:
        return 0
    from . import triton_thresholds

    return triton_thresholds.workspace_size(len(x_t), x_t[0].numel())


def thresholds_workspace(x_t: Tensor) -> Tensor | None:
    """Return memory for ``dynamic_thresholds`` of such samples; None where it needs none."""
    size = workspace_size(x_t)
    return torch.empty(size, dtype=torch.int64, device=x_t.device) if size else None


def dynamic_thresholds(
    inputs: StepInputs,
    ratio: float,
    maximum: float,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Return ``thresholding.dynamic_thresholds`` of checked inputs, ``(B,)`` float32.

    x0 is never in memory.
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
        rows = as_rows(inputs, x_t)
        triton_thresholds.launch(rows, table, inputs.index, thresholds, workspace, ratio=ratio, maximum=maximum)
    return thresholds
