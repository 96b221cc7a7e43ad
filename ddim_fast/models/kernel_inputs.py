"""Which inputs of a layer go to the kernel that takes its place, and which to PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def suits_kernel(x: Tensor, *weights: Tensor | None) -> bool:
    """Return whether an input is a batch of float32 pictures on the CPU, as the weights that are not
    None are, outside of autocast, and no gradient is asked for."""
    floats = all(
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in (x, *weights) if tensor is not None
    )
    return floats and x.ndim == 4 and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
