"""A stand-in for CUDA graphs on the CPU, which replays with pointers and numbers frozen.

``RecordedGraph`` records the operators of one call of a function and runs them again on the same
memory. As in a CUDA graph ("CUDA Graphs" in the CUDA C++ programming guide and in PyTorch's notes
on CUDA semantics):

- Addresses are frozen. Memory that existed before belongs to the caller, who must keep it: a replay
  that finds it freed or moved raises, where a GPU would read or write whatever lies there. Memory
  made during the capture lives as long as the graph.
- Numbers are frozen. A step's index, a coefficient or a seed that Python passes keeps its value
  from the capture in every replay, and an ``if`` its branch.
- The capture itself changes nothing: memory that it wrote to and the default generator are as
  before, and memory that it made holds nothing yet (every byte of it is 255). Each replay draws new
  random numbers.
- What a capture refuses is refused, as far as operators on CPU tensors show it; ``FakeCuda`` sees
  the rest.

Triton kernels are recorded (they run on the CPU with TRITON_INTERPRET=1). Others that are launched
outside torch's dispatcher are recorded by their launcher: a list in the launcher's module is looked
at before each launch, and while it holds something,
``launchers[-1](function, *arguments, **options)`` is called instead of
``function(*arguments, **options)``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..sampling.cuda_graphs import WARM_UP_CALLS, CaptureError
from .fake_cuda import (
    HOST_METHODS,
    OWN_NAMESPACE,
    PYTHON_DATA,
    UNINITIALIZED,
    NotCapturable,
    Refusal,
    function_name,
    generator_refusal,
    hook_triton,
    tensors_in,
    user_line,
    waiting_refusal,
    written_tensors,
)
from .recorded_pool import RecordedPool
from .torch_internals import TorchDispatchMode, WeakStorage, schema_of, storage_key, tree_map_only

_NEVER_WRITTEN = 255


class ReplayError(RuntimeError):
    """A graph cannot be replayed: memory that it works on is gone, or it was reset."""


class _Memory:
    """One storage at the address that it had.

    It is kept alive if the graph made it, and only watched if it is the caller's. Of memory that
    graphs share, ``shared`` is kept, so that ``storage`` is free when nobody else holds it.
    """

    def __init__(self, storage: torch.UntypedStorage, made_here: bool, shared: torch.UntypedStorage | None = None):
        self._weak = WeakStorage(storage)
        self._kept = (storage if shared is None else shared) if made_here else None
        self._recording: torch.UntypedStorage | None = storage
        self._address, self._size = storage.data_ptr(), storage.nbytes()
        self._before: torch.UntypedStorage | None = None
        self._made_here = made_here

    def keep(self) -> None:
        """Keep the storage alive, with its contents."""
        self._kept = self._recording

    def about_to_be_written(self) -> None:
        """Save the contents, the first time."""
        if not self._made_here and self._before is None and self._recording is not None:
            self._before = self._recording.clone()

    def end_recording(self) -> None:
        """Undo what the recording wrote, and release the caller's memory."""
        if self._recording is not None and self._made_here:
            torch.empty(0, dtype=torch.uint8, device="cpu").set_(self._recording).fill_(_NEVER_WRITTEN)
        elif self._recording is not None and self._before is not None:
            self._recording.copy_(self._before)
        self._recording = self._before = None

    def storage(self) -> torch.UntypedStorage:
        if self._kept is not None:
            return self._kept
        alive = self._weak.get()
        if alive is None or alive.data_ptr() != self._address or alive.nbytes() != self._size:
            raise ReplayError(
                "a graph works on the memory that it saw at capture, so the caller must keep it, got "
                f"{self._size} bytes that were freed or moved since: hold the tensor, and change it in place"
            )
        return alive


@dataclass(frozen=True)
class _Frozen:
    """A tensor as a kernel sees it: an address and a layout."""

    memory: _Memory
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device="cpu").set_(
            self.memory.storage(), self.offset, self.size, self.stride
        )


@dataclass(frozen=True)
class _Node:
    """One launch: runs ``function``, and copies its new results to where they were at capture."""

    name: str
    function: Callable
    args: Any
    kwargs: Any
    results: tuple[tuple[int, _Frozen], ...]  # which of the resulting tensors, and its place

    def run(self) -> None:
        args, kwargs = tree_map_only(_Frozen, _Frozen.tensor, (self.args, self.kwargs))
        result = self.function(*args, **kwargs)
        if not self.results:
            return
        tensors = tensors_in(result)
        for index, place in self.results:
            place.tensor().copy_(tensors[index])


