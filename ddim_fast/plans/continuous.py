"""Noise schedules in continuous time: flow matching, EDM, variance preserving and variance
exploding paths, in float64.

A timestep is a real number here. Each class says what the noise level is at a time, what the model
is told there, and from where to where sampling goes; ``select`` chooses the times of a run. A new
path is one class and one entry of ``CONTINUOUS_SCHEDULES``.

Sources: flow matching (Lipman et al. 2022, arXiv 2210.02747) and its shift (Esser et al. 2024,
arXiv 2403.03206), EDM (Karras et al. 2022, arXiv 2206.00364), score-based SDEs (Song et al. 2021,
arXiv 2011.13456), simple diffusion (Hoogeboom et al. 2023, arXiv 2301.11093), beta sampling (Lee et
al. 2024, arXiv 2407.12173).
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.checks import check_choice, check_integer, check_number
from .coefficients import Prediction, edm_prediction
from .levels import AnyLevel, NoiseLevel
from .path import NoisePath
from .timestep_lists import explicit_times
from .timesteps import beta_quantiles

__all__ = [
    "CONTINUOUS_SCHEDULES",
    "CONTINUOUS_SPACINGS",
    "ContinuousSchedule",
    "CosineSchedule",
    "EDMSchedule",
    "FlowSchedule",
    "VESchedule",
    "VPSchedule",
]


class ContinuousSchedule(NoisePath):
    """A path in continuous time. Subclasses are frozen dataclasses: equal where their fields are.

    Time 0 is clean data, where the last step of every run ends.
    """

    time_dtype = torch.float32
    after_last = 0.0
    default_spacing = "uniform"

    @property
    def rho(self) -> float:
        """The exponent of "karras" spacing."""
        return 7.0

    @property
    def parameters(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]  # subclasses are dataclasses

    @property
    def spacings(self) -> tuple[str, ...]:
        return tuple(CONTINUOUS_SPACINGS)

    @property
    @abstractmethod
    def first(self) -> float:
        """The noisiest time, from which sampling starts."""

    @property
    @abstractmethod
    def last(self) -> float:
        """The cleanest time that spacings with an end of their own visit."""

    _levels_depend_on: tuple[str, ...] = ()
    """The fields that the level at a time depends on: other fields choose times, or say what the
    model is told."""

    @property
    def digest(self) -> str:
        values = {name: float(getattr(self, name)) for name in self._levels_depend_on}
        return hashlib.sha256(repr((self.name, values)).encode()).hexdigest()

    def serves_models_of(self, other: NoisePath) -> bool:
        if not isinstance(other, ContinuousSchedule) or not super().serves_models_of(other):
            return False
        t = max(self.last, other.last)
        told, of_other = ((path.model_time(t), path.input_scale(t)) for path in (self, other))
        return told == of_other

    def level(self, t: float) -> NoiseLevel:
        """Return the noise level at time ``t``; at 0 it is clean data.

        Raises:
            ValueError: ``t`` is not within [0, first].
        """
        if not 0 <= t <= self.first:
            raise ValueError(f"t must lie in [0, {self.first:g}] on the path {self.name!r}, got {t}: 0 is clean data")
        return self._level(float(t)) if t > 0 else NoiseLevel(1.0, 0.0)

    @abstractmethod
    def _level(self, t: float) -> NoiseLevel:
        """Return the level at a time in (0, first]."""

    @abstractmethod
    def time_of_half_log_snr(self, value: float) -> float:
        """Return the time at which log(alpha / sigma) has this value."""

    def check_model_timesteps(self, model_timesteps: tuple[float, ...], num_inference_steps: int) -> None:
        fitting = len(model_timesteps) == num_inference_steps
        if not fitting or not all(0 < t <= self.first for t in model_timesteps):
            raise ValueError(
                f"model_timesteps must be {num_inference_steps} numbers, one for each timestep visited, in (0, {self.first:g}], "
                f"got {list(model_timesteps)}"
            )

    # ---- choosing times --------------------------------------------------------------------------------------------

    def select(self, num_inference_steps: int, spacing: str | None = None) -> tuple[float, ...]:
        """Choose the times of a run.

        Args:
            num_inference_steps: S >= 1.
            spacing: a key of ``CONTINUOUS_SPACINGS``; None for the path's own.

        Returns:
            S times, strictly decreasing from ``first``, all greater than 0. The step after the last
            ends at clean data.

        Raises:
            TypeError, ValueError: an argument breaks a rule.
        """
        count = check_integer("num_inference_steps", num_inference_steps, at_least=1)
        spacing = self.default_spacing if spacing is None else spacing
        check_choice("timestep_spacing", spacing, CONTINUOUS_SPACINGS, "for a list of your own pass timesteps=[...]")
        times = self._finished(CONTINUOUS_SPACINGS[spacing](self, count))
        times[0] = self.first  # exactly, whatever the spacing's arithmetic rounds to
        return self.explicit(times.tolist())

    def explicit(self, timesteps: Sequence[float] | np.ndarray | Tensor) -> tuple[float, ...]:
        """Check a list of times of the caller's own, and return it as floats.

        Raises:
            TypeError: it is no list of numbers.
            ValueError: it is empty, leaves (0, first], or is not strictly decreasing.
        """
        times = explicit_times(timesteps)
        for index, t in enumerate(times):
            if t > self.first:
                raise ValueError(
                    f"timesteps must lie in (0, {self.first:g}] on the path {self.name!r}, got timesteps[{index}] = {t}: "
                    "convert other units first"
                )
        return times

    def _warped(self, times: np.ndarray) -> np.ndarray:
        """Return evenly spaced times as this path distributes them."""
        return times

    def _finished(self, times: np.ndarray) -> np.ndarray:
        """Return chosen times as this path ends them."""
        return times

    @property
    def _range(self) -> tuple[float, float]:
        """The first and the last time of a spacing that does not follow from even times."""
        first, last = self._warped(np.array([self.first, self.last], dtype=np.float64))
        return float(first), float(last)

    def _scale_of(self, t: float) -> float:
        """Return the noise scale that "karras" and "exponential" divide evenly."""
        return t

    def _time_of_scale(self, scale: np.ndarray) -> np.ndarray:
        return scale


# ---- spacings: each gives S decreasing times, the first of them ``first`` -----------------------------------------


def _uniform(schedule: ContinuousSchedule, count: int) -> np.ndarray:
    """Even steps from ``first`` to 0, which is the end of the last step and not visited."""
    return schedule._warped(schedule.first * (1 - np.arange(count) / count))


def _linspace(schedule: ContinuousSchedule, count: int) -> np.ndarray:
    """Even steps from ``first`` to ``last``, and a shorter one from there."""
    return schedule._warped(np.linspace(schedule.first, schedule.last, count))


def _karras(schedule: ContinuousSchedule, count: int) -> np.ndarray:
    """Even in the noise scale to the power 1 / rho (EDM, equation 5)."""
    first, last = (schedule._scale_of(t) ** (1 / schedule.rho) for t in schedule._range)
    return schedule._time_of_scale(np.linspace(first, last, count) ** schedule.rho)


def _exponential(schedule: ContinuousSchedule, count: int) -> np.ndarray:
    """Even in the logarithm of the noise scale."""
    first, last = (math.log(schedule._scale_of(t)) for t in schedule._range)
    return schedule._time_of_scale(np.exp(np.linspace(first, last, count)))


def _beta(schedule: ContinuousSchedule, count: int) -> np.ndarray:
    """Quantiles of Beta(0.6, 0.6) between the times ``first`` and ``last`` (arXiv 2407.12173)."""
    first, last = schedule._range
    quantiles = beta_quantiles(np.linspace(1, 0, count), 0.6) if count > 1 else np.ones(1)
    return last + (first - last) * quantiles


def _log_snr(schedule: ContinuousSchedule, count: int) -> np.ndarray:
    """Even in the log signal-to-noise ratio.

    Where the path starts at pure noise, which has none, the times after the first are even from the
    ratio that is as far below 1 as that of ``last`` is above it.
    """
    first, last = (schedule._level(t).half_log_snr for t in schedule._range)
    wanted = np.linspace(first if math.isfinite(first) else -abs(last), last, count)
    return np.array([schedule.time_of_half_log_snr(value) for value in wanted.tolist()], dtype=np.float64)


CONTINUOUS_SPACINGS: dict[str, Callable[[ContinuousSchedule, int], np.ndarray]] = {
    "uniform": _uniform,
    "trailing": _uniform,  # what the same choice is called in discrete time
    "linspace": _linspace,
    "karras": _karras,
    "exponential": _exponential,
    "beta": _beta,
    "log_snr": _log_snr,
}
"""Spacings by name: each takes a schedule and S, and returns S times."""


# ---- paths -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowSchedule(ContinuousSchedule):
    """Flow matching's straight path x_t = (1 - t) x0 + t eps, for t from 1 to 0 (rectified flow;
    Stable Diffusion 3, Flux, Qwen-Image, Wan, LTX, pi0).

    A deterministic DDIM step along it is flow matching's Euler step, x_s = x_t + (s - t) v.

    A model that counts time from noise (0) to data (1) and predicts x0 - eps is used as ``lambda x,
    t, **c: -model(x, 1 - t, **c)``.

    Args:
        shift: moves times towards the noise, t -> shift t / (1 + (shift - 1) t) (arXiv 2403.03206,
            equation 23); 1 for none, 3 for Stable Diffusion 3. See ``for_resolution``.
        time_scale: the model is told ``time_scale * t``: 1, or 1000 for diffusers' transformers.
        num_train_timesteps: the cleanest time that "linspace", "karras", "exponential", "beta" and
            "log_snr" spacing visit is 1 / num_train_timesteps, before the shift.
        shift_terminal: stretch the times so that the last one visited is this (LTX-Video); None for
            no stretching.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    shift: float = 1.0
    time_scale: float = 1.0
    num_train_timesteps: int = 1000
    shift_terminal: float | None = None

    name = "flow"
    default_prediction_type = "flow"
    first = 1.0

    def __post_init__(self) -> None:
        check_number("shift", self.shift, above=0, remedy="1 is no shift, 3 is Stable Diffusion 3's")
        check_number("time_scale", self.time_scale, above=0)
        check_integer("num_train_timesteps", self.num_train_timesteps, at_least=2)
        if self.shift_terminal is not None:
            check_number("shift_terminal", self.shift_terminal, above=0, at_most=0.999)

    @classmethod
    def for_resolution(
        cls,
        image_seq_len: int,
        *,
        base_seq_len: int = 256,
        max_seq_len: int = 4096,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        **others: Any,
    ) -> FlowSchedule:
        """Return the schedule whose shift is exp(mu), with mu linear in the length of the sequence
        that the transformer sees (Flux's defaults, and diffusers' ``calculate_shift``).

        Args:
            image_seq_len: the number of image tokens, for Flux (height / 16) (width / 16).
            others: fields of the schedule.

        Raises:
            TypeError, ValueError: an argument is out of range.
        """
        check_integer("image_seq_len", image_seq_len, at_least=1)
        slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
        return cls(math.exp(base_shift + slope * (image_seq_len - base_seq_len)), **others)

    @property
    def last(self) -> float:
        return 1 / self.num_train_timesteps

    def model_time(self, t: float) -> float:
        return self.time_scale * t

    def initial_std_dev(self, t: float) -> float:
        return t

    def time_of_half_log_snr(self, value: float) -> float:
        return 1 / (1 + math.exp(value))

    def _level(self, t: float) -> NoiseLevel:
        return NoiseLevel(1 - t, t)

    def _warped(self, times: np.ndarray) -> np.ndarray:
        return self.shift * times / (1 + (self.shift - 1) * times)

    def _finished(self, times: np.ndarray) -> np.ndarray:
        if self.shift_terminal is None or len(times) == 1:
            return times
        return 1 - (1 - times) * ((1 - self.shift_terminal) / (1 - times[-1]))


