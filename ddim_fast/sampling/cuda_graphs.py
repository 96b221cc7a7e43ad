"""CUDA graphs: a step is captured once and replayed, so that the host launches one graph instead of
hundreds of kernels.

Capturing is done by a small object behind a protocol, ``GraphBackend``. ``CudaGraphs`` is the real
one; ``ddim_fast.gpu_lab.replay`` has a stand-in that records and replays on the CPU, with pointers
and numbers frozen as in a real graph.

Sources: "CUDA Graphs", stream capture, in the CUDA C++ programming guide; "CUDA Graphs" in
PyTorch's notes on CUDA semantics.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.torch_internals import clear_library_workspaces, release_capture_pool
from .cuda_pool import CudaPool

WARM_UP_CALLS = 3
"""cuBLAS and cuDNN choose and allocate in the first call, autotuners in the first few."""


class CaptureError(RuntimeError):
    """A capture that is impossible. The message has the rule, what was called and where, and the
    remedy."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or what caused it, is that the device's memory is full."""
    while error is not None and not isinstance(error, torch.cuda.OutOfMemoryError):
        error = error.__cause__
    return error is not None


class UnsteadyModelError(CaptureError):
    """A model that does something else in each call, so that one of them cannot stand for all."""


class CapturedGraph(Protocol):
    """A captured function. ``output`` is what it returned: tensors that every replay fills again,
    and that nothing has filled yet.

    Every replay uses every tensor at the same address, and every Python number with the same value,
    as the captured call: tensors that it did not make itself must stay alive, and what changes
    between replays must be in a tensor.
    """

    output: Any

    def replay(self) -> None:
        """Run what was captured, in the order of the current stream; the host does not wait."""

    def reset(self) -> None:
        """Free the graph and its memory. It cannot be replayed any more."""


class MemoryPool(Protocol):
    """Memory in which several graphs compute, one after the other: see ``cuda_pool``.

    Only what a captured function is done with before it returns may be in it. Replays of one pool
    follow one another, in the order in which the host launches them.

    ``nbytes`` is what captures have taken. It is given back when no graph of the pool is left.
    """

    nbytes: int


class GraphBackend(Protocol):
    """Something that captures functions without arguments."""

    def warm_up(self, function: Callable[[], Any], times: int = WARM_UP_CALLS) -> None:
        """Run ``function``, so that nothing happens for the first time in a capture. Its output
        tensors change."""

    def new_pool(self) -> MemoryPool:
        """Return memory for graphs that share it."""

    def capture(self, function: Callable[[], Any], pool: Any = None) -> CapturedGraph:
        """Call ``function`` once, recording instead of running: no tensor changes until the first
        replay.

        Args:
            pool: a ``MemoryPool`` of this backend. What the function returns may be overwritten by
                other graphs of it. None: memory of the graph's own.

        Raises:
            CaptureError: it did something that cannot be recorded.
        """

    def fence(self, tensors: Sequence[Tensor]) -> Fence | None:
        """Return the place after what is on the current stream, which uses these tensors: their
        memory is not given to others before. None where everything is done at once."""


class Fence(Protocol):
    """A place in the work of a stream."""

    def wait(self) -> None:
        """Let what is put on the current stream from now on begin after that; the host does not
        wait."""


class CudaGraph:
    """A captured ``torch.cuda.CUDAGraph`` and what the captured function returned."""

    def __init__(self, graph: torch.cuda.CUDAGraph, output: Any, pool: CudaPool):
        self._graph: torch.cuda.CUDAGraph | None = graph
        self._pool = pool
        self.output = output

    def replay(self) -> None:
        """Launch the graph on the current stream, after what was put there before, and after the
        replay before from the same memory.

        Raises:
            RuntimeError: the graph was reset.
        """
        if self._graph is None:
            raise RuntimeError("a graph can be replayed until it is reset, got one that was reset: capture again")
        self._pool.replay(self._graph)

    def reset(self) -> None:
        self.output = None
        if self._graph is not None:
            self._graph.reset()
            self._graph = None


