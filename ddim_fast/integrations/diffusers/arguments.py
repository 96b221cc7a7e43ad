"""Check the arguments that only diffusers' schedulers take."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...kernels.layout import DTYPES_OF_KERNELS
from ..arguments import INTEGERS, LeaveToOriginal, check_tensors


def check_kernel_tensors(sample: Any, model_output: Any) -> None:
    """Leave a call to the original unless both are tensors with values, as a kernel takes them."""
    check_tensors(sample, model_output)
    dtypes = DTYPES_OF_KERNELS
    if sample.dtype not in dtypes or model_output.dtype not in dtypes or sample.device.type == "meta":
        raise LeaveToOriginal(f"sample and model_output must be of {dtypes}, with values")


def batch_of_timesteps(timesteps: Any, samples: Any, noise: Any, num_timesteps: int) -> Tensor:
    """Return one timestep, or one for each sample, on the device of the samples."""
    check_tensors(samples, noise)
    if samples.device.type == "meta":  # a table has no values there
        raise LeaveToOriginal("samples must have values, got some on the device meta")
    if not isinstance(timesteps, Tensor) or timesteps.dtype not in INTEGERS:
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
