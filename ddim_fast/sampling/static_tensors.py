"""Tensors that stay where they are, in the layout of those whose values they get."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.contract import overlaps_itself


def static_like(tensor: Tensor) -> Tensor:
    """Return a new tensor of the same shape, dtype, device and strides.

    Expanded dimensions are expanded again. Where elements share memory in another way, it is
    contiguous.
    """
    strides = tensor.stride()
    if overlaps_itself(_each_once(tensor)):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)


def fill(static: Tensor, tensor: Tensor) -> None:
    """Copy the values of a tensor into one that ``static_like`` made for such a tensor."""
    _each_once(static).copy_(_each_once(tensor))


def _each_once(tensor: Tensor) -> Tensor:
    """Return the view without the repetitions of expanded dimensions."""
    for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor
