"""The sampler: a plan, a model, and the loop between them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .capture import GRAPHS, GraphCache, Job, choose_mode
from .kernels.dispatch import normals
from .kernels.noise import NoiseStream, sample_seeds
from .loop import Loop, Thresholding, Timing, model_calls
from .models import Model
from .plan import SamplingPlan
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
        self.timesteps = _choose_timesteps(schedule, num_inference_steps, timesteps, timestep_spacing, steps_offset)
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
        normals: str = "exact",
        capture: str = "auto",
        reuse_output: bool = False,
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
            normals: how seeds become the noise of steps: "exact", the same bits everywhere; or "fast" (see ``ddim_step``).
            capture: on a CUDA device, run the steps as CUDA graphs, captured in the first call and replayed in later ones (see
                ``capture.GraphCache``): "step", one graph that is replayed for each step; "loop", all steps and model calls in one;
                "off"; or "auto": "step" for an ``nn.Module`` that can be captured, with one warning where it cannot. The model is
                called a few times more before the first capture.
            reuse_output: with a captured loop, return its own memory, which the next call writes to, instead of a copy.

        Returns:
            Samples ``shape`` on ``device``, or a ``Trajectory``.

        Raises:
            TypeError, ValueError: an argument breaks a rule, or the model returns the wrong thing.
        """
        plan = self.plan(model)
        shape = _check_shape(shape, x_T)
        device, dtype = (x_T.device, x_T.dtype) if x_T is not None else (usable_device(device), dtype)
        for name, value in {"dtype": dtype, "model_dtype": model_dtype}.items():
            if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
                raise TypeError(f"{name} must be a floating-point torch.dtype such as torch.float16, got {value!r}")
        conditionings = _conditionings(model, conditioning, guidance_scale, unconditional_conditioning)
        adds_noise = any(step.std_dev_t > 0 for step in plan.steps)
        between = {
            "a callback": callback is not None,
            "return_trajectory": return_trajectory,
            "progress": progress,
            "noise from a generator": generator is not None and adds_noise,
        }
        first_between = next((what for what in between if between[what]), None)
        mode = choose_mode(capture, self.graphs, device, dtype, backend, first_between, model)
        x_t, per_sample = _start(shape, seed, seeds, generator, x_T, device, dtype)
        watched = callback is not None or return_trajectory
        loop = Loop(
            x_t=x_t,
            calls=model_calls(model, conditionings),
            guidance_scale=guidance_scale if len(conditionings) == 2 else None,
            thresholding=self.thresholding,
            seeds=per_sample if adds_noise else None,
            generator=generator,
            noise=torch.empty_like(x_t) if generator is not None and adds_noise else None,
            model_input=torch.empty_like(x_t, dtype=model_dtype) if model_dtype not in (None, dtype) else None,
            x_seen=torch.empty_like(x_t) if watched else None,
            x0=torch.empty_like(x_t) if watched else None,
            normals=normals,
        )
        job = Job(model, plan, loop, conditionings)
        timing = Timing() if timing is None else timing
        trajectory = Trajectory()
        bar = tqdm(plan.steps, desc="sampling", unit="step", disable=not progress)
        using = nullcontext() if mode == "off" else self.graphs.use(mode, job, optional=capture == "auto")
        with using as captured:
            if captured is not None:
                loop = captured.loop
            timesteps = torch.tensor(plan.timesteps, device=device)[:, None].expand(-1, shape[0])
            with torch.inference_mode(), bar:
                if captured is not None and mode == "loop":
                    captured.replay_all(timing)
                    bar = ()
                for step in bar:
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


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: there is no such name, or torch finds no CUDA device.
    """
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be a torch device such as cpu, cuda or cuda:1, got {device!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} needs a CUDA device and a torch built for it, and torch finds none: use cpu")
    return device


def _start(shape, seed, seeds, generator, x_T, device, dtype) -> tuple[Tensor, Tensor | None]:
    """x_T and the seed of each sample. Outside inference mode, so that the caller gets ordinary tensors."""
    if generator is not None and (seed is not None or seeds is not None):
        raise ValueError("noise comes from one place: pass seed, seeds or generator, got generator and another")
    per_sample = None if generator is not None else _per_sample_seeds(seed, seeds, shape[0]).to(device)
    if x_T is not None:
        return x_T.detach().clone(memory_format=torch.contiguous_format), per_sample
    if generator is not None:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype), None
    return normals(per_sample, shape[1:], 0, NoiseStream.INITIAL, dtype), per_sample


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


def _conditionings(model: Model, conditioning, guidance_scale, unconditional_conditioning) -> list[Mapping[str, Any]]:
    """The conditioning of each model call of a step: one, or a conditional and an unconditional one."""
    conditioning = dict(conditioning or {})
    if not callable(model):
        raise TypeError(f"model must be callable as model(x, t, **conditioning), got {type(model).__name__}")
    if guidance_scale is None or guidance_scale == 1:
        return [conditioning]
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be finite, got {guidance_scale}")
    if unconditional_conditioning is None:
        unconditional = getattr(model, "unconditional", None)
        if unconditional is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs the model's unconditional output, too: pass unconditional_conditioning"
            )
        unconditional_conditioning = unconditional(conditioning)
    return [conditioning, dict(unconditional_conditioning)]
