"""Whether calls of a model do the same each time: a graph replays one of them for all."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from ..kernels.torch_internals import TorchDispatchMode, tree_flatten
from .model_state import PLAIN, plain_key


def difference_of_calls(runs: list[list[tuple[str, Hashable]]]) -> str | None:
    """Return in words the first operator that differs between recorded calls; None if none does."""
    first, *others = runs
    for other in others:
        for (name, arguments), (other_name, other_arguments) in zip(first, other, strict=False):
            if name != other_name:
                return f"{name} in one call and {other_name} in the next"
            if arguments != other_arguments:
                return f"{name} with other shapes or numbers in the next call"
        if len(first) != len(other):
            return f"{len(first)} operators in one call and {len(other)} in the next"
    return None


def record_operators(function: Callable[[], Any], into: list[list[tuple[str, Hashable]]]) -> Callable[[], None]:
    """Return a function that calls ``function`` and adds its operators to ``into``: their names,
    and their arguments apart from what tensors hold."""
    if TorchDispatchMode is None:
        return lambda: None

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((str(func), tuple(map(_argument_key, tree_flatten((args, kwargs))[0]))))
            return func(*args, **(kwargs or {}))

    def recorded() -> None:
        seen.clear()
        with Watch():
            function()
        into.append(list(seen))

    seen: list[tuple[str, Hashable]] = []
    return recorded


def _argument_key(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device
    return plain_key(leaf) if isinstance(leaf, PLAIN) else type(leaf).__qualname__