@dataclass(frozen=True)
class EDMSchedule(ContinuousSchedule):
    """EDM's path x = x0 + sigma eps; a timestep is sigma itself (Karras et al. 2022, arXiv
    2206.00364).

    Args:
        sigma_min, sigma_max: the cleanest and the noisiest level that are visited.
        rho: the exponent of "karras" spacing, which is the default.
        sigma_data: the standard deviation of the clean data that the model was trained with.
        preconditioned: whether the model is the denoiser D(x; sigma), with EDM's preconditioning
            inside, as NVIDIA's ``EDMPrecond`` is: it is told sigma and returns x0. Otherwise it is
            the raw network F: it is given c_in x, with c_in = 1 / sqrt(sigma^2 + sigma_data^2), is
            told c_noise = log(sigma) / 4, and returns F (prediction type "edm").

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5
    preconditioned: bool = False

    name = "edm"
    default_spacing = "karras"

    def __post_init__(self) -> None:
        _check_range(self.sigma_min, self.sigma_max)
        check_number("rho", self.rho, above=0, remedy="7.0 is usual")
        check_number("sigma_data", self.sigma_data, above=0, remedy="0.5 is usual")
        if not isinstance(self.preconditioned, bool):
            raise TypeError(f"preconditioned must be True or False, got {self.preconditioned!r}")

    @property
    def default_prediction_type(self) -> str:
        return "sample" if self.preconditioned else "edm"

    @property
    def first(self) -> float:
        return self.sigma_max

    @property
    def last(self) -> float:
        return self.sigma_min

    def model_time(self, t: float) -> float:
        return t if self.preconditioned else math.log(t) / 4

    def input_scale(self, t: float) -> float:
        return 1.0 if self.preconditioned else 1 / math.hypot(t, self.sigma_data)

    def initial_std_dev(self, t: float) -> float:
        return t

    def prediction(self, prediction_type: str, level: AnyLevel) -> Prediction:
        if prediction_type == "edm":
            return edm_prediction(level, self.sigma_data)
        return super().prediction(prediction_type, level)

    def time_of_half_log_snr(self, value: float) -> float:
        return math.exp(-value)

    def _level(self, t: float) -> NoiseLevel:
        return NoiseLevel(1.0, t)


@dataclass(frozen=True)
class VESchedule(ContinuousSchedule):
    """The variance exploding path x = x0 + sigma eps; a timestep is sigma, which the model is told
    (Song et al. 2021, arXiv 2011.13456).

    Args:
        sigma_min, sigma_max: the cleanest and the noisiest level that are visited.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    name = "ve"
    default_prediction_type = "score"
    default_spacing = "exponential"

    def __post_init__(self) -> None:
        _check_range(self.sigma_min, self.sigma_max)

    @property
    def first(self) -> float:
        return self.sigma_max

    @property
    def last(self) -> float:
        return self.sigma_min

    def initial_std_dev(self, t: float) -> float:
        return t

    def time_of_half_log_snr(self, value: float) -> float:
        return math.exp(-value)

    def _level(self, t: float) -> NoiseLevel:
        return NoiseLevel(1.0, t)


