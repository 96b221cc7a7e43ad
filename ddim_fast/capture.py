"""The sampling loop as CUDA graphs: captured once, replayed by every later call that differs in values only.

A graph bakes in addresses, shapes and every Python number. Here all that changes between calls lies in static tensors that the
captured work reads: samples, seeds, timesteps, coefficients, guidance scale, conditioning. What is baked in is part of the key under
which a graph is kept (``_key``), so that another value of it means another graph, never a stale one.
"""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .graphs import CapturedGraph, CaptureError, CudaGraphs, GraphBackend
from .kernels.layout import DTYPES_OF_KERNELS
from .loop import Loop, Position, Timing, model_calls
from .models import Model
from .plan import PlannedStep, SamplingPlan

MODES = ("auto", "loop", "step", "off")
"""One graph for the whole loop, one for a step that is replayed for each, or none; "auto": "step" where it can be."""


@dataclass(frozen=True)
class Job:
    """One call of ``sample``: what is to be computed, in tensors that were made for this call.

    Attributes:
        loop: its tensors hold the start, x_T; its calls are those of the caller's conditioning.
        conditionings: of each model call.
    """

    model: Model
    plan: SamplingPlan
    loop: Loop
    conditionings: Sequence[Mapping[str, Any]]


class CapturedLoop:
    """Static tensors and the graph that works on them."""

    def __init__(self, mode: str, job: Job, graphs: GraphBackend):
        loop, device = job.loop, job.loop.x_t.device
        self._mode = mode
        self._steps = job.plan.num_inference_steps
        self._leaves, structure = tree_flatten(list(job.conditionings))
        self._leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        conditionings = tree_unflatten(self._leaves, structure)
        self.loop = replace(
            loop,
            calls=model_calls(job.model, conditionings),
            generator=None,
            **{name: _like(getattr(loop, name)) for name in ("x_t", "seeds", "noise", "model_input", "x_seen", "x0")},
        )
        capacity = _capacity(mode, self._steps)
        table = job.plan.table(device)
        rows = torch.zeros((capacity, table.rows.shape[1]), dtype=torch.float32, device=device)
        batch_size = loop.shape[0]
        self._position = Position(
            replace(table, rows=rows),
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.zeros((capacity, batch_size), dtype=torch.int64, device=device),
            torch.zeros((1, batch_size), dtype=torch.int64, device=device),
        )
        self.load(job)
        with torch.inference_mode():
            graphs.warm_up(self._first_step)
            self._graph: CapturedGraph = graphs.capture(self._all_steps if mode == "loop" else self._one_step)

    def load(self, job: Job) -> None:
        """Make the static tensors those of another job, which has the same key."""
        count, device = job.plan.num_inference_steps, self.loop.x_t.device
        self.loop.x_t.copy_(job.loop.x_t)
        if self.loop.seeds is not None:
            self.loop.seeds.copy_(job.loop.seeds)
        self.loop.generator = job.loop.generator
        self._position.table.rows[:count].copy_(job.plan.table("cpu", job.loop.guidance_scale).rows)
        timesteps = torch.tensor(job.plan.timesteps)[:, None]
        self._position.timesteps[:count].copy_(timesteps.to(device).expand(-1, job.loop.shape[0]))
        self._position.index.zero_()
        leaves, _ = tree_flatten(list(job.conditionings))
        for static, new in zip(self._leaves, leaves, strict=True):
            if isinstance(static, Tensor):
                static.copy_(new)

    def replay_step(self, step: PlannedStep, timing: Timing) -> None:
        """The next step of the loop, which is this one."""
        started = time.perf_counter()
        if step.std_dev_t > 0:
            self.loop.draw_noise()
        self._replay(timing, started, 1)

    def replay_all(self, timing: Timing) -> None:
        """All steps."""
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
    """Captured loops, the latest used last; the earliest used are freed first.

    A graph holds its model and the memory of one call of it. ``clear`` and ``discard`` let go of them.

    Args:
        maxsize: how many graphs are kept.
        backend: makes what captures on a device.
        device_types: devices on which it does.
    """

    def __init__(
        self,
        maxsize: int = 8,
        backend: Callable[[torch.device], GraphBackend] = CudaGraphs,
        device_types: Sequence[str] = ("cuda",),
    ):
        if maxsize < 1:
            raise ValueError(f"a cache keeps at least one graph, got maxsize={maxsize}: use capture='off' for none")
        self.maxsize = maxsize
        self.device_types = tuple(device_types)
        self._backend = backend
        self._captured: OrderedDict[Hashable, tuple[Model, CapturedLoop]] = OrderedDict()
        self._failed: set[int] = set()

    def __len__(self) -> int:
        return len(self._captured)

    def get(self, mode: str, job: Job) -> CapturedLoop:
        """The captured loop for this job, with the job's values loaded; captured now if there is none.

        Raises:
            CaptureError: the model cannot be captured.
        """
        key = _key(mode, job)
        if key in self._captured:
            self._captured.move_to_end(key)
            captured = self._captured[key][1]
            captured.load(job)
            return captured
        captured = CapturedLoop(mode, job, self._backend(job.loop.x_t.device))
        captured.load(job)  # the warm-up has changed the samples
        self._captured[key] = (job.model, captured)
        while len(self._captured) > self.maxsize:
            self._captured.popitem(last=False)[1][1].reset()
        return captured

    def get_or_none(self, mode: str, job: Job) -> CapturedLoop | None:
        """``get``, or None with one warning for each model that cannot be captured."""
        if id(job.model) in self._failed:
            return None
        try:
            return self.get(mode, job)
        except CaptureError as error:
            self._failed.add(id(job.model))
            warnings.warn(f"sampling without CUDA graphs: {error}", stacklevel=3)
            return None

    def discard(self, model: Model) -> None:
        """Free every graph of this model, and let it be captured again, for instance after a change that graphs cannot see."""
        self._failed.discard(id(model))
        for key in [key for key, (owner, _) in self._captured.items() if owner is model]:
            self._captured.pop(key)[1].reset()

    def clear(self) -> None:
        """Free every graph."""
        self._failed.clear()
        while self._captured:
            self._captured.popitem()[1][1].reset()


