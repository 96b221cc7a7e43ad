"""Graphs that are kept: captured once, replayed by every later call that differs in values only.

A graph bakes in addresses, shapes and every Python number. Everything that changes between calls is
in static tensors that the captured work reads (``captured``). What is baked in is part of the key
under which a graph is kept (``graph_key``), so a different value leads to a different graph, never
to a stale one.
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

from ..models.protocol import Model
from .captured import C, Captured, InUseError, Work
from .captured_loop import CapturedLoop, Job
from .cuda_graphs import CudaGraphs, GraphBackend, UnsteadyModelError, is_out_of_memory
from .graph_key import graph_key
from .model_state import ModelState
from .shared_pools import SharedPools

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
    """A cache of captured work; the least recently used is freed first.

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
        self._captured: OrderedDict[Hashable, tuple[Model, Captured]] = OrderedDict()
        self._states: dict[int, ModelState] = {}  # of the models that have graphs, or that their owners hold
        self._failed: WeakKeyDictionary[Any, dict[Hashable, str]] = WeakKeyDictionary()
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
    def use(self, work: Work[C], optional: bool = False, vouch: bool = True) -> Iterator[C | None]:
        """Return what was captured for this work, with its values loaded; it is captured now if
        there is nothing.

        Args:
            optional: return None, and tell the work why, instead of raising an error where it
                cannot be captured.
            vouch: whether, with ``optional``, a model is refused for which nobody can vouch.

        Raises:
            CaptureError: the model cannot be captured.
            TypeError: an argument of the model is neither a tensor nor a plain value.
        """
        captured = self._get_or_none(work, vouch) if optional else self._get(work, self._state(work))
        try:
            if captured is not None:
                captured.load(work)
            yield captured
        finally:
            if captured is not None:
                with self._lock:
                    captured.finish()
                    if not captured.is_kept:  # it was given up while it was in use
                        self._pools.release(captured)

    def _get(self, work: Work[C], state: ModelState | None, vouch: bool = False, key: Hashable = None) -> C:
        if key is None:
            key = graph_key(work, state)
        captured = self._take(key, work)
        if captured is not None:
            return captured
        if state is not None:
            state.check_weights()
        # One after the other, since all share a side stream. Others may replay meanwhile.
        with self._capturing:
            captured = self._take(key, work)  # another thread may have captured it
            if captured is not None:
                return captured
            started = time.perf_counter()
            fresh = self._capture(work, vouch)
            seconds = time.perf_counter() - started
            self._keep(work, fresh, seconds)
        return fresh

    def _keep(self, work: Work[Any], fresh: Captured, seconds: float) -> None:
        """Keep what was captured, and free what is too much then."""
        # The first call may have completed the model: later ones find it as it is now.
        key = graph_key(work, fresh.state)
        with self._lock:
            s = self._stats
            self._stats = replace(s, misses=s.misses + 1, capture_seconds=s.capture_seconds + seconds)
            if key in self._captured:
                return
            self._captured[key] = (work.model, fresh)
            fresh.is_kept = True
            if fresh.state is not None:
                self._states[id(work.model)] = fresh.state
            while len(self._captured) > 1 and (len(self._captured) > self.maxsize or self._is_over_budget()):
                self._evict(next(iter(self._captured)))
            if self._is_over_budget():
                self._pools.retire(fresh)

    def _take(self, key: Hashable, work: Work[C]) -> C | None:
        """Return what is kept under a key, from now on in use; None if there is nothing that is
        free.

        Raises:
            InUseError: it is in use, and the work does not get a graph of its own for that.
        """
        with self._lock:
            captured: Any = self._captured.get(key, _NOTHING)[1]
            if captured is None or captured.busy:
                if captured is not None and work.is_brief:
                    raise InUseError("a graph is replayed by one at a time, got a call while another was using it")
                return None
            self._captured.move_to_end(key)
            captured.busy = True
            self._hits += 1
            return captured

    def _capture(self, work: Work[C], vouch: bool) -> C:
        """Capture. If the device's memory is full, all idle graphs are freed, and it is tried once
        more."""
        fresh = None
        try:
            fresh = self._in_pool(work, vouch)
        except Exception as error:
            if not is_out_of_memory(error) or not self._evict_idle():
                raise
        if fresh is None:  # outside of the error, whose traceback holds what it allocated
            fresh = self._in_pool(work, vouch)
        return fresh

    def _in_pool(self, work: Work[C], vouch: bool) -> C:
        backend = self.backend_of(work.device)
        with self._pools.for_capture(work.device, backend) as shared:
            fresh = work.capture(backend, vouch, shared.pool)
            fresh.busy = True
            shared.users.append(fresh)
        return fresh

    def capture_apart(self, job: Job) -> CapturedLoop:
        """Capture for a caller who keeps the graph, in memory of its own, and vouches for the
        model."""
        with self._capturing:
            return CapturedLoop(job, self.backend_of(job.device), trusted=True)

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

    def size_of(self, model: Model) -> tuple[int, int]:
        """Return how many graphs of this model are kept, and their bytes."""
        with self._lock:
            kept = [captured for owner, captured in self._captured.values() if owner is model]
            return len(kept), sum(captured.nbytes for captured in kept)

    def __repr__(self) -> str:
        s = self.stats()
        return (
            f"GraphCache({s.graphs} of {self.maxsize} graphs, {s.nbytes / 2**20:.1f} MiB, {s.hits} hits, {s.misses} misses, "
            f"{s.evictions} evictions, {s.capture_seconds:.2f} s of capturing)"
        )

    def _state(self, work: Work[Any], vouch: bool = False) -> ModelState | None:
        """Return what a graph of this model bakes in of it; the one found last, if nothing has
        changed.

        Raises:
            DoubtError: nobody can vouch for it on this device.
        """
        model, vouch_on = work.model, work.device if vouch else None
        if not isinstance(model, nn.Module):
            return None
        known = self._states.get(id(model))
        if known is None or not known.is_current():
            # One that is kept is looked through to its end, one that is not as far as a doubt.
            is_kept = known is not None or work.is_brief
            known = ModelState(model, None if is_kept else vouch_on)
            if is_kept:
                self._states[id(model)] = known
        if vouch_on is not None:
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
        captured.is_kept = False
        if all(owner is not model for owner, _ in self._captured.values()):
            self._states.pop(id(model), None)
        self._stats = replace(self._stats, evictions=self._stats.evictions + 1)
        if not captured.busy:  # or else when its run ends
            self._pools.release(captured)

    def _get_or_none(self, work: Work[C], vouch: bool) -> C | None:
        """Return None whatever goes wrong: an error of the model itself shows again without a
        graph."""
        model, key = work.model, None
        failed = self._failed.setdefault(model, {})
        if _UNSTEADY in failed:  # each call would find another state, and try again
            work.refused(failed[_UNSTEADY], None, is_first=False)
            return None
        try:
            state = self._state(work, vouch)
            key = graph_key(work, state)
            if key not in failed:
                return self._get(work, state, vouch, key)
        except Exception as error:
            is_first = not failed
            if not isinstance(error, InUseError):
                self._remember(work, key, error)
            work.refused(str(error), error, is_first)
            return None
        work.refused(failed[key], None, is_first=False)
        return None

    def _remember(self, work: Work[Any], key: Hashable, error: Exception) -> None:
        """Keep why something cannot be captured."""
        failed = self._failed.setdefault(work.model, {})
        if len(failed) > _FAILURES:
            failed.clear()
        failed[None] = str(error)
        if isinstance(error, UnsteadyModelError):
            failed[_UNSTEADY] = str(error)
        elif not is_out_of_memory(error):  # or else there may be room next time
            failed[key] = str(error)

    def discard(self, model: Model) -> None:
        """Free every graph of this model, so that it is captured again, for instance after a change
        that graphs cannot see."""
        with self._lock:
            if isinstance(model, nn.Module):
                self._failed.pop(model, None)
            self._states.pop(id(model), None)
            for key in [key for key, (owner, _) in self._captured.items() if owner is model]:
                self._evict(key)

    def clear(self) -> None:
        """Free every graph."""
        with self._lock:
            self._failed.clear()
            self._states.clear()
            while self._captured:
                self._evict(next(iter(self._captured)))


GRAPHS = GraphCache()
"""The graphs of every sampler without a cache of its own."""