@dataclass(frozen=True)
class VPSchedule(ContinuousSchedule):
    """The variance preserving path in continuous time, for t from 1 to 0: beta(t) = beta_min + t
    (beta_max - beta_min) (Song et al. 2021, arXiv 2011.13456, equation 33).

    Args:
        beta_min, beta_max: beta at times 0 and 1.
        time_scale: the model is told ``time_scale * t``: 1, or 999 for models that were trained
            with 1,000 discrete timesteps.
        last: the cleanest time that "linspace", "karras", "exponential", "beta" and "log_snr"
            spacing visit.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    time_scale: float = 1.0
    last: float = 1e-3

    name = "vp"
    _levels_depend_on = ("beta_min", "beta_max")
    first = 1.0

    def __post_init__(self) -> None:
        check_number("beta_min", self.beta_min, above=0)
        check_number("beta_max", self.beta_max, above=0)
        check_number("time_scale", self.time_scale, above=0)
        check_number("last", self.last, above=0, at_most=0.999)

    def model_time(self, t: float) -> float:
        return self.time_scale * t

    def time_of_half_log_snr(self, value: float) -> float:
        # -log alpha^2 = log(1 + exp(-2 lambda)) = beta_min t + (beta_max - beta_min) t^2 / 2.
        wanted = float(np.logaddexp(0.0, -2 * value))
        slope = self.beta_max - self.beta_min
        return 2 * wanted / (self.beta_min + math.sqrt(self.beta_min**2 + 2 * slope * wanted))

    def _level(self, t: float) -> NoiseLevel:
        log_alpha_bar = -(self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2)
        return NoiseLevel(math.exp(log_alpha_bar / 2), math.sqrt(-math.expm1(log_alpha_bar)))

    def _scale_of(self, t: float) -> float:
        level = self._level(t)
        return level.sigma / level.alpha

    def _time_of_scale(self, scale: np.ndarray) -> np.ndarray:
        return np.array([self.time_of_half_log_snr(-math.log(value)) for value in scale.tolist()], dtype=np.float64)


@dataclass(frozen=True)
class CosineSchedule(ContinuousSchedule):
    """The variance preserving path x_t = cos(pi t / 2) x0 + sin(pi t / 2) eps, for t from 1 to 0
    (simple diffusion, arXiv 2301.11093; TrigFlow, arXiv 2410.11081). It starts at pure noise.

    Args:
        shift: divides alpha / sigma: d / 64 for pictures of d pixels, after arXiv 2301.11093,
            section 3.1.
        time_scale: the model is told ``time_scale * t``; pi / 2 for TrigFlow.
        last: the cleanest time that "linspace", "karras", "exponential", "beta" and "log_snr"
            spacing visit.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    shift: float = 1.0
    time_scale: float = 1.0
    last: float = 1e-3

    name = "trigonometric"
    _levels_depend_on = ("shift",)
    default_prediction_type = "v_prediction"
    first = 1.0

    def __post_init__(self) -> None:
        check_number("shift", self.shift, above=0, remedy="1 is no shift")
        check_number("time_scale", self.time_scale, above=0)
        check_number("last", self.last, above=0, at_most=0.999)

    def model_time(self, t: float) -> float:
        return self.time_scale * t

    def time_of_half_log_snr(self, value: float) -> float:
        return math.atan(math.exp(-value) / self.shift) * 2 / math.pi

    def _level(self, t: float) -> NoiseLevel:
        if t == 1:
            return NoiseLevel(0.0, 1.0)
        # The angle from the nearer end, so that both ends keep their digits.
        angle = math.pi / 2 * t
        alpha, sigma = math.sin(math.pi / 2 * (1 - t)), math.sin(angle) * self.shift
        total = math.hypot(alpha, sigma)
        return NoiseLevel(alpha / total, sigma / total)

    def _scale_of(self, t: float) -> float:
        """Return the angle: the ratio of sigma to alpha is infinite at t = 1."""
        level = self._level(t)
        return math.atan2(level.sigma, level.alpha)

    def _time_of_scale(self, scale: np.ndarray) -> np.ndarray:
        return np.arctan(np.tan(scale) / self.shift) * 2 / math.pi


def _check_range(sigma_min: float, sigma_max: float) -> None:
    check_number("sigma_min", sigma_min, above=0)
    check_number("sigma_max", sigma_max, above=0)
    if sigma_min >= sigma_max:
        raise ValueError(f"sigma_min must be less than sigma_max, got {sigma_min} and {sigma_max}: exchange them")


CONTINUOUS_SCHEDULES: dict[str, Callable[..., ContinuousSchedule]] = {
    "flow": FlowSchedule,
    "edm": EDMSchedule,
    "vp": VPSchedule,
    "ve": VESchedule,
    "trigonometric": CosineSchedule,
}
"""Continuous paths by name; each takes the fields of its class."""
