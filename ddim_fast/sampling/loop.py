"""A run of the sampler as data: its tensors, allocated before the first step and reused in every
one, and the step itself.

The step comes in two forms that compute the same bits. ``planned_step`` knows which step it is.
``step_by_index`` does not: it finds its row of coefficients, its timestep and its place in the
noise by a number in device memory, which it then advances, so it can be captured in a CUDA graph
once and replayed for every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.contract import StepTable
from ..kernels.dispatch import ddim_step, ddim_step_from_table, plain_step_
from ..kernels.noise import NoiseStream
from ..kernels.thresholding import dynamic_thresholds
from ..kernels.torch_internals import makes_own_graphs, shares_storage
from ..models.protocol import Model, output_tensor
from ..plans.clipping import Thresholding
from ..plans.plan import PlannedStep, SamplingPlan
from ..utils.brief import brief_fields
from ..utils.transfer import to_device
from .guidance import ClassifierGuidance, guided_output
from .model_errors import explain
from .model_times import LentTimes

ModelCall = Callable[[Tensor, Tensor], Tensor]
"""``call(x, t)``: the prediction of the model with its conditioning, in the shape of ``x``."""


@dataclass
class Timing:
    """Seconds spent in the model and in the update, added up by ``sample(timing=...)``. On a GPU
    these are launch times.

    Replays of a captured loop do not separate the two: their time is in ``captured_seconds``.
    """

    model_seconds: float = 0.0
    update_seconds: float = 0.0
    captured_seconds: float = 0.0
    steps: int = 0


class Density(NamedTuple):
    """How the log-probability of a step is taken, see ``ddim_step``."""

    log_prob_reduction: str = "mean"
    min_std: float | None = None


@dataclass(eq=False)
class Trajectory:
    """Every state of a run. It is equal to itself alone.

    Attributes:
        timesteps: S timesteps visited.
        x_t: S + 1 tensors ``(B, ...)``: the noisy samples before each step, and the result.
        x0: S tensors ``(B, ...)``: the prediction of the clean samples at each step.
    """

    timesteps: list[float] = field(default_factory=list)
    x_t: list[Tensor] = field(default_factory=list)
    x0: list[Tensor] = field(default_factory=list)

    __repr__ = brief_fields

    @property
    def samples(self) -> Tensor:
        return self.x_t[-1]

    def add(self, t: float, x_t: Tensor, x0: Tensor) -> None:
        """Keep copies, as ordinary tensors even in inference mode."""
        with torch.inference_mode(False):
            self.timesteps.append(t)
            self.x_t.append(x_t.clone())
            self.x0.append(x0.clone())


@dataclass(eq=False)
class Position:
    """The position of ``step_by_index``: everything that must not be a Python number.

    Attributes:
        table: the coefficients of the steps.
        index: ``(1,)`` int64: the number of the next step.
        timesteps: ``(S, B)``: the timesteps that the model is called with, int64 or float32.
        t: ``(1, B)``: those of the current step.
        thresholds: ``(B,)`` float32: its dynamic thresholds.
        workspace: what computes them works on, if it needs memory.
    """

    table: StepTable
    index: Tensor
    timesteps: Tensor
    t: Tensor
    thresholds: Tensor
    workspace: Tensor | None = None


@dataclass(eq=False)
class Loop:
    """The tensors of a run, and what its steps need beside them. None means: not needed.

    Attributes:
        x_t: ``(B, C, ...)`` the noisy samples; each step's result replaces them.
        calls: the model calls of a step: one; with guidance a conditional and an unconditional one,
            or one call for both with twice the batch.
        begin: called before the calls of each step, see ``begins_steps``.
        guidance_scales: one for each step, with guidance.
        seeds: ``(B,)`` int64, for in-register noise.
        noise: like ``x_t``: filled by ``generator`` before each step that adds noise.
        normals: the form of in-register noise, one of ``kernels.contract.NORMALS``.
        model_input: like ``x_t``: x_t as the model takes it, if that is in another dtype or times a
            scale. Each step writes the next one; ``prepare_input`` makes the first.
        x_seen, x0: like ``x_t``: what the model saw, and what it predicted from it, if the caller
            watches.
        guidance_rescale: phi of ``guided_output``; 0 leaves guidance to the step's kernel.
        mask, known_x0: like ``x_t``: the known region (1) and the picture there.
        known_noise: like ``x_t``: filled by ``generator`` before each step whose known region has
            noise.
        history, history_2: like ``x_t``: the x0 of the step before, and of the one before that, for
            a multistep form. The first steps do not read them.
        log_prob: ``(B,)`` float32: the log-probability of the last step, where it has one.
        density: how it is taken.
    """

    x_t: Tensor
    calls: Sequence[ModelCall]
    begin: Callable[[], None] | None
    guidance_scales: Sequence[float] | None = None
    thresholding: Thresholding | None = None
    seeds: Tensor | None = None
    generator: torch.Generator | None = None
    noise: Tensor | None = None
    model_input: Tensor | None = None
    x_seen: Tensor | None = None
    x0: Tensor | None = None
    normals: str = "exact"
    guidance_rescale: float = 0.0
    classifier: ClassifierGuidance | None = None
    mask: Tensor | None = None
    known_x0: Tensor | None = None
    known_noise: Tensor | None = None
    history: Tensor | None = None
    history_2: Tensor | None = None
    log_prob: Tensor | None = None
    density: Density = Density()  # noqa: RUF009 (it is immutable)

    @property
    def shape(self) -> torch.Size:
        return self.x_t.shape

    @property
    def watched(self) -> tuple[Tensor, Tensor]:
        """What the model saw in the last step, and the x0 predicted from it, in a loop that keeps
        them."""
        assert self.x_seen is not None
        assert self.x0 is not None
        return self.x_seen, self.x0

    def planned_step(self, step: PlannedStep, t: Tensor, timing: Timing, backend: str | None) -> None:
        """Advance ``x_t`` by this step; ``t`` ``(B,)`` are the timesteps that the model is called
        with."""
        started = time.perf_counter()
        x_t = self.x_t
        model_output, uncond, scale = self.steered(step.index, t)
        called = time.perf_counter()
        thresholds = None
        if self.thresholding is not None:
            thresholds = dynamic_thresholds(
                x_t, model_output, step.coefficients, self.thresholding.ratio, self.thresholding.maximum, uncond, scale
            )
        self.draw_noise(step)
        adds_noise = step.coefficients.adds_noise
        makes_noise = adds_noise or (self.mask is not None and step.coefficients.adds_known_noise)
        has_log_prob = self.log_prob is not None and step.coefficients.has_density(self.density.min_std)
        # If the caller watches what the model saw, the two buffers are swapped instead of copied.
        self.x_t = ddim_step(
            x_t,
            model_output,
            step.coefficients,
            model_output_uncond=uncond,
            guidance_scale=scale,
            noise=self.noise if adds_noise else None,
            seeds=self.seeds if makes_noise else None,
            noise_step=step.index,
            noise_stream=NoiseStream.STEP,
            thresholds=thresholds,
            mask=self.mask,
            known_x0=self.known_x0,
            known_noise=self.known_noise,
            normals=self.normals,
            out=x_t if self.x_seen is None else self.x_seen,
            x0_out=self.x0,
            history=self.history,
            history_2=self.history_2,
            model_input_out=self.model_input,
            log_prob_out=self.log_prob if has_log_prob else None,
            log_prob_reduction=self.density.log_prob_reduction,
            min_std=self.density.min_std if has_log_prob else None,
            backend=backend,
        )
        if self.x_seen is not None:
            self.x_seen = x_t
        timing.model_seconds += called - started
        timing.update_seconds += time.perf_counter() - called
        timing.steps += 1

    @property
    def is_plain(self) -> bool:
        """Whether a step without noise needs nothing but one call of the model, x_t and histories."""
        return (
            (self.begin is self.guidance_scales is self.classifier is self.thresholding is self.model_input is None)
            and (self.mask is self.x_seen is self.x0 is self.log_prob is None)
            and len(self.calls) == 1
        )

    def plain_steps(self, plan: SamplingPlan, model: Model, conditioning: Mapping[str, Any]) -> None:
        """Advance ``x_t`` by the steps of a plan without noise, in a loop that ``is_plain``, as
        ``planned_step`` does.

        What stands between two calls of a small model, such as a robot's policy, is found cold in
        the processor's caches each time: so there is as little of it as possible. The step looks at
        the model's output itself, and only one that it declines is asked what is special about it.
        """
        x_t, history, history_2 = self.x_t, self.history, self.history_2
        times = LentTimes(plan, x_t)
        for step, t in zip(plan.steps, times.rows, strict=True):
            try:
                output = model(x_t, t, **conditioning)
                if plain_step_(x_t, output, step.coefficients, history, history_2):
                    continue
                m = output_tensor(output, x_t)
            except Exception as error:
                explain(error, model, x_t, conditioning)
                raise
            m = _plain(_apart_from(x_t, m))
            ddim_step(x_t, m, step.coefficients, out=x_t, history=history, history_2=history_2)
        times.give_back()

    def step_by_index(self, position: Position) -> None:
        """Advance ``x_t``, in place, by the step at ``position``, and the position by one.

        Nothing waits for the device, only the model allocates, and no Python number differs between
        steps.
        """
        p = position
        torch.index_select(p.timesteps, 0, p.index, out=p.t)
        model_output, uncond = self.predict(p.t[0])
        if uncond is not None and self.guidance_rescale:
            scale = p.table.prediction(p.index)[3]
            model_output = guided_output(model_output, uncond, scale, self.guidance_rescale, self.x_t.dtype)
            uncond = None
        thresholds = None
        if self.thresholding is not None:
            thresholds = dynamic_thresholds(
                self.x_t,
                model_output,
                p.table,
                self.thresholding.ratio,
                self.thresholding.maximum,
                uncond,
                index=p.index,
                out=p.thresholds,
                workspace=p.workspace,
            )
        if self.x_seen is not None:
            self.x_seen.copy_(self.x_t)
        ddim_step_from_table(
            self.x_t,
            model_output,
            p.table,
            p.index,
            model_output_uncond=uncond,
            noise=self.noise,
            seeds=self.seeds,
            noise_stream=NoiseStream.STEP,
            thresholds=thresholds,
            mask=self.mask,
            known_x0=self.known_x0,
            known_noise=self.known_noise,
            normals=self.normals,
            out=self.x_t,
            x0_out=self.x0,
            history=self.history,
            history_2=self.history_2,
            model_input_out=self.model_input,
            log_prob_out=self.log_prob,
            log_prob_reduction=self.density.log_prob_reduction,
        )
        p.index.add_(1)

    def draw_noise(self, step: PlannedStep) -> None:
        """Fill what this step needs from the generator: first the noise that it adds, then that of
        the known region."""
        if self.noise is not None and step.coefficients.adds_noise:
            self.noise.normal_(generator=self.generator)
        if self.known_noise is not None and step.coefficients.adds_known_noise:
            self.known_noise.normal_(generator=self.generator)

    def prepare_input(self, input_scale: float) -> None:
        """Fill ``model_input``, if there is one, from ``x_t``: as a step does for the next."""
        if self.model_input is not None:
            wide = torch.promote_types(self.x_t.dtype, torch.float32)
            self.model_input.copy_(self.x_t.to(wide) * input_scale)

    def steered(self, step: int, t: Tensor) -> tuple[Tensor, Tensor | None, float | None]:
        """Return the model's outputs for x_t at this step, and the guidance scale that is left to the
        step's kernel: ``(output, unconditional, scale)``, the last two None where there is none.

        Args:
            t: ``(B,)``: what the model is told.
        """
        model_output, uncond = self.predict(t)
        scale = None if uncond is None or self.guidance_scales is None else self.guidance_scales[step]
        if uncond is not None and scale is not None and (self.guidance_rescale or self.classifier is not None):
            model_output = guided_output(model_output, uncond, scale, self.guidance_rescale, self.x_t.dtype)
            uncond = scale = None
        if self.classifier is not None:
            model_output = self.classifier.shifted(model_output, self.x_t, step)
        return model_output, uncond, scale

    def predict(self, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the model's output for x_t, and with guidance its unconditional output; ``t``
        ``(B,)`` is what the model is told."""
        if self.begin is not None:
            self.begin()
        model_input = self.x_t if self.model_input is None else self.model_input
        if self.guidance_scales is not None and len(self.calls) == 1:
            conditional, unconditional = self.calls[0](model_input, t).chunk(2)
            return conditional, unconditional
        outputs = [_plain(_apart_from(model_input, _apart_from(self.x_t, call(model_input, t)))) for call in self.calls]
        if len(outputs) == 1:
            return outputs[0], None
        if outputs[0].numel() and _same_place(*outputs):
            raise ValueError(
                "with guidance the model is called twice a step, and its outputs must not share memory, got one "
                "tensor from both calls: return a new tensor from each, for instance with .clone()"
            )
        return outputs[0], outputs[1]


