"""Check which arguments a fused step can take, and leave the others to the original."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..kernels.layout import is_wrapped

INTEGERS = (torch.int64, torch.int32)


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
        if timestep.ndim != 0 or timestep.dtype not in INTEGERS:
            raise LeaveToOriginal(
                "timestep must be an int, or an int32 or int64 tensor without dimensions, got a tensor of shape "
                f"{tuple(timestep.shape)} and {timestep.dtype}: pass timestep.item()"
            )
        return cast(int, timestep.item()) if timestep.device.type == "cpu" else timestep.to(torch.int64)
    if isinstance(timestep, np.integer):
        return int(timestep)
    raise LeaveToOriginal(f"timestep must be an int, or an int32 or int64 tensor, got {timestep!r:.80}")
