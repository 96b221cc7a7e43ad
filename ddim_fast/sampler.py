"""The sampler: a plan, a model, and the loop between them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .models.protocol import Model
from .plans.files import SUFFIX, TimestepList, read_timesteps
from .plans.plan import PlannedStep, SamplingPlan
from .plans.schedules import NoiseSchedule
from .plans.timesteps import explicit_model_timesteps, explicit_timesteps, respaced_timesteps, select_timesteps
from .sampling.capture import GRAPHS, CapturedLoop, GraphCache, Job, choose_mode
from .sampling.editing import img2img, inpaint, interpolate
from .sampling.guidance import GuidanceScale, check_rescale, classifier_guidance, guidance_scales
from .sampling.initial_state import (
    blend_known_region,
    conditionings_of,
    initial_state,
    known_region,
    place,
    seeds_of_samples,
)
from .sampling.inversion import invert, reconstruct
from .sampling.loop import Loop, Thresholding, Timing, Trajectory, model_calls
from .sampling.optimize import optimize
from .sampling.parallel import sample_parallel
from .utils.checks import check_dtype

Callback = Callable[[int, int, Tensor, Tensor], Any]
"""``callback(step, t, x_t, x0)``: the step's number, its timestep, the noisy samples the model saw, and what it predicted from them."""


