"""What is kept of a capture: the graph, the static tensors that it works on, and whose turn it is.

``Captured`` is the one way from a model to a graph: warm-up, comparison of the calls, capture, and
the fences between one run and the next. What is captured, a step or a model's forward, is a
subclass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..kernels.torch_internals import caches_parametrizations
from ..models.protocol import Model
from .contents import Contents
from .cuda_graphs import (
    WARM_UP_CALLS,
    CapturedGraph,
    CaptureError,
    Fence,
    GraphBackend,
    MemoryPool,
    UnsteadyModelError,
)
from .model_state import DoubtError, ModelState
from .same_calls import Calls

C = TypeVar("C", bound="Captured", covariant=True)


class Work(Protocol[C]):
    """One call, with its values, that a graph can do."""

    @property
    def model(self) -> Model:
        """The model whose state the graph bakes in."""

    @property
    def device(self) -> torch.device:
        """The device of the samples."""

    @property
    def is_brief(self) -> bool:
        """Whether it is one of many short calls of a model that their owner keeps alive: while the
        graph is in use by another thread, it is done without one, and why the model was refused is
        remembered with the model's state."""

    def key(self) -> Hashable:
        """Return what its graph bakes in, apart from the model.

        Raises:
            TypeError: something in it can be no key.
        """

    def capture(self, graphs: GraphBackend, vouch: bool, pool: MemoryPool | None) -> C:
        """Capture it.

        Args:
            vouch: whether a model is refused for which nobody can vouch.
            pool: memory of the graph, beside static tensors; None: its own.

        Raises:
            CaptureError: it cannot be captured.
        """

    def refused(self, reason: str, error: Exception | None, is_first: bool) -> None:
        """Hear why it is done without a graph.

        Args:
            error: what went wrong; None if that was remembered from an earlier call.
            is_first: whether nothing of this model was refused before.
        """


class InUseError(CaptureError):
    """A graph that another thread is using."""


class Captured:
    """A graph, and static tensors that it works on.

    A subclass allocates and loads them, and then calls ``_capture``. All that must last from one
    replay to the next is in the static tensors: what else a replay computes, the next one from its
    pool overwrites.

    Args:
        pool: memory of the graph, beside the static tensors; None: its own.

    Attributes:
        busy: whether it is in use.
        is_kept: whether a cache keeps it.
        state: the model's, as later calls will find it; None for a callable that is no module.
    """

    def __init__(self, graphs: GraphBackend, pool: MemoryPool | None = None):
        self.busy = self.is_kept = False
        self.state: ModelState | None = None
        self._backend = graphs
        self._pool = pool
        self._fence: Fence | None = None
        self._graph: CapturedGraph

    def _capture(
        self,
        model: Model,
        device: torch.device,
        first: Callable[[], Any],
        whole: Callable[[], Any],
        vouch: bool,
        trusted: bool = False,
    ) -> None:
        """Warm up by ``first`` and capture ``whole``. After an error the model is as it was.

        Args:
            vouch: whether a model is refused for which ``capture="auto"`` cannot vouch.
            trusted: whether the caller vouches for the model, so that nothing about it is checked.

        Raises:
            CaptureError: the model cannot be captured, or does something else in each call.
        """
        if caches_parametrizations():
            raise CaptureError(
                "a captured step computes its weights itself, got a call inside torch.nn.utils.parametrize.cached(), which frees "
                "them when it ends: make the call outside of it, or run it without graphs"
            )
        before = None if trusted or not isinstance(model, nn.Module) else ModelState(model).contents()
        try:
            with _begun(), _no_cache_of_autocast(), torch.no_grad():
                if trusted:
                    self._backend.warm_up(first)
                else:
                    self._warm_up(model, device, first, vouch, before)
                self._graph = self._backend.capture(whole, self._pool)
            try:
                self._check_unchanged(model, device if vouch else None)
            except CaptureError:
                self._graph.reset()
                raise
        except BaseException:
            if before is not None:
                before.put_back()
            raise

    def _warm_up(
        self, model: Model, device: torch.device, first: Callable[[], Any], vouch: bool, before: Contents | None
    ) -> None:
        """Run ``first`` a few times, and check that each call of the model does the same. What each
        of them writes to is then as it was before."""
        self._backend.warm_up(first, 1)
        self.state = ModelState(model) if isinstance(model, nn.Module) else None
        after_first = None if self.state is None else (self.state.writes(), self.state.contents())
        calls = Calls(first, device)
        is_compiled = self.state is not None and self.state.is_compiled  # under a watch it would run uncompiled
        self._backend.warm_up(first if is_compiled else calls.record, WARM_UP_CALLS - 1)
        difference = calls.difference()
        if difference is not None:
            raise unsteady(difference)
        if vouch and calls.draws:
            raise DoubtError("the model draws random numbers")
        if self.state is None or before is None or after_first is None:
            return
        written = self.state.written_since(*after_first)
        if vouch and written:
            raise DoubtError(f"{next(iter(written))} is written to in each call, and warming up is several")
        before.put_back_tensors(written.values())

    def _check_unchanged(self, model: Model, vouch_on: torch.device | None) -> None:
        """Check that the model is as it was after its first call, which may have completed it."""
        if self.state is None or not isinstance(model, nn.Module):
            return
        before, self.state = self.state, ModelState(model, vouch_on)
        difference = self.state.difference(before)
        if difference is not None:
            raise unsteady(f"{difference} changed")

    def load(self, work: Any) -> None:
        """Copy the values of work with the same key into the static tensors, after the run before,
        whatever its stream."""
        raise NotImplementedError

    def static_tensors(self) -> list[Tensor]:
        """Return the tensors that it works on."""
        raise NotImplementedError

    def _wait(self) -> None:
        """Let what comes now, on whichever stream, begin after the run before."""
        if self._fence is not None:
            self._fence.wait()

    def finish(self) -> None:
        """End a run: the host is done, the device may not be."""
        try:
            self._fence = self._backend.fence(self.static_tensors())
        finally:
            self.busy = False

    @property
    def nbytes(self) -> int:
        """Bytes of its static tensors: what it keeps apart from its model and its pool."""
        return sum(tensor.nbytes for tensor in self.static_tensors())

    def reset(self) -> None:
        """Free the graph and its memory, after what the device still does with it."""
        self._wait()
        self._graph.reset()


_here = threading.local()


def is_capturing() -> bool:
    """Return whether this thread is warming up or capturing something: what is called meanwhile is
    part of that, and replays no graph of its own."""
    return getattr(_here, "captures", 0) > 0


@contextmanager
def _begun() -> Iterator[None]:
    _here.captures = getattr(_here, "captures", 0) + 1
    try:
        yield
    finally:
        _here.captures -= 1


@contextmanager
def _no_cache_of_autocast() -> Iterator[None]:
    """Let each call cast weights anew: autocast's copies, which it frees when it ends, would be
    baked in."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def unsteady(what: str) -> UnsteadyModelError:
    """Return the error of a model that does something else in each call."""
    return UnsteadyModelError(
        f"a captured step replays one call of the model for all, so each must do the same, got {what}: run it "
        "without graphs, or keep in tensors that are changed in place what differs between calls"
    )