class RecordedGraph:
    """A recording of one call of a function, made by ``Replay.capture`` or by hand:

        graph = RecordedGraph()
        with graph.recording():
            output = function()
        graph.replay()

    Args:
        launchers: Lists of launchers outside the dispatcher, see the module.
        generators: Generators registered with the graph, beside the default one.
        pool: Where its memory is; None: memory of its own.

    Attributes:
        output: What the function returned to ``Replay.capture``.
        paused: Whether what is dispatched now belongs to a launch that is recorded as a whole.
    """

    def __init__(
        self,
        launchers: Sequence[list[Callable]] = (),
        generators: Sequence[torch.Generator] = (),
        pool: RecordedPool | None = None,
    ):
        self._launchers = launchers
        self._generators = tuple(generators)
        self._pool = pool
        self._nodes: list[_Node] | None = None
        self._memories: dict[int, _Memory] = {}
        self._active = False
        self.output: Any = None
        self.paused = False

    @property
    def launches(self) -> tuple[str, ...]:
        """The names of what a replay launches, in order.

        They are operators such as "aten::add_.Tensor", and functions given to ``record_call``.
        """
        return tuple(node.name for node in self._nodes or ())

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record what happens inside.

        It runs, and is undone at the end, since on a GPU it would not have run.

        Raises:
            RuntimeError: the graph has a recording already.
            NotCapturable: an operation that a capture refuses.
            TypeError: a tensor that is no dense memory of the CPU.
        """
        if self._nodes is not None:
            raise RuntimeError("a graph holds one recording, got a second: make a new RecordedGraph for it")
        if self._pool is not None:
            self._pool.enter()
        states = [(generator, generator.get_state()) for generator in (torch.default_generator, *self._generators)]
        self._nodes = []
        finished = False
        try:
            with contextlib.ExitStack() as stack:
                for launchers in self._launchers:
                    launchers.append(self.record_call)
                    stack.callback(launchers.remove, self.record_call)
                hook_triton(stack, self._launch)
                stack.enter_context(_Functions(self))
                stack.enter_context(_Operators(self))
                self._active = True
                yield
            finished = True
        finally:
            for memory in self._memories.values():
                memory.end_recording()
            self._memories, self._active = {}, False
            for generator, state in states:
                generator.set_state(state)
            if not finished:
                self.reset()

    def record_call(self, function: Callable, /, *arguments: Any, **options: Any) -> None:
        """Run a function outside the dispatcher, now and in each replay with the same memory and
        numbers.

        Arguments may be nested. Tensors must be given as tensors: an address taken from one would
        be frozen without keeping it alive. What the function launches is not recorded separately,
        and it must write into tensors among its arguments.

        Raises:
            RuntimeError: nothing is being recorded.
            TypeError: it returned a tensor, or an argument is a tensor that is no dense memory of
                the CPU.
        """
        self._launch(f"{OWN_NAMESPACE}::{function_name(function)}", function, arguments, options)

    def _launch(self, name: str, function: Callable, arguments: tuple, options: dict) -> None:
        if not self._active:
            raise RuntimeError(f"a launch is recorded inside recording(), got {name} outside: call the function itself")
        if self.paused:  # part of a launch that is being recorded
            function(*arguments, **options)
            return
        self.paused = True
        try:
            frozen_args, frozen_kwargs = tree_map_only(Tensor, self._freeze, (arguments, options))
            for tensor in tensors_in(arguments, options):
                self._memory(tensor).about_to_be_written()
            result = function(*arguments, **options)
        finally:
            self.paused = False
        if tensors_in(result):
            raise TypeError(
                f"a recorded launch writes into tensors that it is given, got {name}, which returned a tensor: pass it "
                "the tensor to write to"
            )
        self._add(_Node(name, function, frozen_args, frozen_kwargs, ()))

    def _add(self, node: _Node) -> None:
        assert self._nodes is not None, "launches are recorded between the start and the end of a recording"
        self._nodes.append(node)

    def replay(self) -> None:
        """Run what was recorded.

        Raises:
            ReplayError: memory of the caller's that it works on is gone or was moved, or there is
                nothing to replay.
        """
        if self._nodes is None:
            raise ReplayError("a graph is replayed between its capture and its reset, got one with nothing captured")
        with torch.inference_mode():
            for node in self._nodes:
                node.run()

    def replaying(self) -> Iterator[str]:
        """Replay launch by launch, each when the next is asked for; what others do between them
        comes between them, as on a GPU with several streams."""
        for node in self._nodes or ():
            with torch.inference_mode():
                node.run()
            yield node.name

    def reset(self) -> None:
        """Drop the recording and free its memory."""
        if self._nodes is not None and self._pool is not None:
            self._pool.leave()
        self._nodes, self.output = None, None

    def _memory(self, tensor: Tensor, made_here: bool = False) -> _Memory:
        storage = tensor.untyped_storage()
        memory = self._memories.get(storage_key(storage))
        if memory is None:
            memory = self._memories[storage_key(storage)] = _Memory(storage, made_here)
        return memory

    def _move(self, tensors: list[Tensor], pool: RecordedPool) -> None:
        """Move new tensors to memory of the pool."""
        moved: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if not storage.nbytes():
                continue
            if storage_key(storage) not in moved:
                given, shared = pool.take(storage.nbytes())
                moved[storage_key(storage)] = given.copy_(storage)
                self._memories[storage_key(given)] = _Memory(given, True, shared)
            size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset()
            tensor.set_(moved[storage_key(storage)], offset, size, stride)

    def _freeze(self, tensor: Tensor, made_here: bool = False) -> _Frozen:
        _check_dense(tensor)
        memory, offset = self._memory(tensor, made_here), int(tensor.storage_offset())
        return _Frozen(memory, tensor.dtype, tuple(tensor.size()), tuple(tensor.stride()), offset)

    def _dispatch(self, mode: TorchDispatchMode, func, args: tuple, kwargs: dict) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "prim":
            return func(*args, **kwargs)
        refusal = waiting_refusal(func, args, kwargs)
        if refusal is None:
            with mode:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            refusal = generator_refusal(args, kwargs, self._generators, "nowhere")
            if name == "lift_fresh" and not _is_literal(args[0]):
                refusal = PYTHON_DATA
        if refusal is not None:
            raise NotCapturable(func.name(), refusal, _running(), user_line())
        frozen_args, frozen_kwargs = tree_map_only(Tensor, self._freeze, (args, kwargs))
        for tensor in written_tensors(func, args, kwargs):
            self._memory(tensor).about_to_be_written()
        before = {storage_key(t.untyped_storage()) for t in tensors_in(args, kwargs)}
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        for tensor in outputs:
            _check_dense(tensor)
        new = [i for i, t in enumerate(outputs) if storage_key(t.untyped_storage()) not in before]
        if self._pool is not None:
            self._move([outputs[i] for i in new], self._pool)
        places = tuple((i, self._freeze(outputs[i], made_here=True)) for i in new)
        writes = any(argument.alias_info and argument.alias_info.is_write for argument in schema_of(func).arguments)
        if name == "lift_fresh":
            self._memory(outputs[0]).keep()  # a constant
        elif (new and name not in UNINITIALIZED) or writes or not outputs:
            self._add(_Node(func.name(), func, frozen_args, frozen_kwargs, places))
        return result


def _check_dense(tensor: Tensor) -> None:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
        raise TypeError(
            "a graph is recorded of dense tensors on the CPU, which stand for those of the device, got one of layout "
            f"{tensor.layout} on {tensor.device}: capture a function of dense tensors"
        )


_functions: list[Any] = []  # the public function that is running


def _running() -> str:
    return torch.overrides.resolve_name(_functions[-1]) or "" if _functions else ""


def _is_literal(tensor: Tensor) -> bool:
    """Return whether a lifted tensor is the 2.0 of ``x[i] = 2.0``."""
    return tensor.dim() == 0 and bool(_functions) and getattr(_functions[-1], "__name__", "") == "__setitem__"


class _Operators(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph):
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._graph.paused:
            return func(*args, **(kwargs or {}))
        return self._graph._dispatch(self, func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """A mode that knows which public function runs, and refuses those that read without an
    operator."""

    def __init__(self, graph: RecordedGraph):
        super().__init__()
        self._graph = graph

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self._graph.paused:
            return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        what = HOST_METHODS.get(name) or ("copies from device to host" if name == "cpu" else None)
        if what is not None and args and isinstance(args[0], Tensor):
            kind = "copy" if name == "cpu" else "sync"
            refusal = Refusal(kind, "never waits for the device", what, "call it before or after the loop")
            raise NotCapturable(f"Tensor.{name}", refusal, "", user_line())
        _functions.append(func)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            _functions.pop()


class Replay:
    """A stand-in for CUDA graphs: a ``ddim_fast.sampling.cuda_graphs.GraphBackend`` on the CPU.

        graph = Replay().capture(function)
        graph.replay()

    Args:
        launchers, generators: See ``RecordedGraph``.
    """

    def __init__(self, launchers: Sequence[list[Callable]] = (), generators: Sequence[torch.Generator] = ()):
        self._launchers, self._generators = launchers, generators

    def warm_up(self, function: Callable[[], Any], times: int = WARM_UP_CALLS) -> None:
        with torch.random.fork_rng(devices=[]):  # as CudaGraphs does
            for _ in range(times):
                function()

    def fence(self, tensors: Sequence[Tensor]) -> None:
        """Return None: a replay is done when it returns."""

    def new_pool(self) -> RecordedPool:
        return RecordedPool()

    def capture(self, function: Callable[[], Any], pool: RecordedPool | None = None) -> RecordedGraph:
        """Record one call. Afterwards nothing has changed but Python's own state.

        Raises:
            CaptureError: an operation that a capture refuses (as ``NotCapturable``, which names
                it), or ``function`` raised.
        """
        graph = RecordedGraph(self._launchers, self._generators, pool)
        try:
            with graph.recording():
                graph.output = function()
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                f"what is captured must run through, got {type(error).__name__}: {error}: fix it outside of a capture first"
            ) from error
        return graph


RecordedGraphs = Replay
"""The name of ``Replay`` in 0.1."""
