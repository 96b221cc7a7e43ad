"""Which inputs of a layer go to the kernel that takes its place, and which to PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def suits_kernel(x: Tensor, *weights: Tensor | None) -> bool:
    """Return whether an input is a batch of float32 pictures on the CPU, as the weights that are not
    None are, outside of autocast, and no gradient is asked for."""
    if x.ndim != 4 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    for tensor in (x, *weights):  # noqa: SIM110 (a generator takes longer than the call of a kernel)
        if tensor is not None and (tensor.dtype != torch.float32 or not tensor.is_cpu):
            return False
    return True
