"""Dynamic thresholding: a bound of x0 for each sample (Imagen, arXiv 2205.11487, section 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..utils.checks import check_number
from . import triton_backend
from .coefficients import StepCoefficients, StepTable
from .contract import check_field, check_overlap, check_predictions, check_writable
from .fields import ARGUMENTS, TENSORS, StepInputs


def quantile_of_magnitude(x: Tensor, ratio: float) -> Tensor:
    """Return the ``ratio`` quantile of |x| of each sample: ``(B, ...)`` -> ``(B,)``.

    It is linearly interpolated, and exact for any size (``torch.quantile`` stops at 2**24
    elements).
    """
    magnitude = x.abs().flatten(1)
    position = ratio * (magnitude.shape[1] - 1)
    below = int(position)
    low = magnitude.kthvalue(below + 1, dim=1).values
    if position == below:
        return low
    high = magnitude.kthvalue(below + 2, dim=1).values
    return torch.lerp(low, high, position - below)


def _check(inputs: StepInputs, ratio: float, maximum: float, out: Tensor | None) -> None:
    check_predictions(inputs)
    if not inputs.coefficients.clipped:
        raise ValueError(
            "dynamic thresholds are for coefficients that clip x0, got clip = inf: give the plan a clip_sample_range"
        )
    if inputs.index is not None and inputs.row_per_sample:
        raise ValueError(
            f"dynamic thresholds take one index for all samples, got {inputs.index.numel()}: call them for each sample alone"
        )
    check_number("ratio", ratio, at_least=0, at_most=1)
    check_number("maximum", maximum, above=0)
    if out is not None:
        check_field("out", out, inputs, TENSORS["thresholds"])
        check_writable("out", out, inputs)
        for name, read in inputs.reads:
            check_overlap("out", out, ARGUMENTS[name], read, same_allowed=False)


def thresholds_workspace(x_t: Tensor) -> Tensor | None:
    """Return memory that ``dynamic_thresholds`` of such samples ``(B, ...)`` works on, to be used
    again in each step; None where it needs none."""
    return triton_backend.thresholds_workspace(x_t)


def _check_workspace(x_t: Tensor, workspace: Tensor | None) -> None:
    """Check that a workspace is one for such samples.

    Raises:
        ValueError: it is not.
    """
    if workspace is None:
        return
    needed = triton_backend.workspace_size(x_t)
    fits = workspace.dtype == torch.int64 and workspace.device == x_t.device and workspace.is_contiguous()
    if not fits or workspace.numel() < needed:
        raise ValueError(
            f"workspace must be what thresholds_workspace(x_t) returned, {needed} numbers of torch.int64 on {x_t.device}, got "
            f"{workspace.numel()} of {workspace.dtype} on {workspace.device}: make one for these samples"
        )


def dynamic_thresholds(
    x_t: Tensor,
    model_output: Tensor,
    coefficients: StepCoefficients | StepTable,
    ratio: float,
    maximum: float,
    model_output_uncond: Tensor | None = None,
    guidance_scale: float | None = None,
    index: Tensor | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Return thresholds for ``ddim_step``, ``(B,)`` float32.

    Each is the sample's ``ratio`` quantile of |x0|, at least the clip range, at most ``maximum``.
    With a ``StepTable`` and ``index``, they are for ``ddim_step_from_table``. On a GPU nothing
    waits for the device, and nothing is allocated if ``out``, ``(B,)`` float32, is given for the
    result, and ``workspace``, from ``thresholds_workspace``, for samples of more than 4,096 elements:
    those take six launches, smaller ones take one.

    Raises:
        TypeError, ValueError: an argument breaks a rule. Nothing has been written.
    """
    inputs = StepInputs(
        x_t=x_t,
        model_output=model_output,
        coefficients=coefficients,
        index=index,
        model_output_uncond=model_output_uncond,
        guidance_scale=guidance_scale,
    )
    _check(inputs, ratio, maximum, out)
    _check_workspace(x_t, workspace)
    if not triton_backend.unsupported_reasons(inputs):
        return triton_backend.dynamic_thresholds(inputs, ratio, maximum, out, workspace)
    x0_x: float | Tensor
    x0_m: float | Tensor
    bound: float | Tensor
    scale: float | Tensor | None = guidance_scale
    if isinstance(coefficients, StepTable):
        assert index is not None  # checked: a table needs one
        x0_x, x0_m, bound, scale = coefficients.prediction(index)
    else:
        x0_x, x0_m, bound = coefficients.x0_x, coefficients.x0_m, coefficients.clip
    m = model_output.float()
    if model_output_uncond is not None and scale is not None:
        m = torch.lerp(model_output_uncond.float(), m, scale)
    x0 = x0_x * x_t.float() + x0_m * m
    low = torch.as_tensor(bound, dtype=torch.float32, device=x0.device)
    quantile = quantile_of_magnitude(x0, ratio) if x0.numel() else low.expand(len(x0))
    thresholds = torch.minimum(torch.maximum(quantile, low), low.clamp(min=maximum))
    return thresholds if out is None else out.copy_(thresholds)
