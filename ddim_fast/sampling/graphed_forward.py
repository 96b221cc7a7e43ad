"""A module whose calls are replays: in the slot of its forward, one graph for each signature."""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.torch_internals import compiled_by, operators_are_watched, takes_forward_derivatives
from ..utils.warn import warn_caller
from .capture import GraphCache
from .captured import InUseError, is_capturing
from .captured_call import Call
from .cuda_graphs import CaptureError
from .forward_slot import KeptForward, what_is_below
from .static_tensors import is_plain

UNUSED_GRAPHS = 4
"""How many captures in a row that differ in Python's numbers alone may be of no use to a second
call, before calls with yet other numbers do without."""


@dataclass(frozen=True)
class ForwardStats:
    """What a ``GraphedForward`` keeps and did.

    Attributes:
        graphs, nbytes: how many graphs it has, and the bytes of their arguments and outputs. What
            they compute in is shared with the other graphs of their cache, whose ``stats()`` count
            it.
        hits, misses: calls that were replays of what was there, and calls that were captured.
        fallbacks: calls that ran without a graph, by the reason.
    """

    graphs: int = 0
    nbytes: int = 0
    hits: int = 0
    misses: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)


class GraphedForward(KeptForward):
    """The forward of a module, as replays of CUDA graphs.

    Args:
        graphs: where they are kept.
        name: what the module is called in warnings.
        strict: raise ``CaptureError`` where a call would run without a graph.
        vouched: whether the caller vouches for what cannot be vouched for.
        arranged: called with the arguments; returns those that the module is captured with, which
            lead to the same result.
        context: returns what else decides what the module computes.

    Attributes:
        is_open: whether it has not been restored.
    """

    __slots__ = (
        "_arranged",
        "_context",
        "_counts",
        "_graphs",
        "_lock",
        "_name",
        "_names",
        "_reasons",
        "_strict",
        "_told",
        "_unused",
        "_vouched",
        "is_open",
    )  # fmt: skip

    def __init__(
        self,
        module: nn.Module,
        graphs: GraphCache,
        name: str,
        strict: bool = False,
        vouched: bool = False,
        arranged: Callable[[tuple, dict[str, Any]], tuple[tuple, dict[str, Any]]] | None = None,
        context: Callable[[], Hashable] = lambda: None,
    ):
        super().__init__(module, what_is_below(module))
        self._graphs, self._name, self._strict, self._vouched = graphs, name, strict, vouched
        self._arranged, self._context = arranged, context
        self._names = _positional_names(self.eager)
        self.is_open = True
        self._lock = threading.Lock()  # of what follows
        self._begin()

    def _begin(self) -> None:
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._told: set[Hashable] = set()
        self._unused = _UnusedGraphs()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Inside of another's trace or capture, it is part of that.
        if torch.compiler.is_compiling() or not self.is_open or is_capturing() or _is_recorded():
            return self.run(*args, **kwargs)
        arguments = (args, kwargs) if self._arranged is None else self._arranged(args, kwargs)
        call = Call(self.module, self.run, *arguments, self._names, self._context(), self._refused)
        obstacle = self._obstacle(call)
        if obstacle is not None:
            self._refused(call, obstacle, None)
            return self.run(*args, **kwargs)
        with self._graphs.use(call, optional=True, vouch=not self._vouched) as captured:
            with self._lock:
                if captured is not None or call.captures:
                    self._unused.note(call)
                if captured is not None:
                    self._counts["misses" if call.captures else "hits"] += 1
            if call.captures and not self.is_open:  # another thread restored it meanwhile
                self._graphs.discard(self.module)
            if captured is not None:
                return captured.replay()
        return self.run(*args, **kwargs)

    def _obstacle(self, call: Call) -> str | None:
        """Return why this call cannot be a replay, whatever the module's state is; None if it
        can."""
        if not self.is_in_place():
            return (
                "hooks that replace a forward come before its graphs, got one that was replaced afterwards, as hooks that move weights "
                "do: take them away, or make the graphs after them"
            )
        compiler = compiled_by(self.module)
        if compiler is not None and "forward" not in compiler.attributes:
            return (
                "a compiled module has its graphs outside of what is compiled, got one compiled in place: compile its blocks, or "
                "replace it by torch.compile(module)"
            )
        types = self._graphs.device_types
        if call.device.type not in types:
            return f"graphs are made on {' and '.join(types)}, got arguments on {call.device}"
        if torch.is_grad_enabled() and self._takes_gradients(call):
            return "a replay records no gradients, got a call that requires some: call it under torch.no_grad()"
        if takes_forward_derivatives(call.tensors):
            return "a replay records no gradients, got a call in which forward-mode derivatives are taken"
        if not all(map(is_plain, call.tensors)):
            named = ((name, leaf) for name, leaf in call.named_leaves if isinstance(leaf, Tensor))
            name, leaf = next((name, leaf) for name, leaf in named if not is_plain(leaf))
            return (
                f"arguments must be plain, dense tensors, got {name} of type {type(leaf).__qualname__}, {leaf.layout}"
            )
        try:
            _ = call.signature
        except TypeError as error:
            return str(error)
        with self._lock:
            return self._unused.reason(call)

    def _takes_gradients(self, call: Call) -> bool:
        return any(tensor.requires_grad for tensor in (*call.tensors, *self.module.parameters()))

    def _refused(self, call: Call, reason: str, error: Exception | None) -> None:
        """Count a call without a graph, and say why, once for a signature and a reason.

        Raises:
            CaptureError: ``strict`` was asked for.
        """
        with self._lock:
            self._reasons[reason] += 1
        if isinstance(error, InUseError):  # by another thread: nothing is wrong
            return
        kind = reason, call.shape
        with self._lock:
            is_new = kind not in self._told
            self._told.add(kind)
        if self._strict or is_new:
            message = f"{self._name} without CUDA graphs, for {call}: {reason}"
            if self._strict:
                raise CaptureError(message) from error
            warn_caller(message)

    def stats(self) -> ForwardStats:
        """Return what is kept, and what has happened since it was made or cleared."""
        graphs, nbytes = self._graphs.size_of(self.module)
        with self._lock:
            return ForwardStats(graphs, nbytes, self._counts["hits"], self._counts["misses"], dict(self._reasons))

    def clear(self) -> None:
        """Free every graph, and forget what was refused: calls are captured anew."""
        self._graphs.discard(self.module)
        with self._lock:
            self._begin()

    def restore(self) -> None:
        """Free every graph, and give the slot back. Where something else stands before it by now,
        it stays below that, and does nothing."""
        self.is_open = False
        self.take_away()
        self._graphs.discard(self.module)


