"""Schedulers of other libraries as contenders: rehearsed on data that is known, and run on the model.

A scheduler is driven as pipelines do: ``set_timesteps``, then for each of its timesteps
``scale_model_input``, the model, ``step``. It starts from the noise that our sampler starts from.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..integrations.named_schedulers import NamedScheduler, configured, told_time
from ..plans.continuous import EDMSchedule, FlowSchedule
from ..plans.levels import NoiseLevel
from ..plans.path import NoisePath
from ..plans.schedules import NoiseSchedule
from ..utils.files import first_line
from ..utils.random_state import global_generator

Predict = Callable[[Tensor, Tensor], Tensor]
"""``predict(x, t)``: the model's output, guidance included."""

AGAINST = "a scheduler to compare with"
"""What ``--against`` names, for errors."""
_POINT = 0.5
"""All data of a rehearsal. Any solver of the path, in any number of steps, ends there."""
_FAR = 0.15
"""How far from it a run may end, root mean square: a last noise level of 0.03 is often left in."""


@dataclass(frozen=True)
class Rehearsal:
    """What a run of a scheduler does, by one without the model.

    Attributes:
        calls: the predictions that it asks for, which are more than the steps where a step takes
            two, or the first ones more.
        draws_noise: whether it draws random numbers on its way.
        times: what the model is told, in order.
    """

    calls: int
    draws_noise: bool
    times: tuple[float, ...]


@dataclass(frozen=True)
class OtherSampler:
    """A scheduler, configured for a path, that samples with a number of steps."""

    named: NamedScheduler
    path: NoisePath
    prediction_type: str
    clip_sample_range: float | None
    settings: dict[str, Any] = field(default_factory=dict)
    num_inference_steps: int = 50

    def scheduler(self) -> Any:
        """Make the scheduler.

        Raises:
            ValueError: it is not one for the path or the prediction.
        """
        return configured(self.named, self.path, self.prediction_type, self.clip_sample_range, self.settings)

    def drive(self, scheduler: Any, predict: Predict, noise: Tensor, generator: torch.Generator) -> Tensor:
        """Return samples of the scheduler like ``noise`` ``(B, C, ...)``, which is standard normal.

        Args:
            generator: what the scheduler draws from, on the device of the noise.
        """
        return drive(scheduler, self.path, self.num_inference_steps, predict, noise, generator)

    def rehearse(self, shape: Sequence[int], device: torch.device) -> Rehearsal:
        """Run the scheduler where all data are one point, and check that it ends there.

        Args:
            shape: of one sample.

        Raises:
            ValueError: it cannot do this path, prediction or number of steps.
        """
        runs = [self._rehearsed(tuple(shape), device, seed) for seed in (0, 1)]
        (seen, samples), (other, _) = runs
        away = (samples.double() - _POINT).square().mean().sqrt().item()
        if not away <= _FAR:
            raise self._refused(
                f"where all data are {_POINT} its samples end {away:.2g} away from them, where a sampler of this path ends on them"
            )
        told = tuple(t for t, _ in seen)
        if told[-1] > told[0]:
            raise self._refused(f"its timesteps go from data to noise, from {told[0]:g} to {told[-1]:g}")
        draws_noise = any(not torch.equal(x, y) for (_, x), (_, y) in zip(seen, other, strict=True))
        return Rehearsal(len(told), draws_noise, told)

    def _rehearsed(
        self, shape: tuple[int, ...], device: torch.device, seed: int
    ) -> tuple[list[tuple[float, Tensor]], Tensor]:
        scheduler = self.scheduler()
        seen: list[tuple[float, Tensor]] = []

        def predict(x: Tensor, t: Tensor) -> Tensor:
            told = float(t[0])
            seen.append((told, x.clone()))
            level, scale = level_told(self.path, told)
            meaning = self.path.prediction(self.prediction_type, level)
            return (_POINT - meaning.x0_x * x / scale) / meaning.x0_m

        size = max(1, math.ceil(64 / math.prod(shape)))  # enough numbers for a mean of squares
        noise = torch.randn(
            (size, *shape), dtype=torch.float32, generator=torch.Generator().manual_seed(0), device="cpu"
        )
        try:
            samples = self.drive(scheduler, predict, noise.to(device), torch.Generator(device).manual_seed(seed))
        except Exception as error:  # whatever the scheduler does
            raise self._refused(f"{type(error).__name__}: {first_line(error)}") from error
        return seen, samples.cpu()

    def _refused(self, reason: str) -> ValueError:
        return ValueError(
            f"a scheduler must sample the model's path {self.path.name!r} from predictions of {self.prediction_type}, "
            f"got {self.named.text} with {self.num_inference_steps} steps: {reason}"
        )


def drive(
    scheduler: Any,
    path: NoisePath,
    num_inference_steps: int,
    predict: Predict,
    noise: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Run a scheduler from standard normal noise ``(B, C, ...)``, and return its samples."""
    takes = inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if "generator" in takes else {}
    source = generator if generator.device.type == "cpu" else None
    with warnings.catch_warnings(), global_generator(None if options else source), torch.no_grad():
        warnings.simplefilter("ignore")  # of their defaults and their use of NumPy
        set_timesteps = inspect.signature(scheduler.set_timesteps).parameters
        scheduler.set_timesteps(num_inference_steps, **({"device": noise.device} if "device" in set_timesteps else {}))
        x_t = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x_t, t) if hasattr(scheduler, "scale_model_input") else x_t
            told = told_time(path, float(t))
            whole = isinstance(path, NoiseSchedule) and told == round(told)
            dtype = torch.int64 if whole else torch.float32
            output = predict(scaled, torch.full((len(x_t),), told, dtype=dtype, device=x_t.device))
            x_t = scheduler.step(output, t, x_t, **options, return_dict=False)[0]
    return x_t


def short_name(text: str) -> str:
    """Return a name for people: ``UniPCMultistep (solver_order=3)``."""
    name, _, options = text.partition("?")
    name = name.removeprefix("diffusers:").removesuffix("Scheduler")
    return f"{name} ({options.replace('&', ', ')})" if options else name


def level_told(path: NoisePath, told: float) -> tuple[NoiseLevel, float]:
    """Return the noise level at which the model is told this, and what its input is scaled by there.

    Between two timesteps sigma / alpha is linear, as schedulers have it.
    """
    if isinstance(path, FlowSchedule):
        return NoiseLevel(1 - told / path.time_scale, told / path.time_scale), 1.0
    if isinstance(path, EDMSchedule):
        sigma = math.exp(4 * told)
        return NoiseLevel(1.0, sigma), path.input_scale(sigma)
    assert isinstance(path, NoiseSchedule)  # no other is configured
    bars = path.alphas_cumprod
    ratio = np.sqrt((1 - bars) / np.maximum(bars, np.finfo(np.float64).tiny))
    sigma = float(np.interp(told, np.arange(len(bars)), ratio))
    return NoiseLevel(1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)), 1.0