def input_scales(plan: SamplingPlan, device: torch.device) -> Tensor | None:
    """Return ``(S,)`` float32, what x_t is multiplied by before each model call; None if it is
    given as it is."""
    if not plan.scales_input:
        return None
    scales = torch.tensor([step.input_scale for step in plan.steps], dtype=torch.float32, device="cpu")
    return to_device(scales, device)


def begins_steps(model: Model) -> Callable[[], None] | None:
    """Return what to call at the beginning of a step, for a model that torch.compile gave CUDA
    graphs (``mode="reduce-overhead"``): None for others.

    Such graphs keep what they returned until the step ends. Without a word each call is a step, and
    the second one of guidance overwrites what the first returned.
    """
    return torch.compiler.cudagraph_mark_step_begin if makes_own_graphs(model) else None


def model_calls(model: Model, conditionings: Sequence[Mapping[str, Any]]) -> list[ModelCall]:
    """Return the calls of one step, each with its conditioning; or one for both, if the model
    ``batches_guidance``."""
    if len(conditionings) == 2 and getattr(model, "batches_guidance", False):
        return [_call_of_both(model, *conditionings)]

    def call_with(conditioning: Mapping[str, Any]) -> ModelCall:
        def call(x: Tensor, t: Tensor) -> Tensor:
            try:
                return output_tensor(model(x, t, **conditioning), x)
            except Exception as error:
                explain(error, model, x, conditioning)
                raise

        return call

    return [call_with(conditioning) for conditioning in conditionings]


