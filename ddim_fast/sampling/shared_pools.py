"""Which memory pool a new graph of a cache gets: one a device, while runs follow one another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .captured import Captured
from .cuda_graphs import GraphBackend, MemoryPool


@dataclass(eq=False)
class SharedPool:
    """A pool, and the work whose graphs compute in it.

    Attributes:
        captures: how many are under way in it.
        leaving: the one that is freed when they are over, since a pool ends with its last graph.
        retired: whether no further graph gets it, so that its memory is given back when those that
            have it are gone.
    """

    pool: MemoryPool
    users: list[Captured] = field(default_factory=list)
    captures: int = 0
    leaving: Captured | None = None
    retired: bool = False

    @property
    def is_free(self) -> bool:
        return self.pool.usable and not self.retired and not any(user.busy for user in self.users)


class SharedPools:
    """The pools of a cache's graphs.

    Args:
        lock: the cache's.
    """

    def __init__(self, lock: AbstractContextManager[Any]) -> None:
        self._lock = lock
        self._pools: dict[torch.device, list[SharedPool]] = {}

    @contextmanager
    def for_capture(self, device: torch.device, backend: GraphBackend) -> Iterator[SharedPool]:
        """Give the pool for a new graph, which lasts at least until the capture is over.

        No run is under way in it. Graphs that are in use at the same time would be right in one
        pool, too, but each replay would wait for that of the other.
        """
        with self._lock:
            pools = self._pools.setdefault(device, [])
            shared = next((each for each in pools if each.is_free), None)
            if shared is None:
                shared = SharedPool(backend.new_pool())
                pools.append(shared)
            shared.captures += 1
        try:
            yield shared
        finally:
            with self._lock:
                shared.captures -= 1
                if shared.leaving is not None:
                    self.release(shared.leaving)
                self._forget_empty()

    def release(self, captured: Captured) -> None:
        """Free a graph.

        Its memory is free for other graphs of the pool, and given back with the last of them.
        """
        with self._lock:
            shared = next(each for each in self._all() if captured in each.users)
            if shared.captures and len(shared.users) == 1:
                shared.leaving = captured
                return
            shared.leaving = None
            shared.users.remove(captured)
            captured.reset()
            self._forget_empty()

    def retire(self, captured: Captured) -> None:
        """Give no further graph the pool that this one has."""
        for shared in self._all():
            shared.retired |= captured in shared.users

    @property
    def nbytes(self) -> int:
        """Bytes of all pools, each counted once."""
        return sum(shared.pool.nbytes for shared in self._all())

    def _all(self) -> list[SharedPool]:
        return [shared for pools in self._pools.values() for shared in pools]

    def _forget_empty(self) -> None:
        """Forget the pools that ended with their last graph."""
        for device, pools in self._pools.items():
            self._pools[device] = [shared for shared in pools if shared.users or shared.captures]