class CudaGraphs:
    """Capturing by ``torch.cuda.CUDAGraph``, on a separate stream.

    Args:
        device: the CUDA device. None: the current one.
    """

    def __init__(self, device: str | int | torch.device | None = None):
        self._device = device
        self._side: torch.cuda.Stream | None = None

    def _side_stream(self) -> torch.cuda.Stream:
        # A capture is not possible on the default stream, which other streams wait for.
        if self._side is None:
            self._side = torch.cuda.Stream(self._device)
        return self._side

    def warm_up(self, function: Callable[[], Any], times: int = WARM_UP_CALLS) -> None:
        """Run ``function`` on the side stream, where it will be captured: libraries keep one
        workspace per stream.

        The side stream first waits for the current one, which then waits for the side stream. The
        host waits for neither.
        """
        side = self._side_stream()
        with torch.cuda.device(side.device):
            current = torch.cuda.current_stream()
            side.wait_stream(current)
            try:
                # Random numbers drawn by the model while it warms up must not be missing from the
                # run.
                with torch.cuda.stream(side), torch.random.fork_rng(devices=[side.device.index]):
                    for _ in range(times):
                        function()
            finally:
                current.wait_stream(side)

    def fence(self, tensors: Sequence[Tensor]) -> Fence:
        stream = torch.cuda.current_stream(self._device)
        for tensor in tensors:
            tensor.record_stream(stream)
        return CudaFence(stream.device)

    def new_pool(self) -> CudaPool:
        return CudaPool(self._device)

    def capture(self, function: Callable[[], Any], pool: CudaPool | None = None) -> CudaGraph:
        """Capture one call of ``function``. Waits for the device first.

        The error mode is "thread_local". With the default, "global", unsafe calls of *any* thread,
        such as a data loader that allocates pinned memory, would make the capture fail; with
        "relaxed" our own unsafe calls would go unnoticed.

        Raises:
            CaptureError: ``function`` raised, or did something that a stream cannot record. The
                message names the line; the cause is the original error. The current stream and
                the device's default generator are restored, the capture has ended and its memory is
                released; what could not be restored is in the message.
        """
        side = self._side_stream()
        graph, pool = torch.cuda.CUDAGraph(), self.new_pool() if pool is None else pool
        raised: list[BaseException] = []
        output = None
        with torch.cuda.device(side.device):
            current = torch.cuda.current_stream()
            clear_library_workspaces()
            try:
                with torch.cuda.graph(graph, pool=pool.handle, stream=side, capture_error_mode="thread_local"):
                    try:
                        output = function()
                    except BaseException as error:
                        raised.append(error)
                        raise
            except BaseException as error:
                # After a forbidden call torch.cuda.graph raises a second error when it ends the
                # capture: report the first.
                first = raised[0] if raised else error
                torch.cuda.set_stream(current)
                left = _give_up(graph, pool.handle, side, current)
                if not isinstance(first, Exception):
                    raise first from None
                if isinstance(first, CaptureError):
                    raise
                raise _explained(first, left) from first
            finally:
                clear_library_workspaces()  # what is in the graph's pool is the graph's alone
            pool.measure()
        return CudaGraph(graph, output, pool)


class CudaFence:
    """An event on the stream that was current."""

    def __init__(self, device: torch.device):
        self._device = device
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


def _give_up(graph: torch.cuda.CUDAGraph, pool: Any, side: torch.cuda.Stream, current: torch.cuda.Stream) -> str:
    """Restore the allocator and the default generator after a failed capture; return in words what
    could not be.

    If ending the capture fails, ``CUDAGraph`` neither removes the pool from the allocator's list of
    running captures (while it is there, memory of other streams is not collected), nor releases its
    share in the pool; and up to torch 2.11 the generator goes on as if captured, so that every
    ``torch.randn`` on the device raises, until a capture succeeds.
    """
    graph.reset()
    left = "" if release_capture_pool(side.device.index, pool) else "; this torch cannot free the capture's memory"
    try:
        tiny = torch.cuda.CUDAGraph()
        with torch.cuda.graph(tiny, stream=side, capture_error_mode="thread_local"):
            torch.zeros(1, dtype=torch.float32, device=side.device)
        tiny.reset()
    except Exception as error:
        torch.cuda.set_stream(current)
        left += f"; the device's random numbers may fail, since no capture succeeds any more ({type(error).__name__})"
    return left


_SKIPPED = (str(Path(torch.__file__).parent) + os.sep, str(Path(contextlib.__file__).parent) + os.sep)
_SITE_PACKAGES = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))


def _explained(error: Exception, left: str) -> CaptureError:
    """Return the error of a capture with the innermost line outside torch that led to it."""
    where, traceback = "", error.__traceback__
    while traceback is not None:
        code, line = traceback.tb_frame.f_code, traceback.tb_lineno
        name = code.co_filename
        if name != __file__ and (not name.startswith(_SKIPPED) or _is_installed(name)):
            where = f" at {name}:{line}, in {code.co_name}: `{linecache.getline(name, line).strip()}`"
        traceback = traceback.tb_next
    message = (str(error).strip().splitlines() or ["without a message"])[0]
    return CaptureError(
        "a captured step may only launch kernels: no waiting for the device, no shape that depends on data, no copy "
        f"between host and device, got {type(error).__name__}: {message}{where}: do that before the loop or on the device, or sample "
        f"without CUDA graphs{left}"
    )


def _is_installed(name: str) -> bool:
    return name.startswith(_SITE_PACKAGES) and not name.startswith(_SKIPPED[0])
