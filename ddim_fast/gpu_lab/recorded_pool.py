"""Memory that recorded graphs share, as CUDA graphs share a memory pool.

What a captured function is done with when it returns is free for the next capture, at the same
address; what is still held is not. So a replay overwrites what another graph of the pool computed
on its way, and even what an earlier one returned, if it was captured later and took its memory
("Sharing memory across captures" in PyTorch's notes on CUDA semantics). Within one capture nothing
is used twice.
"""

from __future__ import annotations

import numpy as np
import torch

from .torch_internals import WeakStorage

_ALIGNED = 64  # bytes, as torch's own memory


class _Block:
    """One piece of memory, which belongs to whoever holds the storage that was given out last."""

    def __init__(self, nbytes: int):
        room = np.zeros(nbytes + _ALIGNED, np.uint8)
        self._bytes = room[-room.ctypes.data % _ALIGNED :][:nbytes]
        self._holder: WeakStorage | None = None
        self.nbytes = nbytes

    @property
    def is_free(self) -> bool:
        return self._holder is None or self._holder.get() is None

    def alias(self, nbytes: int) -> torch.UntypedStorage:
        """Return a storage of its first bytes, which does not count as holding it."""
        return torch.frombuffer(self._bytes, dtype=torch.uint8, count=nbytes).untyped_storage()

    def give(self, nbytes: int) -> torch.UntypedStorage:
        storage = self.alias(nbytes)
        self._holder = WeakStorage(storage)
        return storage


class RecordedPool:
    """A memory pool of recorded graphs: a ``ddim_fast.sampling.cuda_graphs.MemoryPool``.

    As in torch, it ends with its last graph: another capture in it is refused.
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._graphs = 0
        self._ended = False

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self._blocks)

    def take(self, nbytes: int) -> tuple[torch.UntypedStorage, torch.UntypedStorage]:
        """Return memory that nobody holds, as two storages: one for the tensor that is made, and one
        for the graph, which may use the memory after the tensor is gone."""
        fitting = [block for block in self._blocks if block.nbytes >= nbytes and block.is_free]
        block = min(fitting, key=lambda each: each.nbytes, default=None)
        if block is None:
            block = _Block(nbytes)
            self._blocks.append(block)
        return block.give(nbytes), block.alias(nbytes)

    def enter(self) -> None:
        """Count a graph that is captured.

        Raises:
            RuntimeError: the last one was reset.
        """
        if self._ended:
            raise RuntimeError("a memory pool ends with its last graph, got a capture after it: take another pool")
        self._graphs += 1

    def leave(self) -> None:
        """Count a graph that is reset, or whose capture failed."""
        self._graphs -= 1
        self._ended = self._graphs == 0
        if self._ended:
            self._blocks.clear()
