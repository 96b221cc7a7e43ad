"""The sampling loop as CUDA graphs: captured once, replayed by every later call that differs in
values only.

A graph bakes in addresses, shapes and every Python number. Here everything that changes between
calls is in static tensors that the captured work reads: samples, seeds, timesteps, coefficients,
guidance scales, conditioning, known regions. What is baked in is part of the key under which a
graph is kept (``_key``), so a different value leads to a different graph, never to a stale one.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..kernels.contract import StepTable
from ..kernels.layout import DTYPES_OF_KERNELS
from ..kernels.torch_internals import forward_hooks, tree_flatten, tree_unflatten
from ..models.protocol import Model
from ..plans.plan import PlannedStep, SamplingPlan
from ..utils.checks import check_choice
from ..utils.warn import warn_caller
from .cuda_graphs import CapturedGraph, CudaGraphs, GraphBackend
from .loop import Loop, Position, Timing, model_calls, model_times

MODES = ("auto", "loop", "step", "off")
"""One graph for the whole loop, one for a step that is replayed for each, or none; "auto": "step"
where it can be."""

_LOADED = ("x_t", "seeds", "mask", "known_x0", "model_input")  # tensors of a Loop that are copied in for each call
_SCRATCH = (
    "noise",
    "known_noise",
    "x_seen",
    "x0",
    "history",
    "history_2",
)  # tensors that the steps fill


@dataclass(frozen=True)
class Job:
    """One call of ``sample``: what is to be computed, in tensors that were allocated for this call.

    Attributes:
        loop: its tensors hold x_T; its calls use the caller's conditioning.
        conditionings: that of each model call.
    """

    model: Model
    plan: SamplingPlan
    loop: Loop
    conditionings: Sequence[Mapping[str, Any]]

    @cached_property
    def table(self) -> StepTable:
        """The steps of the plan, on the host, each with its guidance scale."""
        table = self.plan.table("cpu", self.loop.guidance_scales)
        # If the guided output is rescaled, the step gets that one output, and the scale is looked
        # up before it.
        return replace(table, guided=table.guided and not self.loop.guidance_rescale)


class CapturedLoop:
    """Static tensors, and the graph that works on them."""

    def __init__(self, mode: str, job: Job, graphs: GraphBackend):
        self.busy = False
        self._mode = mode
        # Ordinary tensors, so that calls inside and outside of inference mode can share them.
        with torch.inference_mode(False), torch.no_grad():
            self._allocate(job)
        self.load(job)
        with torch.no_grad():
            graphs.warm_up(self._first_step)
            self._graph: CapturedGraph = graphs.capture(self._all_steps if mode == "loop" else self._one_step)

    def _allocate(self, job: Job) -> None:
        loop, device, mode = job.loop, job.loop.x_t.device, self._mode
        self._steps = job.plan.num_inference_steps
        self._leaves, structure = tree_flatten(list(job.conditionings))
        self._leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        conditionings = tree_unflatten(self._leaves, structure)
        tensors: dict[str, Any] = {name: _like(getattr(loop, name)) for name in (*_LOADED, *_SCRATCH)}
        self.loop = replace(
            loop,
            calls=model_calls(job.model, conditionings),
            generator=None,
            **tensors,
        )
        capacity = _capacity(mode, self._steps)
        rows = torch.zeros((capacity, job.table.rows.shape[1]), dtype=torch.float32, device=device)
        batch_size = loop.shape[0]
        self._position = Position(
            replace(job.table, rows=rows),
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.zeros((capacity, batch_size), dtype=job.plan.schedule.time_dtype, device=device),
            torch.zeros((1, batch_size), dtype=job.plan.schedule.time_dtype, device=device),
            torch.ones(batch_size, dtype=torch.float32, device=device),
        )

    @torch.no_grad()
    def load(self, job: Job) -> None:
        """Copy the values of another job with the same key into the static tensors."""
        count, device = job.plan.num_inference_steps, self.loop.x_t.device
        for name in _LOADED:
            if (static := getattr(self.loop, name)) is not None:
                static.copy_(getattr(job.loop, name))
        self.loop.generator = job.loop.generator
        self._position.table.rows[:count].copy_(job.table.rows)
        self._position.timesteps[:count].copy_(model_times(job.plan, device, job.loop.shape[0]))
        self._position.index.zero_()
        leaves, _ = tree_flatten(list(job.conditionings))
        for static, new in zip(self._leaves, leaves, strict=True):
            if isinstance(static, Tensor):
                static.copy_(new)

    def replay_step(self, step: PlannedStep, timing: Timing) -> None:
        """Replay the next step of the loop, which must be this one."""
        started = time.perf_counter()
        self.loop.draw_noise(step)
        self._replay(timing, started, 1)

    def replay_all(self, timing: Timing) -> None:
        """Replay all steps."""
        self._replay(timing, time.perf_counter(), self._steps)

    def _replay(self, timing: Timing, started: float, steps: int) -> None:
        self._graph.replay()
        timing.captured_seconds += time.perf_counter() - started
        timing.steps += steps

    def reset(self) -> None:
        """Free the graph and its memory."""
        self._graph.reset()

    def _one_step(self) -> None:
        self.loop.step_by_index(self._position)

    def _first_step(self) -> None:
        self._position.index.zero_()
        self._one_step()

    def _all_steps(self) -> None:
        self._position.index.zero_()
        for _ in range(self._steps):
            self._one_step()


class GraphCache:
    """A cache of captured loops; the least recently used are freed first.

    A graph holds its model and the memory of one call of it; ``clear`` and ``discard`` release
    them. A loop that is in use, by another thread or by the sampler that calls this callback, is
    left alone: a second one is captured. A copy or a pickle of a cache starts empty.

    Args:
        maxsize: how many graphs are kept.
        backend: returns the ``GraphBackend`` of a device.
        device_types: devices on which it captures.
    """

    def __init__(
        self,
        maxsize: int = 8,
        backend: Callable[[torch.device], GraphBackend] = CudaGraphs,
        device_types: Sequence[str] = ("cuda",),
    ):
        if maxsize < 1:
            raise ValueError(f"maxsize must be at least 1, got maxsize={maxsize}: use capture='off' for no graphs")
        self.maxsize = maxsize
        self.device_types = tuple(device_types)
        self._backend = backend
        self._captured: OrderedDict[Hashable, tuple[Model, CapturedLoop]] = OrderedDict()
        self._failed: WeakKeyDictionary[Any, set[Hashable]] = WeakKeyDictionary()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._captured)

    def __reduce__(self) -> tuple[object, ...]:
        # Graphs belong to their process and device: a copy starts without any.
        return type(self), (self.maxsize, self._backend, self.device_types)

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
        captured = self._get_or_none(mode, job) if optional else self._get(mode, job)
        try:
            yield captured
        finally:
            if captured is not None:
                captured.busy = False

    def _get(self, mode: str, job: Job) -> CapturedLoop:
        key = _key(mode, job)
        with self._lock:
            captured = self._captured[key][1] if key in self._captured else None
            if captured is not None and not captured.busy:
                self._captured.move_to_end(key)
                captured.load(job)
                captured.busy = True
                return captured
            fresh = CapturedLoop(mode, job, self._backend(job.loop.x_t.device))
            fresh.load(job)  # the warm-up has changed the samples
            fresh.busy = True
            if captured is None:
                self._captured[key] = (job.model, fresh)
                while len(self._captured) > self.maxsize:
                    _free(self._captured.popitem(last=False)[1][1])
            return fresh

    def _get_or_none(self, mode: str, job: Job) -> CapturedLoop | None:
        """Return None whatever goes wrong: an error of the model itself shows again without a
        graph."""
        failed = self._failed.setdefault(job.model, set())
        key = None
        try:
            key = _key(mode, job)
            return None if key in failed else self._get(mode, job)
        except Exception as error:
            if None not in failed:
                warn_caller(f"sampling without CUDA graphs: {error}")
            failed |= {key, None}
            return None

    def discard(self, model: Model) -> None:
        """Free every graph of this model, so that it is captured again, for instance after a change
        that graphs cannot see."""
        with self._lock:
            if isinstance(model, nn.Module):
                self._failed.pop(model, None)
            for key in [key for key, (owner, _) in self._captured.items() if owner is model]:
                _free(self._captured.pop(key)[1])

    def clear(self) -> None:
        """Free every graph."""
        with self._lock:
            self._failed.clear()
            while self._captured:
                _free(self._captured.popitem()[1][1])


def _free(captured: CapturedLoop) -> None:
    """Free a graph now, or if it is in use, when its run ends."""
    if not captured.busy:
        captured.reset()


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


def _capacity(mode: str, steps: int) -> int:
    """Return the rows of a captured table: the graph of a step serves up to so many steps, that of
    a loop exactly its own number."""
    return steps if mode == "loop" else max(64, 1 << (steps - 1).bit_length())


def _like(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.empty_like(tensor)


def _key(mode: str, job: Job) -> Hashable:
    """Return everything that a graph bakes in."""
    loop = job.loop
    leaves, structure = tree_flatten(list(job.conditionings))
    return (
        mode,
        _capacity(mode, job.plan.num_inference_steps),
        _model_key(job.model),
        *(_tensor_key(getattr(loop, name)) for name in (*_LOADED, *_SCRATCH)),
        len(loop.calls),
        loop.thresholding,
        loop.normals,
        (job.table.clipped, job.table.adds_noise, loop.mask is not None and job.table.adds_known_noise),
        loop.guidance_rescale,
        str(structure),
        tuple(_leaf_key(leaf) for leaf in leaves),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        _precisions(),
    )


def _precisions() -> Hashable:
    """Return what decides which kernels torch chooses for matrix products and convolutions."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn, getattr(torch.backends.cudnn, "conv", None))
    chosen = [getattr(backend, "fp32_precision", None) for backend in backends]
    if chosen[0] is None:  # torch before 2.9
        chosen = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
    return (*chosen, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)


