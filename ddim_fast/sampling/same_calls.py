"""Whether calls of a model do the same each time: a graph replays one of them for all."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ..kernels.torch_internals import TorchDispatchMode, tree_flatten
from .model_state import PLAIN, plain_key


class Calls:
    """Calls of a function on a device, and the operators of each.

    Attributes:
        draws: whether one of them drew from torch's random numbers.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device):
        self._function = function
        self._device = device
        self._calls: list[list[tuple[str, Hashable]]] = []
        self.draws = False

    def record(self) -> None:
        """Call the function, and note its operators: their names, and their arguments apart from
        what tensors hold. Without torch's name for that, they go unnoticed."""
        before = self._place_in_random_numbers()
        if TorchDispatchMode is None:
            self._function()
        else:
            self._calls.append(_operators(self._function))
        self.draws = self.draws or before != self._place_in_random_numbers()

    def _place_in_random_numbers(self) -> bytes | int:
        """Return how far torch's random numbers on the device have got."""
        if self._device.type != "cuda":
            return bytes(torch.default_generator.get_state().numpy())
        generators = torch.cuda.default_generators
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        return generators[index].get_offset() if index < len(generators) else 0

    def difference(self) -> str | None:
        """Return in words the first operator that differs between calls; None if none does."""
        for first, other in zip(self._calls, self._calls[1:], strict=False):
            for (name, arguments), (other_name, other_arguments) in zip(first, other, strict=False):
                if name != other_name:
                    return f"{name} in one call and {other_name} in the next"
                if arguments != other_arguments:
                    return f"{name} with other shapes or numbers in the next call"
            if len(first) != len(other):
                return f"{len(first)} operators in one call and {len(other)} in the next"
        return None


def _operators(function: Callable[[], Any]) -> list[tuple[str, Hashable]]:
    seen: list[tuple[str, Hashable]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((str(func), tuple(map(_argument_key, tree_flatten((args, kwargs))[0]))))
            return func(*args, **(kwargs or {}))

    with Watch():
        function()
    return list(seen)


def _argument_key(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device
    return plain_key(leaf) if isinstance(leaf, PLAIN) else type(leaf).__qualname__
