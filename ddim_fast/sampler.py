"""The sampler: a plan, a model, and the loop between them."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .kernels import cpu_step
from .kernels.dispatch import ddim_step
from .kernels.noise import NoiseStream, sample_seeds
from .kernels.thresholding import dynamic_thresholds
from .models import Model, output_tensor
from .plan import PlannedStep, SamplingPlan
from .schedule import NoiseSchedule
from .timesteps import explicit_timesteps, respaced_timesteps, select_timesteps

Callback = Callable[[int, int, Tensor, Tensor], Any]
"""``callback(step, t, x_t, x0)``: the step's number, its timestep, the noisy samples the model saw, and what it predicted from them."""


@dataclass
class Trajectory:
    """Every state of a run.

    Attributes:
        timesteps: S timesteps visited.
        x_t: S + 1 tensors ``(B, ...)``: the noisy samples before each step, and the result.
        x0: S tensors ``(B, ...)``: the prediction of the clean samples at each step.
    """

    timesteps: list[int] = field(default_factory=list)
    x_t: list[Tensor] = field(default_factory=list)
    x0: list[Tensor] = field(default_factory=list)

    @property
    def samples(self) -> Tensor:
        return self.x_t[-1]

    def add(self, t: int, x_t: Tensor, x0: Tensor) -> None:
        """Keep copies, as ordinary tensors also where inference mode is on."""
        with torch.inference_mode(False):
            self.timesteps.append(t)
            self.x_t.append(x_t.clone())
            self.x0.append(x0.clone())


@dataclass
class Timing:
    """Seconds spent in the model and in the update, filled in by ``sample(timing=...)``. On a GPU these are times to launch."""

    model_seconds: float = 0.0
    update_seconds: float = 0.0
    steps: int = 0


@dataclass
class _Run:
    """The tensors of one call of ``sample``; allocated before the loop, reused in every step."""

    x_t: Tensor
    seeds: Tensor | None
    generator: torch.Generator | None
    x_prev: Tensor | None  # a second buffer, where x_t must outlive the step
    x0: Tensor | None
    noise: Tensor | None  # where a torch.Generator makes the noise
    model_input: Tensor | None  # x_t in the model's dtype, where that differs
    timesteps: Tensor  # (S, B)