class _UnusedGraphs:
    """Captures that were of no use to a second call, by families of calls that differ in Python's
    numbers alone."""

    def __init__(self) -> None:
        self._families: dict[Hashable, list[dict[str, Any]]] = {}
        self._useful: set[Hashable] = set()
        self._reasons: dict[Hashable, str] = {}

    def note(self, call: Call) -> None:
        """Note whether a call was captured, or was a replay."""
        if call.captures:
            self._families.setdefault(call.signature_without_numbers, []).append(call.numbers)
        elif call.signature not in self._useful:
            self._useful.add(call.signature)
            self._families.pop(call.signature_without_numbers, None)

    def reason(self, call: Call) -> str | None:
        """Return why a call is not worth a capture; None if it may be."""
        if not self._families:
            return None
        family = self._families.get(call.signature_without_numbers, [])
        if len(family) < UNUSED_GRAPHS or call.numbers in family or call.signature in self._useful:
            return None
        if call.signature_without_numbers not in self._reasons:
            seen = [*family, call.numbers]
            differ = [name for name in seen[0] if len({repr(numbers[name]) for numbers in seen}) > 1]
            shown = "; ".join(f"{name} = {', '.join(repr(numbers[name]) for numbers in seen)}" for name in differ)
            self._reasons[call.signature_without_numbers] = (
                "a number is a constant of its graph, so one that differs from call to call must be a tensor on the device, got "
                f"{shown}, and no graph that was used twice"
            )
        return self._reasons[call.signature_without_numbers]


def _is_recorded() -> bool:
    """Return whether somebody else traces, watches or captures what is called now."""
    return (
        torch.jit.is_tracing()
        or operators_are_watched()
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def _positional_names(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)
