"""The memory of CUDA graphs, which several of them share.

What a captured function computes on its way lies at addresses of the graph's memory pool. Graphs of
one pool get the same addresses, so together they take as much as the largest of them, not the sum.
This is safe under two rules:

- Nothing in a pool outlives a replay. Inputs, results and all else that must last are in tensors
  that were made before the capture. (What is still held after a capture is not given to the next,
  but may itself lie where an earlier graph works.)
- Replays of one pool do not overlap on the device. Each begins after the one before, whatever
  streams and threads they come from: ``CudaPool.replay`` sees to that.

Source: "Sharing memory across captures" in PyTorch's notes on CUDA semantics, which asks for
replays in the order of the captures, since there results are in the pool.
"""

from __future__ import annotations

import threading

import torch


class CudaPool:
    """A memory pool of one device, and the order of the replays that use it.

    Args:
        device: the CUDA device. None: the current one.

    Attributes:
        handle: what ``torch.cuda.graph`` takes.
        nbytes: bytes taken by captures so far; none is given back while a graph of the pool is
            left.
    """

    def __init__(self, device: str | int | torch.device | None = None):
        self.handle = torch.cuda.graph_pool_handle()
        self.nbytes = 0
        self._device = device
        self._lock = threading.Lock()
        self._last: torch.cuda.Stream | None = None

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Launch a graph on the current stream, after the replay before, which may be on another.

        The device waits, the host does not. As for all of torch, a stream that torch did not make
        must live as long as what was put on it.
        """
        with self._lock:
            stream = torch.cuda.current_stream(self._device)
            if self._last is not None and self._last != stream:
                stream.wait_stream(self._last)
            self._last = stream
            graph.replay()

    def measure(self) -> None:
        """Count its bytes again, after a capture."""
        segments = torch.cuda.memory_snapshot()
        self.nbytes = sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(self.handle))