def _model_key(model: Model) -> Hashable:
    """Return the model and, for a module, what a replay would not follow as far as it can be seen.

    That is where its weights are (weights changed in place are followed, moved ones are not), its
    modules, their hooks, training mode and plain attributes. The model of a graph is kept alive, so
    an id is not reused.
    """
    if not isinstance(model, nn.Module):
        return id(model)
    weights = tuple(_place(t) for t in (*model.parameters(), *model.buffers()))
    return id(model), weights, tuple(_module_key(module) for module in model.modules())


def _module_key(module: nn.Module) -> Hashable:
    hooks = tuple(map(id, forward_hooks(module)))
    attributes = []
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            attributes.append((name, _place(value)))
        elif isinstance(value, _PLAIN) and not name.startswith("_"):
            attributes.append((name, _plain_key(value)))
    return id(module), type(module), module.training, hooks, tuple(attributes)


def _place(tensor: Tensor) -> Hashable:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _tensor_key(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)


def _plain_key(value: Any) -> Hashable:
    """Return a key that differs between True and 1 and between 0.0 and -0.0, and is the same for
    every NaN."""
    return type(value), value.hex() if isinstance(value, float) else value


def _leaf_key(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return _tensor_key(leaf)
    if not isinstance(leaf, _PLAIN):
        raise TypeError(
            "conditioning of a captured graph must be tensors and plain values (numbers, strings, None), got a "
            f"{type(leaf).__name__}: pass a tensor, or use capture='off'"
        )
    return _plain_key(leaf)
