"""The sampling loop as CUDA graphs: captured once, replayed by every later call that differs in
values only.

A graph bakes in addresses, shapes and every Python number. Here everything that changes between
calls is in static tensors that the captured work reads: samples, seeds, timesteps, coefficients,
guidance scales, conditioning, known regions. What is baked in is part of the key under which a
graph is kept (``graph_key``), so a different value leads to a different graph, never to a stale one.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..kernels.layout import DTYPES_OF_KERNELS
from ..models.protocol import Model
from ..utils.checks import check_choice
from ..utils.warn import warn_caller
from .captured_loop import CapturedLoop, Job
from .cuda_graphs import CudaGraphs, GraphBackend, UnsteadyModelError, is_out_of_memory
from .graph_key import graph_key
from .model_state import ModelState
from .shared_pools import SharedPools

MODES = ("auto", "loop", "step", "off")
"""One graph for the whole loop, one for a step that is replayed for each, or none; "auto": "step"
where it can be."""


_UNSTEADY = "unsteady"
_NOTHING = (None, None)
_FAILURES = 64
"""How many keys that failed are remembered of a model."""


@dataclass(frozen=True)
class GraphStats:
    """What a ``GraphCache`` keeps and did.

    Attributes:
        graphs, nbytes: how many it keeps, and the bytes of memory that they take beside their
            models. Memory that graphs share is counted once.
        hits, misses, evictions: graphs that were found, captured, and freed.
        capture_seconds: spent in captures, warm-up and compilation included.
    """

    graphs: int = 0
    nbytes: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    capture_seconds: float = 0.0


class GraphCache:
    """A cache of captured loops; the least recently used are freed first.

    A graph holds its model and the memory of one call of it; ``clear`` and ``discard`` release
    them. A loop that is in use, by another thread or by the sampler that calls this callback, is
    left alone: a second one is captured. A copy or a pickle of a cache starts empty.

    Args:
        maxsize: how many graphs are kept.
        backend: returns the ``GraphBackend`` of a device.
        device_types: devices on which it captures.
        max_bytes: of memory that graphs keep, beside their models; the one used last is kept
            whatever it takes. None: no limit.
    """

    def __init__(
        self,
        maxsize: int = 8,
        backend: Callable[[torch.device], GraphBackend] = CudaGraphs,
        device_types: Sequence[str] = ("cuda",),
        max_bytes: int | None = None,
    ):
        if maxsize < 1:
            raise ValueError(f"maxsize must be at least 1, got maxsize={maxsize}: use capture='off' for no graphs")
        self.maxsize = maxsize
        self.device_types = tuple(device_types)
        self.max_bytes = max_bytes
        self._backend = backend
        self._backends: dict[torch.device, GraphBackend] = {}  # each has a side stream of its device
        self._captured: OrderedDict[Hashable, tuple[Model, CapturedLoop]] = OrderedDict()
        self._states: dict[int, ModelState] = {}  # of the models that have graphs
        self._failed: WeakKeyDictionary[Any, set[Hashable]] = WeakKeyDictionary()
        self._stats = GraphStats()  # of captures
        self._hits = 0
        self._lock = threading.RLock()  # of what is kept
        self._pools = SharedPools(self._lock)
        self._capturing = threading.RLock()

    def __len__(self) -> int:
        return len(self._captured)

    def __reduce__(self) -> tuple[object, ...]:
        # Graphs belong to their process and device: a copy starts without any.
        return type(self), (self.maxsize, self._backend, self.device_types, self.max_bytes)

    @contextmanager
    def use(self, mode: str, job: Job, optional: bool = False) -> Iterator[CapturedLoop | None]:
        """Return the captured loop for this job, with the job's values loaded; it is captured now
        if there is none.

        Args:
            optional: return None, with one warning, instead of raising an error where it cannot be
                captured.

        Raises:
            CaptureError: the model cannot be captured.
            TypeError: a conditioning entry is neither a tensor nor a plain value.
        """
        captured = self._get_or_none(mode, job) if optional else self._get(mode, job, self._state(job.model))
        try:
            yield captured
        finally:
            if captured is not None:
                with self._lock:
                    captured.finish()
                    if captured not in self:  # it was given up while it was in use
                        self._pools.release(captured)

    def _get(
        self, mode: str, job: Job, state: ModelState | None, vouch: bool = False, key: Hashable = None
    ) -> CapturedLoop:
        if key is None:
            key = graph_key(mode, job, state)
        with self._lock:
            captured = self._captured.get(key, _NOTHING)[1]
            was_busy = captured is not None and captured.busy
            if captured is not None and not was_busy:
                self._captured.move_to_end(key)
                captured.busy = True
                self._hits += 1
        if captured is not None and not was_busy:
            captured.load(job)
            return captured
        if state is not None:
            state.check_weights()
        fresh = self._capture(mode, job, vouch)
        # The first call may have completed the model: later ones find it as it is now.
        key = graph_key(mode, job, fresh.state)
        with self._lock:
            if key not in self._captured:
                self._captured[key] = (job.model, fresh)
                if fresh.state is not None:
                    self._states[id(job.model)] = fresh.state
                while len(self._captured) > 1 and (len(self._captured) > self.maxsize or self._is_over_budget()):
                    self._evict(next(iter(self._captured)))
                if self._is_over_budget():
                    self._pools.retire(fresh)
        return fresh

    def _capture(self, mode: str, job: Job, vouch: bool) -> CapturedLoop:
        """Capture, one after the other, since all share a side stream. Others may replay meanwhile.

        If the device's memory is full, all idle graphs are freed, and it is tried once more.
        """
        with self._capturing:
            started = time.perf_counter()
            try:
                fresh = self._captured_loop(mode, job, vouch)
            except Exception as error:
                if not is_out_of_memory(error) or not self._evict_idle():
                    raise
                fresh = None
            if fresh is None:  # outside of the error, whose traceback holds what it allocated
                fresh = self._captured_loop(mode, job, vouch)
            seconds = time.perf_counter() - started
        with self._lock:
            s = self._stats
            self._stats = replace(s, misses=s.misses + 1, capture_seconds=s.capture_seconds + seconds)
        return fresh

    def _captured_loop(self, mode: str, job: Job, vouch: bool) -> CapturedLoop:
        device = job.loop.x_t.device
        backend = self.backend_of(device)
        with self._pools.for_capture(device, backend) as shared:
            fresh = CapturedLoop(mode, job, backend, vouch, pool=shared.pool)
            fresh.busy = True
            fresh.load(job)  # the warm-up has changed the samples
            shared.loops.append(fresh)
        return fresh

    def capture_apart(self, mode: str, job: Job) -> CapturedLoop:
        """Capture for a caller who keeps the graph, in memory of its own, and vouches for the
        model."""
        with self._capturing:
            return CapturedLoop(mode, job, self.backend_of(job.loop.x_t.device), trusted=True)

    def _is_over_budget(self) -> bool:
        return self.max_bytes is not None and self._nbytes() > self.max_bytes

    def _nbytes(self) -> int:
        return self._pools.nbytes + sum(captured.nbytes for _, captured in self._captured.values())

    def _evict_idle(self) -> bool:
        """Free every graph that nobody uses; return whether there was one."""
        with self._lock:
            idle = [key for key, (_, captured) in self._captured.items() if not captured.busy]
            for key in idle:
                self._evict(key)
        return bool(idle)

    def stats(self) -> GraphStats:
        """Return what is kept, and what has happened since it was made."""
        with self._lock:
            return replace(self._stats, graphs=len(self._captured), nbytes=self._nbytes(), hits=self._hits)

    def __contains__(self, captured: object) -> bool:
        return any(captured is kept for _, kept in self._captured.values())

    def __repr__(self) -> str:
        s = self.stats()
        return (
            f"GraphCache({s.graphs} of {self.maxsize} graphs, {s.nbytes / 2**20:.1f} MiB, {s.hits} hits, {s.misses} misses, "
            f"{s.evictions} evictions, {s.capture_seconds:.2f} s of capturing)"
        )

    def _state(self, model: Model, vouch_on: torch.device | None = None) -> ModelState | None:
        """Return what a graph of this model bakes in of it; the one found last, if nothing has
        changed.

        Raises:
            DoubtError: nobody can vouch for it on this device.
        """
        if not isinstance(model, nn.Module):
            return None
        known = self._states.get(id(model))
        if known is None or not known.is_current():
            had_graphs, known = known is not None, ModelState(model, vouch_on)
            if had_graphs:
                self._states[id(model)] = known
        elif vouch_on is not None:
            known.vouch(vouch_on)
        return known

    def backend_of(self, device: torch.device) -> GraphBackend:
        """Return what captures on a device: one for all graphs there, so that they share a side
        stream."""
        if device not in self._backends:
            self._backends[device] = self._backend(device)
        return self._backends[device]

    def _evict(self, key: Hashable) -> None:
        model, captured = self._captured.pop(key)
        if all(owner is not model for owner, _ in self._captured.values()):
            self._states.pop(id(model), None)
        self._stats = replace(self._stats, evictions=self._stats.evictions + 1)
        if not captured.busy:  # or else when its run ends
            self._pools.release(captured)

    def _get_or_none(self, mode: str, job: Job) -> CapturedLoop | None:
        """Return None whatever goes wrong: an error of the model itself shows again without a
        graph."""
        failed = self._failed.setdefault(job.model, set())
        if _UNSTEADY in failed:  # each call would find another state, and try again
            return None
        key = None
        try:
            state = self._state(job.model, job.loop.x_t.device)
            key = graph_key(mode, job, state)
            return None if key in failed else self._get(mode, job, state, vouch=True, key=key)
        except Exception as error:
            if not failed:
                warn_caller(f"sampling without CUDA graphs: {error}")
            if len(failed) > _FAILURES:
                failed.clear()
            if is_out_of_memory(error):  # there may be room next time
                key = None
            failed |= {key, _UNSTEADY if isinstance(error, UnsteadyModelError) else None}
            return None

    def discard(self, model: Model) -> None:
        """Free every graph of this model, so that it is captured again, for instance after a change
        that graphs cannot see."""
        with self._lock:
            if isinstance(model, nn.Module):
                self._failed.pop(model, None)
            for key in [key for key, (owner, _) in self._captured.items() if owner is model]:
                self._evict(key)

    def clear(self) -> None:
        """Free every graph."""
        with self._lock:
            self._failed.clear()
            while self._captured:
                self._evict(next(iter(self._captured)))


GRAPHS = GraphCache()
"""The graphs of every sampler without a cache of its own."""


def choose_mode(
    capture: str,
    cache: GraphCache,
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None,
    between_steps: str | None,
    model: Model,
    not_captured: str | None = None,
) -> str:
    """Choose the mode to sample in: "loop", "step" or "off".

    Args:
        between_steps: what the host has to do between two steps, in words; None for nothing.
        not_captured: why no step of this call can be captured; None if it can.

    Raises:
        ValueError: the mode asked for is unknown or impossible; the message has the reason.
    """
    check_choice("capture", capture, MODES)
    reason: str | None
    if device.type not in cache.device_types:
        reason = f"it needs a CUDA device, and the samples are on {device}"
    elif dtype not in DTYPES_OF_KERNELS:
        reason = f"its kernel takes float32, float16 and bfloat16, and the samples are {dtype}"
    elif backend not in (None, "triton"):
        reason = f"it is the Triton kernel that is captured, and backend={backend!r} was asked for"
    else:
        reason = not_captured
    if capture in ("loop", "step") and reason is not None:
        raise ValueError(f"capture={capture!r} cannot be used: {reason}; use capture='off', or 'auto'")
    if capture == "loop" and between_steps is not None:
        raise ValueError(
            f"capture='loop' runs all steps as one launch, so the host cannot come between them, got {between_steps}: "
            "use capture='step'"
        )
    if reason is not None or capture == "off":
        return "off"
    if capture == "auto":
        # What a function holds is invisible, and so are changes to it after the capture.
        return "step" if isinstance(model, nn.Module) else "off"
    return capture