def _call_of_both(model: Model, first: Mapping[str, Any], second: Mapping[str, Any]) -> ModelCall:
    """Return a call with twice the batch, whose halves differ in their conditioning."""

    def both(x: Tensor, t: Tensor) -> Tensor:
        doubled = torch.cat([x, x])
        merged = merged_conditioning(first, second, len(x))
        try:
            return _apart_from(doubled, output_tensor(model(doubled, torch.cat([t, t]), **merged), doubled))
        except Exception as error:
            explain(error, model, doubled, merged)
            raise

    return both


def merged_conditioning(first: Mapping[str, Any], second: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """Merge two conditionings into that of a batch whose first half has one, and whose second half
    the other.

    Raises:
        ValueError: an entry is neither a tensor with a row for each sample in both, nor the same
            value in both.
    """
    return {name: _doubled(name, first.get(name), second.get(name), batch_size) for name in {**first, **second}}


def _doubled(name: str, first: Any, second: Any, batch_size: int) -> Any:
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.ndim and len(first) == batch_size:
        return torch.cat([first, second])
    if type(first) is type(second) and not isinstance(first, Tensor) and first == second:
        return first
    raise ValueError(
        f"guidance in one batch needs conditioning that is a tensor with a row for each sample in both halves, or the same value, got "
        f"{name} = {first!r:.60} and {second!r:.60}: use a model without batches_guidance"
    )


def _same_place(a: Tensor, b: Tensor) -> bool:
    return shares_storage(a, b) and a.storage_offset() == b.storage_offset()


def _plain(model_output: Tensor) -> Tensor:
    """Copy a model's output if its samples are not contiguous, such as a transposed one: no kernel
    reads that."""
    return (
        model_output if model_output.is_contiguous() or model_output[:1].is_contiguous() else model_output.contiguous()
    )


def _apart_from(x_t: Tensor, model_output: Tensor) -> Tensor:
    """Copy a model's output if it is another view of its input, which the update overwrites."""
    shared = shares_storage(model_output, x_t)
    same = shared and _same_place(model_output, x_t) and model_output.stride() == x_t.stride()
    return model_output.clone() if shared and not same else model_output