class DDIMSampler:
    """Samples a diffusion model by DDIM (Song, Meng, Ermon 2020, arXiv 2010.02502): equation 12 over a chosen part of the timesteps.

    Args:
        schedule: the noise schedule that the model was trained with.
        num_inference_steps: S, how many timesteps to visit.
        eta: 0 is deterministic DDIM; 1 adds the noise of DDPM.
        timesteps: instead of a number: an explicit list, or a respacing string such as "ddim50" or "10,15,20".
        timestep_spacing: how S timesteps are chosen, a key of ``timesteps.SPACINGS``.
        steps_offset: added to the timesteps of "leading" spacing.
        prediction_type: "epsilon", "sample" or "v_prediction". None: what the model says of itself, or else "epsilon".
        eta_scales, sigma_hat, set_alpha_to_one: see ``SamplingPlan``.
        clip_sample: clip the predicted x0 to [-clip_sample_range, clip_sample_range]. None: if the model states a range.
        clip_sample_range: half the width of the range of clean samples. None: the model's, or else 1.
        use_clipped_model_output: derive eps again from the clipped x0.
        thresholding: dynamic thresholding (Imagen): x0 is scaled by its ``dynamic_thresholding_ratio`` quantile, at most
            ``sample_max_value``, before it is clipped.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message says which, and what to do.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        *,
        timesteps: Sequence[int] | str | None = None,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        prediction_type: str | None = None,
        eta_scales: str = "std_dev",
        sigma_hat: bool = False,
        set_alpha_to_one: bool = True,
        clip_sample: bool | None = None,
        clip_sample_range: float | None = None,
        use_clipped_model_output: bool = False,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
    ):
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(
                f"schedule must be a NoiseSchedule, got {type(schedule).__name__}: for instance NoiseSchedule.linear()"
            )
        _check_clipping(clip_sample, clip_sample_range, use_clipped_model_output)
        if thresholding:
            _check_thresholding(clip_sample, dynamic_thresholding_ratio, sample_max_value)
        self.schedule = schedule
        self.timesteps = _choose_timesteps(schedule, num_inference_steps, timesteps, timestep_spacing, steps_offset)
        self.prediction_type = prediction_type
        self.clip_sample = True if thresholding else clip_sample
        self.clip_sample_range = clip_sample_range
        self.thresholding = thresholding
        self.dynamic_thresholding_ratio = dynamic_thresholding_ratio
        self.sample_max_value = sample_max_value
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
        )

    @property
    def num_inference_steps(self) -> int:
        return len(self.timesteps)

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
        return _finished_plan(self._plan, prediction_type, _or_one(clip_range) if clip else None)

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
        guidance_scale: float | None = None,
        unconditional_conditioning: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        model_dtype: torch.dtype | None = None,
        progress: bool = False,
        callback: Callback | None = None,
        return_trajectory: bool = False,
        timing: Timing | None = None,
        backend: str | None = None,
    ) -> Tensor | Trajectory:
        """Draw samples: from noise x_T, one model call and one fused update per step.

        Args:
            model: any callable, see ``models.Model``. Called under ``torch.inference_mode()``.
            shape: ``(B, C, ...)``. May be left out where ``x_T`` is given.
            seed: one number for the run; sample i gets its own seed from it (``sample_seeds``).
            seeds: instead: one 64-bit seed per sample. A sample depends on its seed alone, not on the others.
            generator: instead: noise from this ``torch.Generator``, by torch's own randn.
                With none of the three, a seed is drawn from torch's global generator (``torch.manual_seed`` fixes it).
            x_T: start from this noise ``(B, C, ...)`` (it is not changed).
            conditioning: passed to the model by name, for instance ``{"class_labels": labels}``.
            guidance_scale: classifier-free guidance (arXiv 2207.12598), 1 for none: the model is called twice per step, with
                ``unconditional_conditioning`` too, or with what ``model.unconditional(conditioning)`` gives.
            dtype: of the samples. Half precision is computed in float32 and stored in half.
            model_dtype: of what the model is given, where it differs: a half-precision model beside float32 samples.
            progress: show a progress bar.
            callback: called after each step; see ``Callback``. The run stops early if it returns True.
            return_trajectory: return every state as a ``Trajectory`` instead of the samples.
            timing: filled in with the seconds spent in the model and in the update.
            backend: of the update, a name in ``kernels.dispatch.BACKENDS``.

        Returns:
            Samples ``shape`` on ``device``, or a ``Trajectory``.

        Raises:
            TypeError, ValueError: an argument breaks a rule, or the model returns the wrong thing.
        """
        plan = self.plan(model)
        shape = _check_shape(shape, x_T)
        device, dtype = (x_T.device, x_T.dtype) if x_T is not None else (torch.device(device), dtype)
        for name, value in {"dtype": dtype, "model_dtype": model_dtype}.items():
            if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
                raise TypeError(f"{name} must be a floating-point torch.dtype such as torch.float16, got {value!r}")
        run = self._start(
            plan,
            shape,
            seed,
            seeds,
            generator,
            x_T,
            device,
            dtype,
            model_dtype,
            callback is not None or return_trajectory,
        )
        calls = _model_calls(model, conditioning, guidance_scale, unconditional_conditioning)
        trajectory = Trajectory()
        timing = Timing() if timing is None else timing
        bar = tqdm(plan.steps, desc="sampling", unit="step", disable=not progress)
        with torch.inference_mode(), bar:
            for step in bar:
                x_t, x0 = self._advance(step, run, calls, guidance_scale, timing, backend)
                if return_trajectory:
                    trajectory.add(step.t, x_t, x0)
                if callback is not None and callback(step.index, step.t, x_t, x0) is True:
                    break
        if return_trajectory:
            trajectory.x_t.append(run.x_t)
            return trajectory
        return run.x_t

    def _start(self, plan, shape, seed, seeds, generator, x_T, device, dtype, model_dtype, keep_x_t) -> _Run:
        """Allocate every buffer of a run. Outside inference mode, so that the caller gets ordinary tensors."""
        if generator is not None and (seed is not None or seeds is not None):
            raise ValueError("noise comes from one place: pass seed, seeds or generator, got generator and another")
        per_sample = None if generator is not None else _per_sample_seeds(seed, seeds, shape[0]).to(device)
        if x_T is not None:
            x_t = x_T.detach().clone(memory_format=torch.contiguous_format)
        elif generator is not None:
            x_t = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        else:
            x_t = cpu_step.normals(per_sample.cpu(), shape[1:], 0, NoiseStream.INITIAL).to(device, dtype)
        adds_noise = any(step.std_dev_t > 0 for step in plan.steps)
        model_dtype = dtype if model_dtype is None else model_dtype
        return _Run(
            x_t=x_t,
            seeds=per_sample,
            generator=generator,
            x_prev=torch.empty_like(x_t) if keep_x_t else None,
            x0=torch.empty_like(x_t) if keep_x_t else None,
            noise=torch.empty_like(x_t) if generator is not None and adds_noise else None,
            model_input=torch.empty_like(x_t, dtype=model_dtype) if model_dtype != dtype else None,
            timesteps=torch.tensor(plan.timesteps, device=device)[:, None].expand(-1, shape[0]),
        )

    def _advance(
        self, step: PlannedStep, run: _Run, calls, guidance_scale, timing: Timing, backend
    ) -> tuple[Tensor, Tensor | None]:
        """One step: the model, then the update of ``run.x_t``. Returns what the model saw and predicted, where they are kept."""
        started = time.perf_counter()
        t = run.timesteps[step.index]
        model_input = run.x_t if run.model_input is None else run.model_input.copy_(run.x_t)
        outputs = [_apart_from(run.x_t, output_tensor(call(model_input, t), run.x_t)) for call in calls]
        if len(outputs) == 2 and outputs[0].numel() and outputs[0].data_ptr() == outputs[1].data_ptr():
            raise ValueError(
                "with guidance the model is called twice a step, and its second output overwrote the first, got one "
                "tensor from both calls: return a tensor of its own from each, for instance with .clone()"
            )
        called = time.perf_counter()
        model_output, uncond = outputs if len(outputs) == 2 else (outputs[0], None)
        scale = None if uncond is None else guidance_scale
        thresholds = None
        if self.thresholding:
            thresholds = dynamic_thresholds(
                run.x_t,
                model_output,
                step.coefficients,
                self.dynamic_thresholding_ratio,
                self.sample_max_value,
                uncond,
                scale,
            )
        noise = None
        if run.noise is not None and step.std_dev_t > 0:
            noise = run.noise.normal_(generator=run.generator)
        x_t = run.x_t
        run.x_t = ddim_step(
            x_t,
            model_output,
            step.coefficients,
            model_output_uncond=uncond,
            guidance_scale=scale,
            noise=noise,
            seeds=run.seeds if step.std_dev_t > 0 else None,
            noise_step=step.index,
            noise_stream=NoiseStream.STEP,
            thresholds=thresholds,
            out=x_t if run.x_prev is None else run.x_prev,
            x0_out=run.x0,
            backend=backend,
        )
        if run.x_prev is not None:
            run.x_prev = x_t  # the two buffers change places
        timing.model_seconds += called - started
        timing.update_seconds += time.perf_counter() - called
        timing.steps += 1
        return x_t, run.x0


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


def _apart_from(x_t: Tensor, model_output: Tensor) -> Tensor:
    """A copy of a model's output that is another view of its input, since the update overwrites the input."""
    shared = model_output.untyped_storage().data_ptr() == x_t.untyped_storage().data_ptr()
    same = model_output.data_ptr() == x_t.data_ptr() and model_output.stride() == x_t.stride()
    return model_output.clone() if shared and not same else model_output


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
def _finished_plan(plan: SamplingPlan, prediction_type: str, clip_sample_range: float | None) -> SamplingPlan:
    return replace(plan, prediction_type=prediction_type, clip_sample_range=clip_sample_range)


