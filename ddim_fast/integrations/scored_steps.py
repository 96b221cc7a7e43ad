"""Steps with log-probabilities, for the codes that train with them: the x_prev of a step is drawn or
given, and samples may be at different steps.

A drop-in says which row each sample's step has. Samples at one step are one launch; at several,
each sample is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.contract import StepCoefficients
from ..kernels.dispatch import ddim_step
from ..kernels.log_prob import ddim_log_prob
from ..utils.checks import refuse
from .original_results import readable

Rows = Sequence[StepCoefficients]
"""One row for all samples, or one for each."""


def numbers_of(name: str, timestep: Any, sample: Tensor) -> list[Any]:
    """Return the timesteps of a step on the host: one, or one for each sample. (``one_or_each`` tells
    whether the samples are at one step.)

    Raises:
        TypeError: it is neither a number nor a tensor.
        ValueError: it is a tensor of another shape.
    """
    if isinstance(timestep, Tensor):
        if timestep.numel() != 1 and (timestep.shape != sample.shape[:1] or not len(timestep)):
            refuse(f"{name} must be one, or one for each of the {len(sample)} samples", tuple(timestep.shape))
        found = timestep.reshape(-1).tolist()
    elif isinstance(timestep, (list, tuple)):
        found = [one.item() if isinstance(one, Tensor) else one for one in timestep]
        if len(found) != 1 and len(found) != (len(sample) or 1):
            refuse(f"{name} must be one, or one for each of the {len(sample)} samples", found)
    else:
        found = [timestep.item() if hasattr(timestep, "item") else timestep]
    if any(isinstance(one, bool) or not isinstance(one, (int, float)) for one in found):
        refuse(f"{name} must be a number, or a tensor of numbers", timestep, kind=TypeError)
    return found


def one_or_each(timesteps: list[Any]) -> list[Any]:
    """Return the one timestep that all samples are at, or that of each."""
    return timesteps[:1] if len(set(timesteps)) == 1 else timesteps


def check_pair(model_output: Any, sample: Any) -> None:
    """Raise TypeError or ValueError unless both are floating-point tensors of one shape and device."""
    for name, tensor in (("sample", sample), ("model_output", model_output)):
        if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point or tensor.ndim == 0:
            kind = (tensor.dtype, tuple(tensor.shape)) if isinstance(tensor, Tensor) else type(tensor)
            refuse(f"{name} must be a floating-point tensor (B, ...)", kind, kind=TypeError)
    _check_like_sample("model_output", model_output, sample)


def _check_like_sample(name: str, tensor: Tensor, sample: Tensor) -> None:
    if tensor.shape != sample.shape or tensor.device != sample.device:
        refuse(
            f"{name} must have the shape and device of sample, {tuple(sample.shape)} on {sample.device}",
            (tuple(tensor.shape), str(tensor.device)),
        )


def check_given(name: str, given: Any, sample: Tensor, generator: Any) -> None:
    """Raise TypeError or ValueError unless a given x_prev can be the result of a step of ``sample``,
    and there is no generator beside it."""
    if not isinstance(given, Tensor) or not given.dtype.is_floating_point:
        refuse(f"{name} must be a floating-point tensor", type(given), kind=TypeError)
    _check_like_sample(name, given, sample)
    if generator is not None:
        raise ValueError(f"x_prev is drawn or given, got both generator and {name}: pass one of them")


def drawn(
    sample: Tensor,
    model_output: Tensor,
    rows: Rows,
    draw: Callable[[], Tensor],
    min_std: float | None = None,
    **outputs: Any,
) -> tuple[Tensor, Tensor]:
    """Return (x_prev, log_prob) of a step that draws its noise: x_prev in the dtype of ``sample``, and
    the mean over the elements, ``(B,)``, of the x_prev that is stored; NaN where a step has no
    density.

    Args:
        draw: returns the noise; called once, after every check.
        min_std: the least standard deviation that log_prob is taken with.
        outputs: further tensors of ``ddim_step`` that the step fills, in the dtype that it computes
            in.
    """
    dtype = torch.promote_types(sample.dtype, model_output.dtype)
    x_t, m, noise = sample.to(dtype), readable(model_output, dtype), draw().to(dtype)
    if len(rows) > 1:
        parts = [
            _drawn(x_t[i : i + 1], m[i : i + 1], row, noise[i : i + 1], sample.dtype, min_std, _sample_of(outputs, i))
            for i, row in enumerate(rows)
        ]
        x_prev, log_prob = (torch.cat(part) for part in zip(*parts, strict=True))
        return x_prev, log_prob
    return _drawn(x_t, m, rows[0], noise, sample.dtype, min_std, outputs)


def _sample_of(outputs: dict[str, Any], i: int) -> dict[str, Any]:
    return {name: tensor[i : i + 1] for name, tensor in outputs.items()}


def _drawn(
    x_t: Tensor,
    m: Tensor,
    row: StepCoefficients,
    noise: Tensor,
    stored: torch.dtype,
    min_std: float | None,
    outputs: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    result = torch.promote_types(x_t.dtype, torch.float32)
    if not row.has_density(min_std):
        x_prev = ddim_step(x_t, m, row, noise=noise, **outputs).to(stored)
        return x_prev, x_t.new_full((len(x_t),), math.nan, dtype=result)
    if x_t.dtype == stored != torch.float64:  # in the step's own pass
        log_prob = x_t.new_empty(len(x_t), dtype=result)
        return ddim_step(x_t, m, row, noise=noise, log_prob_out=log_prob, min_std=min_std, **outputs), log_prob
    x_prev = ddim_step(x_t, m, row, noise=noise, **outputs).to(stored)
    return x_prev, ddim_log_prob(x_prev.detach().to(x_t.dtype), x_t, m, row, min_std=min_std)


def log_prob_of(given: Tensor, sample: Tensor, model_output: Tensor, rows: Rows, **options: Any) -> Tensor:
    """Return the log-probability of a given x_prev, ``(B,)``: see ``drawn``.

    Args:
        options: of ``ddim_log_prob``.
    """
    # One that is wider than the samples is read as it is.
    dtype = torch.promote_types(given.dtype, torch.promote_types(sample.dtype, model_output.dtype))
    x_prev, x_t, m = given.detach().to(dtype), sample.to(dtype), readable(model_output, dtype)
    if len(rows) > 1:
        parts = [slice(i, i + 1) for i in range(len(rows))]
        return torch.cat(
            [ddim_log_prob(x_prev[i], x_t[i], m[i], row, **options) for i, row in zip(parts, rows, strict=True)]
        )
    return ddim_log_prob(x_prev, x_t, m, rows[0], **options)


def log_prob_of_elements(
    given: Tensor, sample: Tensor, model_output: Tensor, row: StepCoefficients, min_std: float | None
) -> Tensor:
    """Return the log-density of each element of a given x_prev, in the shape of ``sample``: of samples
    of one element each."""
    x_prev, x_t, m = (tensor.reshape(-1, 1) for tensor in (given.detach(), sample, model_output))
    return ddim_log_prob(x_prev, x_t, m, row, min_std=min_std).reshape(sample.shape)