GRAPHS = GraphCache()
"""The graphs of every sampler that was not given a cache of its own."""


def choose_mode(
    capture: str,
    cache: GraphCache,
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None,
    between_steps: str | None,
) -> str:
    """The mode to sample in: "loop", "step" or "off".

    Args:
        between_steps: what the host has to do between two steps, in words; None for nothing.

    Raises:
        ValueError: the mode asked for is unknown, or cannot be; the message has the reason.
    """
    if capture not in MODES:
        raise ValueError(f"capture must be one of {', '.join(MODES)}, got {capture!r}")
    reason = None
    if device.type not in cache.device_types:
        reason = f"it needs a CUDA device, and the samples are on {device}"
    elif dtype not in DTYPES_OF_KERNELS:
        reason = f"its kernel takes float32, float16 and bfloat16, and the samples are {dtype}"
    elif backend not in (None, "triton"):
        reason = f"it is the Triton kernel that is captured, and backend={backend!r} was asked for"
    if capture in ("loop", "step") and reason is not None:
        raise ValueError(f"capture={capture!r} cannot be used: {reason}; use capture='off', or 'auto'")
    if capture == "loop" and between_steps is not None:
        raise ValueError(
            f"capture='loop' runs all steps as one launch, so the host cannot come between them, got {between_steps}: "
            "use capture='step'"
        )
    if reason is not None or capture == "off":
        return "off"
    return "step" if capture == "auto" else capture


def _capacity(mode: str, steps: int) -> int:
    """Rows of a captured table: a step's graph serves any number of steps up to it, a loop's graph has its number baked in."""
    return steps if mode == "loop" else max(64, 1 << (steps - 1).bit_length())


def _like(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.empty_like(tensor)


def _key(mode: str, job: Job) -> Hashable:
    """Everything that a graph bakes in."""
    loop, table = job.loop, job.plan.table()
    leaves, structure = tree_flatten(list(job.conditionings))
    return (
        mode,
        _capacity(mode, job.plan.num_inference_steps),
        _model_key(job.model),
        *(_tensor_key(getattr(loop, name)) for name in ("x_t", "seeds", "noise", "model_input", "x_seen", "x0")),
        len(loop.calls),
        loop.thresholding,
        loop.normals,
        (table.clipped, table.adds_noise),
        str(structure),
        tuple(_leaf_key(leaf) for leaf in leaves),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(),
    )


def _model_key(model: Model) -> Hashable:
    """The model and, of a module, where its weights are and whether it is in training: a replay reads the same addresses.

    Weights changed in place are seen by a replay; weights put elsewhere (``.to()``, ``.half()``, a new adapter) mean another graph.
    """
    if not isinstance(model, nn.Module):
        return id(model)
    weights = tuple(t.data_ptr() for t in (*model.parameters(), *model.buffers()))
    return id(model), weights, tuple(module.training for module in model.modules())


def _tensor_key(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def _leaf_key(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return _tensor_key(leaf)
    try:
        hash(leaf)
    except TypeError:
        raise TypeError(
            "conditioning that is not a tensor is baked into a captured graph, so it must be hashable, got a "
            f"{type(leaf).__name__}: pass a tensor, or use capture='off'"
        ) from None
    return type(leaf), leaf
