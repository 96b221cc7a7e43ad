"""The step in Triton, as a backend. Triton itself is imported by the first step that needs it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from . import cpu_step
from .coefficients import StepCoefficients, StepTable
from .contract import NORMALS
from .density import DensityInputs
from .fields import StepInputs
from .layout import as_rows, lay_out, plain_memory_reasons

name = "triton"


@cache
def missing_reason() -> str | None:
    """Return why this backend runs nowhere; None if it does on some device."""
    # Looking for it takes longer than a launch.
    return "Triton is not installed: pip install triton" if find_spec("triton") is None else None


def unsupported_reasons(inputs: StepInputs, more: Iterable[Tensor] = ()) -> list[str]:
    """Return why this backend cannot run these (valid) inputs; empty if it can."""
    missing = missing_reason()
    reasons = [] if missing is None else [missing]
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
    log_prob_out: Tensor | None,
    log_prob_reduction: str,
    min_std: float | None,
    index: Tensor | None = None,
    normals: str = "exact",
) -> Tensor | None:
    """Run a step by one launch if its tensors are plain: contiguous, and all that a step asks of
    them, which C++ finds out. A step with log-probabilities is not: it may take two launches.

    Args:
        guidance_scale: of a table: any number if it has scales, None if not.

    Returns:
        ``x_prev``, or a new tensor; or None, having done nothing and without an error, where more has
        to be checked.
    """
    from . import triton_step

    if cpu_step.extension is None or type(x_t) is not Tensor or normals not in NORMALS or missing_reason() is not None:
        return None
    if log_prob_out is not None:
        return None
    if x_prev is None:
        x_prev = torch.empty_like(x_t)
    sizes = cpu_step.extension.plain(
        x_t, model_output, coefficients, model_output_uncond, guidance_scale, noise, seeds, noise_step, noise_stream, thresholds,
        x_prev, x0, history, history_2, model_input_out, log_prob_out, log_prob_reduction, min_std, index,
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
        model_input_out, None, None, table.rows, index,
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
