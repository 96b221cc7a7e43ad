"""The key under which a graph is kept: everything that it bakes in."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.torch_internals import caches_parametrizations, kernel_settings
from .model_state import PLAIN, ModelState, plain_key, same_device

if TYPE_CHECKING:
    from .captured import Work


def graph_key(work: Work[Any], state: ModelState | None) -> Hashable:
    """Return everything that a graph bakes in.

    The model of a graph is kept alive, so an id is not reused.
    """
    return id(work.model) if state is None else state.key, work.key(), _settings(work.device.type)


def _settings(device_type: str) -> Hashable:
    """Return what decides which kernels torch chooses, and in which dtype it computes."""
    autocast = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return kernel_settings(), autocast, caches_parametrizations()


def tensor_key(tensor: Tensor) -> Hashable:
    """Return what a graph bakes in of a tensor whose values are copied in."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def first_places(leaves: Iterable[Any]) -> tuple[int, ...]:
    """Return for each tensor the place of the first that is the same object: which of a call's
    arguments are one, as Python's ``is`` tells its model."""
    seen: dict[int, int] = {}
    return tuple([seen.setdefault(id(leaf), n) for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)])


def leaf_key(leaf: Any, name: str, device: torch.device) -> Hashable:
    """Return what a graph bakes in of an argument of its model.

    Args:
        name: what it is called in an error.
        device: that of the samples.

    Raises:
        TypeError: it is neither a tensor on that device nor a plain value.
    """
    if isinstance(leaf, Tensor):
        # A number on the host would be read once, at capture, and be a constant of the graph.
        if not same_device(leaf.device, device):
            raise TypeError(
                f"{name} of a captured graph must be on the device of the samples, {device}, got a tensor on {leaf.device}: move it "
                "there, or run without graphs"
            )
        return tensor_key(leaf)
    if not isinstance(leaf, PLAIN):
        raise TypeError(
            f"{name} of a captured graph must be tensors and plain values (numbers, strings, None), got a "
            f"{type(leaf).__name__}: pass a tensor, or run without graphs"
        )
    return plain_key(leaf)