def _check_shape(shape: Sequence[int] | None, x_T: Tensor | None) -> tuple[int, ...]:
    if x_T is not None:
        if not isinstance(x_T, Tensor) or not x_T.dtype.is_floating_point or x_T.ndim < 2:
            raise TypeError(f"x_T must be a floating-point tensor (B, C, ...), got {x_T!r:.80}")
        if shape is not None and tuple(shape) != tuple(x_T.shape):
            raise ValueError(f"shape must be that of x_T, {tuple(x_T.shape)}, or left out, got {tuple(shape)}")
        return tuple(x_T.shape)
    if shape is None:
        raise ValueError("shape is needed, for instance shape=(16, 3, 32, 32), where no x_T is given")
    try:
        shape = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise TypeError(f"shape must be integers (batch, channels, ...), got {shape!r}") from None
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"shape must be (batch, channels, ...) with no negative size, got {shape}")
    return shape


def _per_sample_seeds(seed: int | None, seeds, batch_size: int) -> Tensor:
    """``(B,)`` int64 from one seed, a list of seeds, or torch's global generator."""
    if seed is not None and seeds is not None:
        raise ValueError("noise comes from one place: pass seed or seeds, got both")
    if seeds is None:
        seed = int(torch.randint(2**63 - 1, ())) if seed is None else _integer("seed", seed)
        return torch.from_numpy(sample_seeds(seed, batch_size))
    if isinstance(seeds, (Tensor, np.ndarray)):
        seeds = seeds.tolist()
    if not isinstance(seeds, Sequence):
        raise TypeError(f"seeds must be a list of integers, one per sample, got {seeds!r}: for one number use seed")
    if len(seeds) != batch_size:
        raise ValueError(f"seeds must have one entry per sample, {batch_size}, got {len(seeds)}")
    seeds = [_integer("a seed", s) for s in seeds]
    if bad := [s for s in seeds if not -(1 << 63) <= s < 1 << 64]:
        raise ValueError(f"a seed must fit in 64 bits, got {bad[0]}")
    return torch.tensor([s - (1 << 64) if s >= 1 << 63 else s for s in seeds], dtype=torch.int64)


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got the {type(value).__name__} {value!r}") from None


def _model_calls(
    model: Model, conditioning, guidance_scale, unconditional_conditioning
) -> list[Callable[[Tensor, Tensor], Any]]:
    """The model calls of one step: one, or a conditional and an unconditional one."""
    conditioning = dict(conditioning or {})
    if not callable(model):
        raise TypeError(f"model must be callable as model(x, t, **conditioning), got {type(model).__name__}")
    calls = [lambda x, t: model(x, t, **conditioning)]
    if guidance_scale is None or guidance_scale == 1:
        return calls
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be finite, got {guidance_scale}")
    if unconditional_conditioning is None:
        unconditional = getattr(model, "unconditional", None)
        if unconditional is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs the model's unconditional output, too: pass unconditional_conditioning"
            )
        unconditional_conditioning = unconditional(conditioning)
    without = dict(unconditional_conditioning)
    return [*calls, lambda x, t: model(x, t, **without)]
