"""What a device can compute with."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def type_of(device: torch.device) -> str:
    """Return ``device.type``: torch makes the string anew each time, which takes as long as a small
    step."""
    return device.type


@lru_cache(maxsize=64)
def has_float64(device: torch.device) -> bool:
    """Return whether a device computes in float64: Apple's GPUs do not, nor do some of Intel's."""
    if device.type in ("cpu", "cuda"):
        return True
    try:
        torch.zeros(1, dtype=torch.float64, device=device).add_(1)
    except (TypeError, RuntimeError):
        return False
    return True


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for a device that lacks it."""
    return torch.float64 if has_float64(device) else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in the widest floating-point dtype of its device."""
    return tensor.to(widest_dtype(tensor.device))
