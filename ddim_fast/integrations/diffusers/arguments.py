"""Check which arguments a fused step can take, and leave the others to the original."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ...kernels.layout import is_wrapped

_INTEGERS = (torch.int64, torch.int32)


class LeaveToOriginal(Exception):  # noqa: N818 (not an error: it leads out of the fast path)
    """A call that has no fused form, and why: the original computes it, or raises the right error."""


def check_tensors(sample: Any, model_output: Any) -> None:
    """Leave a call to the original unless both are floating-point, of one shape and device."""
    if not isinstance(sample, Tensor) or not isinstance(model_output, Tensor):
        raise LeaveToOriginal("sample and model_output must be tensors")
    if (
        sample.shape != model_output.shape
        or not sample.dtype.is_floating_point
        or not model_output.dtype.is_floating_point
        or sample.device != model_output.device
        or sample.ndim == 0
    ):
        raise LeaveToOriginal(
            "sample and model_output must be floating point, with dimensions, of one shape and on one device"
        )
    if not torch.compiler.is_dynamo_compiling() and (is_wrapped(sample) or is_wrapped(model_output)):
        raise LeaveToOriginal("sample and model_output must not be wrapped by a transform of torch.func")


def check_no_gradients(*tensors: Tensor) -> None:
    """Leave a call to the original where gradients are recorded through one of these."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise LeaveToOriginal("a step that reads an earlier result has no gradients")


def single_timestep(timestep: Any) -> int | Tensor:
    """Return one timestep: an int, or an int64 tensor on its device, which nothing waits for."""
    if type(timestep) is int:
        return timestep
    if isinstance(timestep, Tensor):
        if timestep.ndim != 0 or timestep.dtype not in _INTEGERS:
            raise LeaveToOriginal(
                "timestep must be an int, or an int32 or int64 tensor without dimensions, got a tensor of shape "
                f"{tuple(timestep.shape)} and {timestep.dtype}: pass timestep.item()"
            )
        return cast(int, timestep.item()) if timestep.device.type == "cpu" else timestep.to(torch.int64)
    if isinstance(timestep, np.integer):
        return int(timestep)
    raise LeaveToOriginal(f"timestep must be an int, or an int32 or int64 tensor, got {timestep!r:.80}")


def batch_of_timesteps(timesteps: Any, samples: Any, noise: Any, num_timesteps: int) -> Tensor:
    """Return one timestep, or one for each sample, on the device of the samples."""
    check_tensors(samples, noise)
    if samples.device.type == "meta":  # a table has no values there
        raise LeaveToOriginal("samples must have values, got some on the device meta")
    if not isinstance(timesteps, Tensor) or timesteps.dtype not in _INTEGERS:
        raise LeaveToOriginal(f"timesteps must be an int32 or int64 tensor, got {timesteps!r:.80}")
    if timesteps.numel() != 1 and timesteps.shape != samples.shape[:1]:
        raise LeaveToOriginal(
            f"timesteps must be one, or one for each of the {len(samples)} samples, got shape {tuple(timesteps.shape)}"
        )
    on_host = timesteps.device.type == "cpu"
    if on_host and timesteps.numel() and not 0 <= timesteps.min() <= timesteps.max() < num_timesteps:
        raise LeaveToOriginal(f"timesteps must be 0 to {num_timesteps - 1}, got {timesteps.tolist()!r:.80}")
    return timesteps.to(samples.device, torch.int64)


def thresholding_options(config: Any, sample: Tensor) -> tuple[float, float]:
    """Return the ratio and the maximum of dynamic thresholding."""
    ratio, maximum = config.dynamic_thresholding_ratio, config.sample_max_value
    if not (isinstance(ratio, (int, float)) and isinstance(maximum, (int, float))):
        raise LeaveToOriginal(
            f"dynamic_thresholding_ratio and sample_max_value must be numbers, got {ratio!r} and {maximum!r}"
        )
    # Thresholds are float32. A maximum below 1 would scale x0 up.
    if sample.dtype == torch.float64 or sample.ndim < 2 or not (0 <= ratio <= 1 and 1 <= maximum < math.inf):
        raise LeaveToOriginal(
            "thresholding needs samples (B, C, ...) below float64, dynamic_thresholding_ratio in [0, 1] and "
            f"sample_max_value of at least 1, got {sample.ndim} dimensions of {sample.dtype}, {ratio} and {maximum}"
        )
    return ratio, maximum
