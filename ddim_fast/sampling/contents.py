"""What a module holds at one moment, to be put back after calls that should not have been.

A capture calls its module several times. Where it ends in an error, the module is as it was before,
as far as its state can be seen: a step cache has not counted, batch statistics have not moved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.torch_internals import are_fake
from .static_tensors import is_plain

MOST_BYTES = 1 << 26
"""Of the memory that is copied, smallest first: statistics and counters are small, and weights are
not written by a call."""


class Contents:
    """What containers hold, and the memory of tensors that are no parameters.

    Args:
        dicts, lists, sets: the containers, whose members are kept alive.
        tensors: those that a call may write to.
    """

    def __init__(
        self,
        dicts: Iterable[dict[Any, Any]],
        lists: Iterable[list[Any] | deque[Any]],
        sets: Iterable[set[Any]],
        tensors: Iterable[Tensor],
    ):
        self._dicts = [(each, dict(each)) for each in dicts]
        self._lists = [(each, list(each)) for each in lists]
        self._sets = [(each, set(each)) for each in sets]
        self._memories: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        room = MOST_BYTES
        written = () if are_fake() else tensors
        plain = (each for each in written if not isinstance(each, nn.Parameter) and _has_memory(each))
        for storage in sorted((each.untyped_storage() for each in plain), key=torch.UntypedStorage.nbytes):
            if storage.data_ptr() not in self._memories and storage.nbytes() <= room:
                room -= storage.nbytes()
                self._memories[storage.data_ptr()] = storage, storage.clone()

    def put_back(self) -> None:
        """Put all of it back. Containers that have not changed are not touched."""
        for held, before in self._dicts:
            _put_back(held, before)
        for items, earlier in self._lists:
            if len(items) != len(earlier) or any(a is not b for a, b in zip(items, earlier, strict=True)):
                items.clear()
                items.extend(earlier)
        for members, kept in self._sets:
            if members != kept:
                members.clear()
                members.update(kept)
        for storage, copy in self._memories.values():
            storage.copy_(copy)

    def is_changed(self, tensor: Tensor) -> bool:
        """Return whether the memory of a tensor, where it was copied, has other values now."""
        storage, copy = self._found(tensor)
        return storage is not None and copy is not None and not torch.equal(_bytes_of(storage), _bytes_of(copy))

    def put_back_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Put the memory of these tensors back, where it was copied."""
        for storage, copy in map(self._found, tensors):
            if storage is not None and copy is not None:
                storage.copy_(copy)

    def _found(self, tensor: Tensor) -> tuple[torch.UntypedStorage | None, torch.UntypedStorage | None]:
        address = tensor.untyped_storage().data_ptr() if _has_memory(tensor) else 0
        return self._memories.get(address, (None, None))


def _has_memory(tensor: Tensor) -> bool:
    return is_plain(tensor) and tensor.device.type != "meta" and tensor.untyped_storage().data_ptr() != 0


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _put_back(held: dict[Any, Any], before: dict[Any, Any]) -> None:
    for name in [name for name in held if name not in before]:
        del held[name]
    for name, value in before.items():
        if name not in held or held[name] is not value:
            held[name] = value
    if list(held) != list(before):
        held.clear()
        held.update(before)
