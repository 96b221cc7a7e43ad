"""Run a plan: check the options, make the start, and take the steps, captured or one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.protocol import Model
from ..plans.plan import PlannedStep, SamplingPlan
from ..utils.checks import check_dtype
from ..utils.progress import tqdm
from ..utils.transfer import to_device
from .capture import GraphCache
from .capture_mode import choose_mode
from .captured_loop import CapturedLoop, Job
from .finite import Look, is_bad, warn_of_bad
from .guidance import ClassifierGuidance, check_rescale, classifier_guidance, guidance_scales
from .initial_state import (
    blend_known_region,
    check_generator,
    conditionings_of,
    initial_state,
    known_region,
    place,
    seeds_of_samples,
)
from .loop import Loop, Timing, Trajectory, begins_steps, model_calls
from .model_times import model_times
from .options import Observation, Options


def sample(
    plan: SamplingPlan, model: Model, shape: Sequence[int] | None, options: Options, graphs: GraphCache
) -> Tensor | Trajectory:
    """Draw samples by a plan: from noise x_T, one model call and one fused update per step.

    Args:
        shape: ``(B, C, ...)``; None where a tensor of ``options`` has it.
        graphs: where captured loops are kept.

    Returns:
        Samples ``shape``, or a ``Trajectory``.

    Raises:
        TypeError, ValueError: an argument breaks a rule, or the model returns the wrong thing.
    """
    job = prepare(plan, model, shape, options, graphs)
    using = nullcontext() if job.mode == "off" else graphs.use(job, optional=options.execution.capture == "auto")
    result = take_steps(job, using, options)
    warn_of_result(result, job, model, options, graphs)
    return result


def warn_of_result(result: Tensor | Trajectory, job: Job, model: Model, options: Options, graphs: GraphCache) -> None:
    """Warn where the samples of a run are not finite, and name the step by running again."""
    samples = result if isinstance(result, Tensor) else result.samples
    if not is_bad(samples, options.observation.check_finite):
        return

    def run_again(look: Look) -> Tensor:
        watched = options.replace(
            **dict.fromkeys(("seed", "timing"), None),
            **dict.fromkeys(("progress", "return_trajectory", "check_finite", "reuse_output"), False),
            seeds=job.seeds,
            callback=look,
            capture="off",
        )
        again = sample(job.plan, model, tuple(samples.shape), watched, graphs)
        assert isinstance(again, Tensor)  # no trajectory was asked for
        return again

    # What a generator drew cannot be drawn again.
    repeats = None if options.noise.generator is not None else run_again
    warn_of_bad(samples, repeats, job.plan.num_inference_steps)


def prepare(
    plan: SamplingPlan,
    model: Model,
    shape: Sequence[int] | None,
    options: Options,
    graphs: GraphCache,
    recorded_by: str | None = None,
) -> Job:
    """Check the options of a run, choose its mode ("loop", "step" or "off"), draw x_T and make its
    tensors.

    Args:
        recorded_by: what keeps states and log-probabilities between steps, in words; None for
            nothing.

    Raises:
        TypeError, ValueError: an argument breaks a rule.
    """
    if plan.order > 1 and options.known_region.mask is not None:
        raise ValueError(
            "inpainting replaces the known region after each step, and so leaves the trajectory that a higher order extrapolates, got a "
            f"mask and a sampler with order={plan.order}: make one with order=1"
        )
    request = check(plan, model, shape, options)
    mode = _mode(request, options, graphs, recorded_by)
    return _start(mode, request, options, keeps_log_prob=recorded_by is not None)


@dataclass(slots=True, eq=False)
class Request:
    """A run whose options have been checked; nothing has been drawn or computed yet."""

    plan: SamplingPlan
    model: Model
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    model_dtype: torch.dtype
    scales: tuple[float, ...] | None
    conditionings: list[Mapping[str, Any]]
    classifier: ClassifierGuidance | None
    mask: Tensor | None
    known_x0: Tensor | None
    adds_noise: bool
    adds_known_noise: bool


def check(plan: SamplingPlan, model: Model, shape: Sequence[int] | None, options: Options) -> Request:
    """Check the options of a run, and resolve what they leave open.

    Raises:
        TypeError, ValueError: an argument breaks a rule.
    """
    guidance, execution = options.guidance, options.execution
    mask, known_x0 = known_region(options.known_region.mask, options.known_region.known_x0)
    shape, device, dtype = place(
        model,
        shape,
        execution.device,
        execution.dtype,
        options.noise.seeds,
        x_T=options.noise.x_T,
        known_x0=known_x0,
    )
    check_dtype("dtype", dtype)
    model_dtype = dtype
    if execution.model_dtype is not None:
        model_dtype = execution.model_dtype
        check_dtype("model_dtype", model_dtype)
    check_generator(options.noise.generator, device)
    if guidance.guidance_rescale != 0:
        check_rescale(guidance.guidance_rescale, guidance.guidance_scale)
    scales = guidance_scales(guidance.guidance_scale, plan.timesteps)
    conditionings = conditionings_of(model, guidance.conditioning, scales, guidance.unconditional_conditioning)
    return Request(
        plan=plan,
        model=model,
        shape=shape,
        device=device,
        dtype=dtype,
        model_dtype=model_dtype,
        scales=scales,
        conditionings=conditionings,
        classifier=classifier_guidance(guidance.cond_fn, conditionings[0], plan),
        mask=mask,
        known_x0=known_x0,
        adds_noise=plan.adds_noise,
        adds_known_noise=mask is not None and plan.adds_known_noise,
    )


def _mode(request: Request, options: Options, graphs: GraphCache, recorded_by: str | None) -> str:
    """Choose whether and how the steps are captured."""
    return choose_mode(
        options.execution.capture,
        graphs,
        request.device,
        request.dtype,
        options.execution.backend,
        recorded_by or _work_between_steps(request, options),
        request.model,
        None if request.classifier is None else "cond_fn takes gradients, which a captured step does not",
    )


def _work_between_steps(request: Request, options: Options) -> str | None:
    """Return what the host has to do between two steps, in words; None for nothing."""
    if options.observation.callback is not None:
        return "a callback"
    if options.observation.return_trajectory:
        return "return_trajectory"
    if options.observation.progress:
        return "progress"
    draws = options.noise.generator is not None and (request.adds_noise or request.adds_known_noise)
    return "noise from a generator" if draws else None


def _start(mode: str, request: Request, options: Options, keeps_log_prob: bool = False) -> Job:
    """Draw x_T, and make the tensors of the run."""
    r, noise = request, options.noise
    # Expanding one seed into one for each sample takes as long as several small steps.
    needs_seeds = noise.x_T is None or r.adds_noise or r.mask is not None
    seeds = seeds_of_samples(noise.seed, noise.seeds, noise.generator, r.shape[0], needed=needs_seeds)
    seeds = None if seeds is None else to_device(seeds, r.device)
    x_t = initial_state(r.shape, noise.x_T, seeds, noise.generator, r.device, r.dtype, r.plan.initial_std_dev)
    if r.mask is not None and r.known_x0 is not None:
        level, backend = r.plan.steps[0].level_t, options.execution.backend
        blend_known_region(x_t, r.mask, r.known_x0, level, seeds, noise.generator, backend)
    watched = options.observation.wants_states

    def like_x_t(dtype: torch.dtype = r.dtype) -> Tensor:
        return torch.empty_like(x_t, dtype=dtype)

    scales_input = r.model_dtype != r.dtype or r.plan.scales_input
    loop = Loop(
        x_t=x_t,
        calls=model_calls(r.model, r.conditionings),
        begin=None,  # take_steps finds out where it takes steps itself: it takes a while
        guidance_scales=r.scales,
        thresholding=r.plan.thresholding,
        seeds=seeds if r.adds_noise or r.adds_known_noise else None,
        generator=noise.generator,
        noise=like_x_t() if noise.generator is not None and r.adds_noise else None,
        model_input=like_x_t(r.model_dtype) if scales_input else None,
        x_seen=like_x_t() if watched else None,
        x0=like_x_t() if watched else None,
        normals=noise.normals,
        guidance_rescale=0.0 if r.scales is None else float(options.guidance.guidance_rescale),
        classifier=r.classifier,
        mask=r.mask,
        known_x0=r.known_x0,
        known_noise=like_x_t() if noise.generator is not None and r.adds_known_noise else None,
        history=like_x_t() if r.plan.order > 1 else None,
        history_2=like_x_t() if r.plan.order > 2 else None,
        log_prob=torch.empty(len(x_t), dtype=torch.float32, device=r.device) if keeps_log_prob else None,
        density=options.density,
    )
    loop.prepare_input(r.plan.steps[0].input_scale)
    return Job(mode, r.model, r.plan, loop, r.conditionings, seeds)


def _steps_shown(plan: SamplingPlan, options: Options) -> AbstractContextManager[Iterable[PlannedStep]]:
    """Return what gives the steps, with a progress bar if one is wanted: it costs as much as several
    small steps, even one that is not shown."""
    if options.observation.progress:
        return tqdm(plan.steps, desc="sampling", unit="step")
    return nullcontext(plan.steps)


def take_steps(
    job: Job,
    using: AbstractContextManager[CapturedLoop | None],
    options: Options,
    record: Callable[[Loop, int], None] | None = None,
) -> Tensor | Trajectory:
    """Take all steps of a job, by the captured loop that ``using`` gives, or one by one.

    Args:
        record: called as ``record(loop, steps_taken)`` before the first step and after each.
    """
    observation, execution = options.observation, options.execution
    watched = observation.progress or observation.wants_states or record is not None
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext(), using as captured:
        loop = job.loop if captured is None else captured.loop
        if captured is None:
            if len(loop.calls) > 1 or not loop.x_t.is_cpu:  # to look for graphs takes a while
                loop.begin = begins_steps(job.model)
            seen = watched or observation.timing is not None or execution.backend is not None
            if loop.is_plain and not (seen or job.plan.adds_noise):
                loop.plain_steps(job.plan, job.model, job.conditionings[0])
                return loop.x_t
            timesteps = model_times(job.plan, loop.x_t.device, loop.shape[0])
        timing = Timing() if observation.timing is None else observation.timing
        trajectory = Trajectory()
        with _steps_shown(job.plan, options) as steps:
            if captured is not None and not (watched or captured.draws_noise):
                captured.replay_all(timing)
                steps = ()
            if record is not None:
                record(loop, 0)
            for step in steps:
                if captured is not None:
                    captured.replay_step(step, timing)
                else:
                    loop.planned_step(step, timesteps[step.index], timing, execution.backend)
                if record is not None:
                    record(loop, step.index + 1)
                if observation.wants_states and _is_stopped(observation, step, loop, trajectory):
                    break
        # A captured loop owns its tensors: the next call overwrites them.
        own = captured is None or (execution.reuse_output and not observation.return_trajectory)
        x_t = loop.x_t if own else loop.x_t.clone()
    if observation.return_trajectory:
        trajectory.x_t.append(x_t)
        return trajectory
    return x_t


def _is_stopped(observation: Observation, step: PlannedStep, loop: Loop, trajectory: Trajectory) -> Any:
    """Show a step to the caller, and return whether that ends the run."""
    if observation.return_trajectory:
        trajectory.add(step.t, *loop.watched)
    return observation.callback is not None and observation.callback(step.index, step.t, *loop.watched) is True
