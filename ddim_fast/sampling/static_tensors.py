"""Tensors that stay where they are, in the layout of those whose values they get."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..kernels import layout
from ..kernels.contract import overlaps_itself


def is_plain(tensor: Tensor) -> bool:
    """Return whether ``static_like`` makes a tensor of the same kind: dense, of no subclass."""
    return tensor.layout == torch.strided and not tensor.is_nested and not layout.is_wrapper(tensor)


def static_like(tensor: Tensor) -> Tensor:
    """Return a new tensor of the same shape, dtype, device and strides.

    Expanded dimensions are expanded again. Where elements share memory in another way, it is
    contiguous.
    """
    strides = tensor.stride()
    if overlaps_itself(_each_once(tensor)):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)


def static_leaves(leaves: Iterable[Any]) -> list[Any]:
    """Return leaves with a new tensor in place of each tensor: one for those that are one object."""
    return _each_object(static_like, leaves)


def fill(static: Tensor, tensor: Tensor) -> None:
    """Copy the values of a tensor into one that ``static_like`` made for such a tensor."""
    _each_once(static).copy_(_each_once(tensor))


def fill_leaves(static: Iterable[Any], leaves: Iterable[Any]) -> None:
    """Copy the values of leaves into those that ``static_leaves`` made."""
    for into, leaf in zip(static, leaves, strict=True):
        if isinstance(into, Tensor):
            fill(into, leaf)


def copies_of(static: Iterable[Any]) -> list[Any]:
    """Return leaves that ``static_leaves`` made with a new copy in place of each tensor."""
    return _each_object(_copy_of, static)


def _copy_of(static: Tensor) -> Tensor:
    new = torch.empty_strided(static.shape, static.stride(), dtype=static.dtype, device=static.device)
    fill(new, static)
    return new


def _each_object(make: Callable[[Tensor], Tensor], leaves: Iterable[Any]) -> list[Any]:
    """Return leaves with what is made of each tensor in its place, once for each object."""
    made: dict[int, Tensor] = {}
    result = []
    for leaf in leaves:
        if isinstance(leaf, Tensor) and id(leaf) not in made:
            made[id(leaf)] = make(leaf)
        result.append(made.get(id(leaf), leaf))
    return result


def _each_once(tensor: Tensor) -> Tensor:
    """Return the view without the repetitions of expanded dimensions."""
    for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor
