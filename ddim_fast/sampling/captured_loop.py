"""One run of the sampler as a CUDA graph: static tensors, and the graph that works on them.

A graph bakes in addresses, shapes and every Python number. Here everything that changes between
calls is in static tensors that the captured work reads: samples, seeds, timesteps, coefficients,
guidance scales, conditioning, known regions.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..kernels.contract import StepTable
from ..kernels.thresholding import thresholds_workspace
from ..kernels.torch_internals import tree_flatten, tree_unflatten
from ..models.protocol import Model
from ..plans.plan import PlannedStep, SamplingPlan
from ..utils.transfer import to_device
from ..utils.warn import warn_caller
from .captured import Captured
from .cuda_graphs import GraphBackend, MemoryPool
from .graph_key import first_places, leaf_key, tensor_key
from .loop import Loop, Position, Timing, begins_steps, model_calls
from .model_times import model_times
from .static_tensors import fill_leaves, static_leaves

LOADED = ("x_t", "seeds", "mask", "known_x0", "model_input")  # tensors of a Loop that are copied in for each call
SCRATCH = (
    "noise",
    "known_noise",
    "x_seen",
    "x0",
    "history",
    "history_2",
    "log_prob",
)  # tensors that the steps fill
_PLANS = 8
"""How many plans a graph keeps on its device, beside the one that it runs."""
_NOTHING: tuple[list[Any], Any] = tree_flatten({})
_tensors_of = attrgetter(*LOADED, *SCRATCH)


@dataclass(frozen=True, eq=False)
class Job:
    """One call of ``sample``: what is to be computed, in tensors that were allocated for this call.

    Attributes:
        mode: "loop" or "step"; "off" for a run that is not captured.
        loop: its tensors hold x_T; its calls use the caller's conditioning.
        conditionings: that of each model call.
        seeds: ``(B,)`` int64, of the samples; None where no noise comes from seeds.
    """

    mode: str
    model: Model
    plan: SamplingPlan
    loop: Loop
    conditionings: Sequence[Mapping[str, Any]]
    seeds: Tensor | None = None

    is_brief = False

    @property
    def device(self) -> torch.device:
        """The device of the samples."""
        return self.loop.x_t.device

    @cached_property
    def flattened(self) -> list[tuple[list[Any], Any]]:
        """The conditioning of each model call: its tensors and values, and the containers that hold
        them."""
        return [tree_flatten(each) if each else _NOTHING for each in self.conditionings]

    @property
    def leaves(self) -> list[Any]:
        """All tensors and values of the conditioning."""
        return [leaf for leaves, _ in self.flattened for leaf in leaves]

    @property
    def structure(self) -> Hashable:
        """The containers, and which of the tensors of one call are one."""
        return tuple([each is _NOTHING or (str(each[1]), first_places(each[0])) for each in self.flattened])

    @cached_property
    def table(self) -> StepTable:
        """The steps of the plan, on the host, each with its guidance scale."""
        loop = self.loop
        keeps_log_prob = loop.log_prob is not None
        table = self.plan.table("cpu", loop.guidance_scales, loop.density.min_std, skip_quiet=keeps_log_prob)
        # If the guided output is rescaled, the step gets that one output, and the scale is looked
        # up before it.
        return replace(table, guided=table.guided and not loop.guidance_rescale)

    def key(self) -> Hashable:
        """Return what a graph bakes in of this call, apart from its model.

        Raises:
            TypeError: a conditioning entry is neither a tensor on the device nor a plain value.
        """
        loop, plan = self.loop, self.plan
        return (
            self.mode,
            capacity(self.mode, plan.num_inference_steps),
            *[None if tensor is None else tensor_key(tensor) for tensor in _tensors_of(loop)],
            len(loop.calls),
            loop.thresholding,
            loop.normals,
            (plan.steps[0].coefficients.clipped, plan.adds_noise, loop.mask is not None and plan.adds_known_noise),
            loop.guidance_rescale,
            loop.density,
            self.structure,
            *[leaf_key(leaf, "conditioning", self.device) for leaf in self.leaves],
        )

    def capture(self, graphs: GraphBackend, vouch: bool = False, pool: MemoryPool | None = None) -> CapturedLoop:
        """Capture the loop of this call."""
        return CapturedLoop(self, graphs, vouch, pool=pool)

    def refused(self, reason: str, error: Exception | None, is_first: bool) -> None:
        """Warn the caller, once for a model."""
        if is_first:
            warn_caller(f"sampling without CUDA graphs: {reason}")


class CapturedLoop(Captured):
    """Static tensors, and the graph that works on them.

    All that must last from one replay to the next is in the static tensors: what else a replay
    computes, the next one from its pool overwrites.

    Args:
        vouch: whether a model is refused for which ``capture="auto"`` cannot vouch.
        trusted: whether the caller vouches for the model, so that nothing about it is checked.
        pool: memory of the graph, beside the static tensors; None: its own.

    Raises:
        CaptureError: the model cannot be captured, or does something else in each call.
    """

    def __init__(
        self,
        job: Job,
        graphs: GraphBackend,
        vouch: bool = False,
        trusted: bool = False,
        pool: MemoryPool | None = None,
    ):
        super().__init__(graphs, pool)
        self._plans: OrderedDict[Hashable, tuple[Tensor, Tensor]] = OrderedDict()  # rows and timesteps
        self._loaded: Hashable = None  # the one of them in the static tensors
        self._mode = job.mode
        # Ordinary tensors, so that calls inside and outside of inference mode can share them.
        with torch.inference_mode(False), torch.no_grad():
            self._allocate(job)
        with torch.no_grad():
            self.load(job)
        whole = self._all_steps if job.mode == "loop" else self._one_step
        self._capture(job.model, job.device, self._first_step, whole, vouch, trusted)

    def _allocate(self, job: Job) -> None:
        loop, device, mode = job.loop, job.device, job.mode
        self._steps = job.plan.num_inference_steps  # of the plan that is loaded
        parts = [(static_leaves(leaves), structure) for leaves, structure in job.flattened]
        self._leaves = [leaf for leaves, _ in parts for leaf in leaves]
        conditionings = [tree_unflatten(leaves, structure) for leaves, structure in parts]
        tensors: dict[str, Any] = {name: _like(getattr(loop, name)) for name in (*LOADED, *SCRATCH)}
        self.loop = replace(
            loop,
            calls=model_calls(job.model, conditionings),
            begin=begins_steps(job.model),
            generator=None,
            **tensors,
        )
        rows_held = capacity(mode, self._steps)
        rows = torch.zeros((rows_held, job.table.rows.shape[1]), dtype=torch.float32, device=device)
        batch_size = loop.shape[0]
        self._position = Position(
            replace(job.table, rows=rows),
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.zeros((rows_held, batch_size), dtype=job.plan.schedule.time_dtype, device=device),
            torch.zeros((1, batch_size), dtype=job.plan.schedule.time_dtype, device=device),
            torch.ones(batch_size, dtype=torch.float32, device=device),
            None if loop.thresholding is None else thresholds_workspace(loop.x_t),
        )
        p = self._position
        self._loaded_from = [(name, tensors[name]) for name in LOADED if tensors[name] is not None]
        held = [getattr(self.loop, name) for name in (*LOADED, *SCRATCH)]
        held += [*self._leaves, p.table.rows, p.index, p.timesteps, p.t, p.thresholds, p.workspace]
        self._static = self._held = [tensor for tensor in held if isinstance(tensor, Tensor)]

    def load(self, job: Job) -> None:
        """Copy the values of another job with the same key into the static tensors, after the run
        before, whatever its stream. Whoever calls it has switched gradients off."""
        self._wait()
        for name, static in self._loaded_from:
            static.copy_(getattr(job.loop, name))
        self.loop.generator = job.loop.generator
        self._load_plan(job)
        self._position.index.zero_()
        fill_leaves(self._leaves, job.leaves)

    def _load_plan(self, job: Job) -> None:
        """Copy the steps of the job into the static tensors, unless they are there. Only a plan that
        is new comes from the host."""
        key = (job.plan, job.loop.guidance_scales)
        if key == self._loaded:
            return
        if key not in self._plans:
            if len(self._plans) > _PLANS:
                self._plans.popitem(last=False)
            device, batch_size = self.loop.x_t.device, self.loop.shape[0]
            with torch.inference_mode(False):
                rows = to_device(job.table.rows, device)
                self._plans[key] = rows, model_times(job.plan, device, batch_size)
            self._held = [*self._static, *chain.from_iterable(self._plans.values())]
        self._plans.move_to_end(key)
        rows, times = self._plans[key]
        self._loaded = None
        self._steps = len(rows)
        self._position.table.rows[: self._steps].copy_(rows)
        self._position.timesteps[: self._steps].copy_(times)
        self._loaded = key

    def replay_step(self, step: PlannedStep, timing: Timing) -> None:
        """Replay the next step of the loop, which must be this one."""
        started = time.perf_counter()
        self.loop.draw_noise(step)
        self._graph.replay()
        timing.captured_seconds += time.perf_counter() - started
        timing.steps += 1

    @property
    def draws_noise(self) -> bool:
        """Whether the host draws noise between steps, from a generator."""
        return self.loop.noise is not None or self.loop.known_noise is not None

    def replay_all(self, timing: Timing) -> None:
        """Replay all steps, with nothing between them."""
        started = time.perf_counter()
        for _ in range(1 if self._mode == "loop" else self._steps):
            self._graph.replay()
        timing.captured_seconds += time.perf_counter() - started
        timing.steps += self._steps

    def static_tensors(self) -> list[Tensor]:
        """Return the tensors that the loop works on, and the plans that it keeps."""
        return self._held

    def _one_step(self) -> None:
        self.loop.step_by_index(self._position)

    def _first_step(self) -> None:
        self._position.index.zero_()
        self._one_step()

    def _all_steps(self) -> None:
        self._position.index.zero_()
        for _ in range(self._steps):
            self._one_step()


def capacity(mode: str, steps: int) -> int:
    """Return the rows of a captured table: the graph of a step serves up to so many steps, that of
    a loop exactly its own number."""
    return steps if mode == "loop" else max(64, 1 << (steps - 1).bit_length())


def _like(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.empty_like(tensor)