class DDIMSampler:
    """Samples a diffusion model by DDIM (Song, Meng, Ermon 2020, arXiv 2010.02502): equation 12 over a chosen part of the timesteps.

    Args:
        schedule: the noise schedule that the model was trained with.
        num_inference_steps: S, how many timesteps to visit.
        eta: 0 is deterministic DDIM; 1 adds the noise of DDPM.
        timesteps: instead of a number: an explicit list; a respacing string such as "ddim50" or "10,15,20"; or a list from a file that
            ``ddim-fast search`` made (a path that ends in .json, or a ``TimestepList``).
        model_timesteps: what the model is told at each of these timesteps, where that is another one (arXiv 2310.09469, 2405.15506). None:
            what the file of timesteps says, or else the timesteps visited.
        timestep_spacing: how S timesteps are chosen, a key of ``timesteps.SPACINGS``.
        steps_offset: added to the timesteps of "leading" spacing.
        prediction_type: "epsilon", "sample" or "v_prediction". None: what the model says of itself, or else "epsilon".
        order: 2 for the multistep form of DDIM, of second order (DPM-Solver++(2M), arXiv 2211.01095): with the same model calls, nearer
            to where many steps lead. Needs eta = 0. None: what the list of timesteps was searched for, or else 1.
        analytic_variance: add the noise of Analytic-DPM (arXiv 2201.06503), whose variance is told from the mean squared error of
            the model's eps: one number for each timestep, or True for those that the file of timesteps holds.
        eta_scales, sigma_hat, set_alpha_to_one: see ``SamplingPlan``.
        clip_sample: clip the predicted x0 to [-clip_sample_range, clip_sample_range]. None: if the model states a range.
        clip_sample_range: half the width of the range of clean samples. None: the model's, or else 1.
        use_clipped_model_output: derive eps again from the clipped x0.
        thresholding: dynamic thresholding (Imagen): x0 is scaled by its ``dynamic_thresholding_ratio`` quantile, at most
            ``sample_max_value``, before it is clipped.
        graphs: where CUDA graphs are kept; all samplers share one cache if none.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message says which, and what to do.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        *,
        timesteps: Sequence[int] | str | os.PathLike[str] | TimestepList | None = None,
        model_timesteps: Sequence[int] | None = None,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        prediction_type: str | None = None,
        order: int | None = None,
        analytic_variance: bool | Sequence[float] = False,
        eta_scales: str = "std_dev",
        sigma_hat: bool = False,
        set_alpha_to_one: bool = True,
        clip_sample: bool | None = None,
        clip_sample_range: float | None = None,
        use_clipped_model_output: bool = False,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        graphs: GraphCache | None = None,
    ):
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(
                f"schedule must be a NoiseSchedule, got {type(schedule).__name__}: for instance NoiseSchedule.linear()"
            )
        _check_clipping(clip_sample, clip_sample_range, use_clipped_model_output)
        if thresholding:
            _check_thresholding(clip_sample, dynamic_thresholding_ratio, sample_max_value)
        self.schedule = schedule
        timesteps, order, eps_residual, told = _from_list(timesteps, schedule, order, analytic_variance)
        self.timesteps = _choose_timesteps(schedule, num_inference_steps, timesteps, timestep_spacing, steps_offset)
        if model_timesteps is not None:
            told = explicit_model_timesteps(model_timesteps, len(self.timesteps), schedule.num_train_timesteps)
        self.prediction_type = prediction_type
        self.clip_sample = True if thresholding else clip_sample
        self.clip_sample_range = clip_sample_range
        self.thresholding = Thresholding(dynamic_thresholding_ratio, sample_max_value) if thresholding else None
        self.graphs = GRAPHS if graphs is None else graphs
        # Everything but what a model may decide; checked now, with a prediction type that cannot fail at zero SNR.
        self._plan = SamplingPlan(
            schedule,
            self.timesteps,
            prediction_type="v_prediction" if prediction_type is None else prediction_type,
            eta=eta,
            eta_scales=eta_scales,
            sigma_hat=sigma_hat,
            set_alpha_to_one=set_alpha_to_one,
            clip_sample_range=_or_one(clip_sample_range) if self.clip_sample or use_clipped_model_output else None,
            use_clipped_model_output=use_clipped_model_output,
            order=order,
            eps_residual=eps_residual,
            model_timesteps=told,
        )

    @property
    def num_inference_steps(self) -> int:
        return len(self.timesteps)

    @property
    def order(self) -> int:
        """1: DDIM. 2: its multistep form."""
        return self._plan.order

    def plan(self, model: Model | None = None) -> SamplingPlan:
        """The steps of a run with this model: what the sampler leaves open is taken from the model's attributes, then from defaults.

        Raises:
            ValueError: sampler and model name different prediction types.
        """
        stated = getattr(model, "prediction_type", None)
        if stated is not None and self.prediction_type not in (None, stated):
            raise ValueError(
                f"the sampler was told prediction_type={self.prediction_type!r}, but the model says it predicts {stated!r}: "
                "leave the sampler's out"
            )
        prediction_type = self.prediction_type or stated or "epsilon"
        clip_range = self.clip_sample_range
        if clip_range is None:
            clip_range = getattr(model, "clip_sample_range", None)
        clip = clip_range is not None if self.clip_sample is None else self.clip_sample
        open_until_now = prediction_type, _or_one(clip_range) if clip else None
        if open_until_now == (self._plan.prediction_type, self._plan.clip_sample_range):
            return self._plan
        return _finished_plan(self._plan, *open_until_now)

    def sample(
        self,
        model: Model,
        shape: Sequence[int] | None = None,
        *,
        seed: int | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        x_T: Tensor | None = None,
        conditioning: Mapping[str, Any] | None = None,
        guidance_scale: GuidanceScale | None = None,
        unconditional_conditioning: Mapping[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        cond_fn: Callable[..., Tensor] | None = None,
        mask: Tensor | None = None,
        known_x0: Tensor | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        model_dtype: torch.dtype | None = None,
        progress: bool = False,
        callback: Callback | None = None,
        return_trajectory: bool = False,
        timing: Timing | None = None,
        backend: str | None = None,
        normals: str = "exact",
        capture: str = "auto",
        reuse_output: bool = False,
    ) -> Tensor | Trajectory:
        """Draw samples: from noise x_T, one model call and one fused update per step.

        Args:
            model: any callable, see ``models.Model``. Called under ``torch.inference_mode()``.
            shape: ``(B, C, ...)``. May be left out where ``x_T`` or ``known_x0`` is given, whose device and dtype the samples have.
            seed: one number for the run; sample i gets its own seed from it (``sample_seeds``).
            seeds: instead: one 64-bit seed per sample. A sample depends on its seed alone, not on the others.
            generator: instead: noise from this ``torch.Generator``, by torch's own randn.
                With none of the three, a seed is drawn from torch's global generator (``torch.manual_seed`` fixes it), if noise is
                needed.
            x_T: start from this noise ``(B, C, ...)`` (it is not changed).
            conditioning: passed to the model by name, for instance ``{"class_labels": labels}``.
            guidance_scale: classifier-free guidance (arXiv 2207.12598), 1 for none: the model is called twice per step, with
                ``unconditional_conditioning`` too, or with what ``model.unconditional(conditioning)`` gives. A number, one number
                for each step in order, or a function of the timestep.
            guidance_rescale: from 0 to 1, how far the guided output's standard deviation over each sample is brought back to that of
                the conditional one (phi of arXiv 2305.08891, section 3.4). Guidance is then a few operations of torch before the step.
            cond_fn: classifier guidance (arXiv 2105.05233): ``cond_fn(x_t, t, **conditioning)`` gives the gradient of log p(y | x_t) by
                x_t, times a scale if wanted, like x_t. Called with gradients enabled, and a copy of x_t::

                    def cond_fn(x_t, t, y):
                        log_p = classifier(x_t.requires_grad_(), t).log_softmax(-1)[range(len(y)), y]
                        return torch.autograd.grad(log_p.sum(), x_t)[0]

            mask, known_x0: with both, inpainting, see ``inpaint``. ``x_T`` is blended with the known picture, too.
            dtype: of the samples. Half precision is computed in float32 and stored in half.
            model_dtype: of what the model is given, where it differs: a half-precision model beside float32 samples.
            progress: show a progress bar.
            callback: called after each step; see ``Callback``. The run stops early if it returns True.
            return_trajectory: return every state as a ``Trajectory`` instead of the samples.
            timing: filled in with the seconds spent in the model and in the update.
            backend: of the update, a name in ``kernels.dispatch.BACKENDS``.
            normals: how seeds become the noise of steps: "exact", the same bits everywhere; or "fast" (see ``ddim_step``).
            capture: on a CUDA device, run the steps as CUDA graphs, captured in the first call and replayed in later ones (see
                ``capture.GraphCache``): "step", one graph that is replayed for each step; "loop", all steps and model calls in one;
                "off"; or "auto": "step" for an ``nn.Module`` that can be captured, with one warning where it cannot. The model is
                called a few times more before the first capture. With ``cond_fn`` there is no capture.
            reuse_output: with a captured loop, return its own memory, which the next call writes to, instead of a copy.

        Returns:
            Samples ``shape`` on ``device``, or a ``Trajectory``.

        Raises:
            TypeError, ValueError: an argument breaks a rule, or the model returns the wrong thing.
        """
        plan = self.plan(model)
        rows = [step.coefficients for step in plan.steps]
        if plan.order == 2 and mask is not None:
            raise ValueError(
                "inpainting puts the known picture in after each step, which leaves the trajectory that order=2 draws on from, got a mask "
                "and a sampler with order=2: make one with order=1"
            )
        mask, known_x0 = known_region(mask, known_x0)
        shape, device, dtype = place(shape, device, dtype, x_T=x_T, known_x0=known_x0)
        for name, value in {"dtype": dtype, "model_dtype": model_dtype}.items():
            if value is not None:
                check_dtype(name, value)
        check_rescale(guidance_rescale, guidance_scale)
        scales = guidance_scales(guidance_scale, plan.timesteps)
        conditionings = conditionings_of(model, conditioning, scales, unconditional_conditioning)
        adds_noise = any(row.adds_noise for row in rows)
        adds_known_noise = mask is not None and any(row.adds_known_noise for row in rows)
        between = {
            "a callback": callback is not None,
            "return_trajectory": return_trajectory,
            "progress": progress,
            "noise from a generator": generator is not None and (adds_noise or adds_known_noise),
        }
        first_between = next((what for what in between if between[what]), None)
        gradients = None if cond_fn is None else "cond_fn takes gradients, which a captured step does not"
        mode = choose_mode(capture, self.graphs, device, dtype, backend, first_between, model, gradients)
        classifier = classifier_guidance(cond_fn, conditionings[0], plan)
        # From one number to a seed for each sample takes as long as several small steps.
        seeded = x_T is None or adds_noise or mask is not None
        per_sample = seeds_of_samples(seed, seeds, generator, shape[0], needed=seeded)
        per_sample = None if per_sample is None else per_sample.to(device)
        x_t = initial_state(shape, x_T, per_sample, generator, device, dtype)
        if mask is not None:
            blend_known_region(x_t, mask, known_x0, plan.steps[0].alpha_bar_t, per_sample, generator, backend)
        watched = callback is not None or return_trajectory

        def like_x_t(wanted: bool, dtype: torch.dtype = dtype) -> Tensor | None:
            return torch.empty_like(x_t, dtype=dtype) if wanted else None

        loop = Loop(
            x_t=x_t,
            calls=model_calls(model, conditionings),
            guidance_scales=scales,
            thresholding=self.thresholding,
            seeds=per_sample if adds_noise or adds_known_noise else None,
            generator=generator,
            noise=like_x_t(generator is not None and adds_noise),
            model_input=like_x_t(model_dtype not in (None, dtype), model_dtype),
            x_seen=like_x_t(watched),
            x0=like_x_t(watched),
            normals=normals,
            guidance_rescale=0.0 if scales is None else float(guidance_rescale),
            classifier=classifier,
            mask=mask,
            known_x0=known_x0,
            known_noise=like_x_t(generator is not None and adds_known_noise),
            history=like_x_t(plan.order == 2),
        )
        job = Job(model, plan, loop, conditionings)
        using = nullcontext() if mode == "off" else self.graphs.use(mode, job, optional=capture == "auto")
        # A bar costs as much as several small steps, also one that is not shown.
        bar = tqdm(plan.steps, desc="sampling", unit="step") if progress else nullcontext(plan.steps)
        timing = Timing() if timing is None else timing
        return _run(job, mode, using, bar, timing, backend, callback, return_trajectory, reuse_output)

    # Functions of their own files: what they are given first is this sampler.
    img2img = img2img
    inpaint = inpaint
    interpolate = interpolate
    invert = invert
    optimize = optimize
    reconstruct = reconstruct
    sample_parallel = sample_parallel

    def last_steps(self, count: int) -> DDIMSampler:
        """This sampler with the last ``count`` of its steps alone."""
        shorter = copy(self)
        shorter.timesteps = self.timesteps[-count:]
        shorter._plan = _with_timesteps(self._plan, shorter.timesteps)
        return shorter


def _run(
    job: Job,
    mode: str,
    using: AbstractContextManager[CapturedLoop | None],
    bar: AbstractContextManager[Iterable[PlannedStep]],
    timing: Timing,
    backend: str | None,
    callback: Callback | None,
    return_trajectory: bool,
    reuse_output: bool,
) -> Tensor | Trajectory:
    """All steps of a job, by the captured loop that ``using`` gives, or one by one."""
    trajectory = Trajectory()
    with using as captured:
        loop = job.loop if captured is None else captured.loop
        timesteps = torch.tensor(job.plan.model_timesteps, device=loop.x_t.device)[:, None].expand(-1, loop.shape[0])
        with torch.inference_mode(), bar as steps:
            if captured is not None and mode == "loop":
                captured.replay_all(timing)
                steps = ()
            for step in steps:
                if captured is not None:
                    captured.replay_step(step, timing)
                else:
                    loop.planned_step(step, timesteps[step.index], timing, backend)
                if return_trajectory:
                    trajectory.add(step.t, loop.x_seen, loop.x0)
                if callback is not None and callback(step.index, step.t, loop.x_seen, loop.x0) is True:
                    break
        # A captured loop's tensors are its own: the next call writes to them.
        own = captured is None or (reuse_output and not return_trajectory)
        x_t = loop.x_t if own else loop.x_t.clone()
    if return_trajectory:
        trajectory.x_t.append(x_t)
        return trajectory
    return x_t


def _or_one(clip_sample_range: float | None) -> float:
    return 1.0 if clip_sample_range is None else clip_sample_range


def _check_clipping(clip_sample: bool | None, clip_sample_range: float | None, use_clipped_model_output: bool) -> None:
    if clip_sample_range is not None and not 0 < clip_sample_range < math.inf:
        raise ValueError(f"clip_sample_range must be positive and finite, got {clip_sample_range}")
    if use_clipped_model_output and clip_sample is False:
        raise ValueError("use_clipped_model_output needs clipping, got clip_sample=False: leave one of them out")


def _check_thresholding(clip_sample: bool | None, ratio: float, maximum: float) -> None:
    if not 0 < ratio <= 1:
        raise ValueError(f"dynamic_thresholding_ratio must be in (0, 1], got {ratio}")
    if not 0 < maximum < math.inf:
        raise ValueError(f"sample_max_value must be positive and finite, got {maximum}")
    if clip_sample is False:
        raise ValueError("thresholding clips x0, so clip_sample=False contradicts it: leave one of them out")


def _from_list(timesteps, schedule: NoiseSchedule, order: int | None, analytic_variance: bool | Sequence[float]):
    """Timesteps, order, the mean squared error of eps and what the model is told, where one or the other comes from a file of timesteps."""
    named = isinstance(timesteps, os.PathLike) or (isinstance(timesteps, str) and timesteps.endswith(SUFFIX))
    found = read_timesteps(timesteps) if named else timesteps
    if not isinstance(found, TimestepList):
        if analytic_variance is True:
            raise ValueError(
                "analytic_variance=True takes the mean squared error of eps from a file of timesteps that ddim-fast search made, got "
                "none: pass timesteps='FILE.json', or the numbers themselves"
            )
        return timesteps, 1 if order is None else order, tuple(map(float, analytic_variance or ())) or None, None
    name = os.fspath(timesteps) if named else "the list of timesteps"
    measured = found.eps_residual if analytic_variance is True else tuple(map(float, analytic_variance or ())) or None
    if analytic_variance is True and measured is None:
        raise ValueError(
            f"analytic_variance=True needs the mean squared error of eps, and {name} holds none: search again, or pass the numbers"
        )
    return found.for_schedule(schedule, name), found.order if order is None else order, measured, found.model_timesteps


def _choose_timesteps(schedule: NoiseSchedule, count, timesteps, spacing: str, steps_offset: int) -> tuple[int, ...]:
    total = schedule.num_train_timesteps
    if timesteps is None:
        return select_timesteps(
            50 if count is None else count, total, spacing, steps_offset=steps_offset, schedule=schedule
        )
    chosen = (
        respaced_timesteps(timesteps, total) if isinstance(timesteps, str) else explicit_timesteps(timesteps, total)
    )
    if count not in (None, len(chosen)):
        raise ValueError(
            f"timesteps has {len(chosen)} entries and num_inference_steps is {count}: leave num_inference_steps out"
        )
    return chosen


@lru_cache(maxsize=64)
def _with_timesteps(plan: SamplingPlan, timesteps: tuple[int, ...]) -> SamplingPlan:
    own = {name: getattr(plan, name) for name in ("eps_residual", "model_timesteps")}
    return replace(
        plan,
        timesteps=timesteps,
        **{name: None if value is None else value[-len(timesteps) :] for name, value in own.items()},
    )


@lru_cache(maxsize=64)
def _finished_plan(plan: SamplingPlan, prediction_type: str, clip_sample_range: float | None) -> SamplingPlan:
    return replace(plan, prediction_type=prediction_type, clip_sample_range=clip_sample_range)
