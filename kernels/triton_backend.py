"""The step in Triton, as a backend. Triton itself is imported by the first step that needs it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from . import cpu_step
from .coefficients import StepCoefficients, StepTable
from .contract import NORMALS
from .fields import StepInputs
from .layout import as_rows, plain_memory_reasons

name = "triton"


@cache
def missing_reason() -> str | None:
    """Return why this backend runs nowhere; None if it does on some device."""
    # Looking for it takes longer than a launch.
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


def run_plain(
    x_t: Tensor,
    model_output: Tensor,
    coefficients: StepCoefficients | StepTable,
    model_output_uncond: Tensor | None,
    guidance_scale: float | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    noise_step: int,
    noise_stream: int,
    thresholds: Tensor | None,
    x_prev: Tensor | None,
    x0: Tensor | None,
    history: Tensor | None,
    history_2: Tensor | None,
    model_input_out: Tensor | None,
    index: Tensor | None = None,
    normals: str = "exact",
) -> Tensor | None:
    """Run a step by one launch if its tensors are plain: contiguous, and all that a step asks of
    them, which C++ finds out.

    Args:
        guidance_scale: of a table: any number if it has scales, None if not.

    Returns:
        ``x_prev``, or a new tensor; or None, having done nothing and without an error, where more has
        to be checked.
    """
    from . import triton_step

    if cpu_step.extension is None or type(x_t) is not Tensor or normals not in NORMALS or missing_reason() is not None:
        return None
    if x_prev is None:
        x_prev = torch.empty_like(x_t)
    sizes = cpu_step.extension.plain(
        x_t, model_output, coefficients, model_output_uncond, guidance_scale, noise, seeds, noise_step, noise_stream, thresholds,
        x_prev, x0, history, history_2, model_input_out, index,
    )  # fmt: skip
    if sizes is None:
        return None
    n_samples, n_elements = sizes
    if n_samples * n_elements == 0:
        return x_prev
    if not coefficients.adds_noise:
        noise = seeds = None
    table = coefficients if isinstance(coefficients, StepTable) else _one_row(coefficients, guidance_scale, x_t.device)
    if seeds is None and thresholds is None and (index is None or index.numel() == 1):
        n_samples, n_elements = 1, n_samples * n_elements
    pointers = (
        x_t, model_output, model_output_uncond, noise, seeds, thresholds, None, None, None, x_prev, x0, history, history_2,
        model_input_out, table.rows, index,
    )  # fmt: skip
    with torch.cuda.device_of(x_t):
        triton_step.launch_pointers(
            pointers, n_samples, n_elements, None, table.clipped, noise_step, noise_stream, normals
        )
    return x_prev


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
