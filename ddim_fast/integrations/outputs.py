"""What a caller's function returned, checked before a step reads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..utils.checks import refuse


def check_output(name: str, output: object, x: Tensor, shape: Sequence[int] | None = None, remedy: str = "") -> Tensor:
    """Return ``output``, if a step of the samples ``x`` can read it.

    Args:
        name: what it is, for errors, as "the output of model".
        shape: the right one, if it is not that of ``x``.
        remedy: of another shape.

    Raises:
        TypeError: it is no tensor, or a sparse, nested or complex one.
        ValueError: its shape or device is another one.
    """
    shape = tuple(x.shape if shape is None else shape)
    rule = f"{name} must be a tensor of shape {shape}"
    if not isinstance(output, Tensor):
        refuse(rule, type(output), kind=TypeError)
    if output.layout != torch.strided or output.is_nested or output.is_complex():
        refuse(f"{rule}, dense and real", (output.layout, output.dtype), kind=TypeError)
    if output.shape != shape:
        refuse(rule, tuple(output.shape), remedy)
    if output.device != x.device:
        refuse(f"{rule} on the device of the samples, {x.device}", str(output.device))
    return output
