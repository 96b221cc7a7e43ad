"""Adapters for schedulers, steps and samplers of any origin, and the choice of one for an object."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...kernels.dispatch import BACKENDS
from ...utils.checks import refuse
from ...utils.import_string import import_string
from ..truth.cases import Level, Model, Setting, StepCase, StepResult
from .backends import backend_subject
from .subject import FEATURES, Subject, with_new_features

# --- A scheduler as diffusers has them --------------------------------------------------------------------------------


class Scheduler(Subject):
    """A class with ``set_timesteps(count)`` and ``step(model_output, timestep, sample, ...)``.

    A new scheduler is made for each setting.

    Args:
        make: called with those of diffusers' configuration fields that its signature names.
        base: fields that are the same for every setting.
    """

    def __init__(self, make: Callable[..., Any], base: dict[str, Any] | None = None, name: str | None = None):
        self.make, self.base = make, dict(base or {})
        self.name = name or f"{make.__module__}:{make.__qualname__}"
        self._fields = frozenset(_parameters(make))
        step = _parameters(make.step) if inspect.isclass(make) else ()
        offered = {
            "eta": "eta" in step,
            "given_noise": "variance_noise" in step,
            "draws_noise": "eta" in step and ("generator" in step or "variance_noise" not in step),
            "x0": "return_dict" in step,
            "sample": "prediction_type" in self._free,
            "v_prediction": "prediction_type" in self._free,
            "clip": "clip_sample" in self._free,
            "clip_range": {"clip_sample", "clip_sample_range"} <= self._free,
            "use_clipped_model_output": "use_clipped_model_output" in step,
            "zero_terminal_snr": "rescale_betas_zero_snr" in self._free,
            "num_train_timesteps": "num_train_timesteps" in self._free,
        }
        always = {"step", "timesteps", "epsilon", "torch", "half"}
        self.features = frozenset(always | {name for name, is_offered in offered.items() if is_offered})
        self.spacings = self.spacings if "timestep_spacing" in self._free else ()
        self.schedules = self._schedules()
        self.steps_offset = int(self.base.get("steps_offset", 0))
        self.ends_clean = bool(self.base.get("set_alpha_to_one", True))
        self._step_takes = frozenset(step)

    @property
    def _free(self) -> frozenset[str]:
        return self._fields - frozenset(self.base)

    def _schedules(self) -> tuple[str, ...]:
        if self.base.get("trained_betas") is not None or not {"beta_start", "beta_end"} <= self._free:
            return ()
        return self.schedules if "beta_schedule" in self._free else ("linear",)

    def config(self, setting: Setting) -> dict[str, Any]:
        """Return the fields for a setting, by diffusers' names; only those that the class has."""
        beta_start, beta_end, beta_schedule = {
            "linear": (1e-4, 0.02, "linear"),
            "scaled_linear": (0.00085, 0.012, "scaled_linear"),
            "cosine": (1e-4, 0.02, "squaredcos_cap_v2"),
        }[setting.schedule]
        wanted = dict(
            num_train_timesteps=setting.num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            prediction_type=setting.prediction_type,
            timestep_spacing=setting.timestep_spacing,
            clip_sample=setting.clip_sample_range is not None,
            clip_sample_range=1.0 if setting.clip_sample_range is None else setting.clip_sample_range,
            rescale_betas_zero_snr=setting.zero_terminal_snr,
        )
        return {name: value for name, value in wanted.items() if name in self._free} | self.base

    @lru_cache(maxsize=512)  # noqa: B019 (subjects live as long as the process)
    def built(self, setting: Setting) -> Any:
        """Return the scheduler of a setting, with its timesteps set."""
        scheduler = self.make(**self.config(setting))
        scheduler.set_timesteps(setting.num_inference_steps)
        return scheduler

    @lru_cache(maxsize=512)  # noqa: B019 (likewise)
    def levels(self, setting: Setting) -> tuple[Level, ...]:
        scheduler = self.built(setting.but(eta=0.0, use_clipped_model_output=False))
        bars = np.asarray(scheduler.alphas_cumprod, dtype=np.float64)
        timesteps = torch.as_tensor(scheduler.timesteps, device="cpu").double().tolist()
        return setting.levels(timesteps, bars, float(getattr(scheduler, "final_alpha_cumprod", 1.0)))

    def step(self, case: StepCase) -> StepResult:
        scheduler = self.built(case.setting.but(eta=0.0, use_clipped_model_output=False))
        t = scheduler.timesteps[case.index]
        result = scheduler.step(case.model_output, t, case.x_t, **self._options(case))
        if isinstance(result, tuple):
            return StepResult(*result[:2])
        return StepResult(result.prev_sample, getattr(result, "pred_original_sample", None))

    def _options(self, case: StepCase) -> dict[str, Any]:
        setting = case.setting
        options: dict[str, Any] = {"eta": setting.eta} if "eta" in self.features else {}
        if "use_clipped_model_output" in self.features:
            options["use_clipped_model_output"] = setting.use_clipped_model_output
        if case.noise is not None:
            options["variance_noise"] = case.noise
        elif case.source is not None and "generator" in self._step_takes:
            options["generator"] = case.source
        return options

    def code(self, case: StepCase) -> str:
        module, _, attribute = self.name.partition(":")
        options = {k: v for k, v in self._options(case).items() if k not in ("variance_noise", "generator")}
        arguments = "".join(f", {name}={value!r}" for name, value in options.items())
        arguments += ", variance_noise=noise" if case.noise is not None else ""
        return "\n".join(
            [
                f"from {module} import {attribute}",
                "",
                f"scheduler = {attribute}({_keywords(self.config(case.setting))})",
                f"scheduler.set_timesteps({case.setting.num_inference_steps})",
                f"t = scheduler.timesteps[{case.index}]",
                f"x_prev = scheduler.step(model_output, t, x_t{arguments})",
                "x_prev = x_prev[0] if isinstance(x_prev, tuple) else x_prev.prev_sample",
            ]
        )


# --- A step as a function ---------------------------------------------------------------------------------------------


class StepFunction(Subject):
    """A function ``step(x_t, model_output, alpha_bar_t, alpha_bar_prev, ...)`` that returns x_prev,
    or (x_prev, x0).

    It may also take ``eta``, ``noise``, ``generator``, ``prediction_type``, ``clip_sample_range``,
    ``use_clipped_model_output`` and ``out``, which are passed by name. Without ``noise`` and
    ``generator``, it draws its noise from torch's global generator.
    """

    REQUIRED = ("model_output", "alpha_bar_t", "alpha_bar_prev")
    SAMPLES = ("x_t", "sample", "x")

    def __init__(self, function: Callable[..., Any], name: str | None = None):
        self.function = function
        self.name = name or f"{function.__module__}:{function.__qualname__}"
        self._takes = frozenset(_parameters(function))
        self._sample_name = next(n for n in self.SAMPLES if n in self._takes)
        features = {"step", "levels", "epsilon", "torch", "half"}
        by_parameter = {
            "eta": {"eta"},
            "noise": {"given_noise"},
            "prediction_type": {"sample", "v_prediction"},
            "clip_sample_range": {"clip", "clip_range"},
            "use_clipped_model_output": {"use_clipped_model_output"},
            "out": {"in_place"},
        }
        for parameter, offered in by_parameter.items():
            features |= offered if parameter in self._takes else set()
        if "eta" in self._takes and ("generator" in self._takes or "noise" not in self._takes):
            features |= {"draws_noise"}
        self.features = frozenset(features)

    def step(self, case: StepCase) -> StepResult:
        result = self.function(**self._arguments(case))
        return StepResult(*result[:2]) if isinstance(result, tuple) else StepResult(result)

    def source(self, seed: int, batch_size: int) -> Any:
        if "generator" in self._takes:
            return torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        return None

    def _arguments(self, case: StepCase) -> dict[str, Any]:
        level = case.setting.levels()[case.index]
        setting = case.setting
        offered = {
            self._sample_name: case.x_t,
            "model_output": case.model_output,
            "alpha_bar_t": level.alpha_bar_t,
            "alpha_bar_prev": level.alpha_bar_prev,
            "eta": setting.eta,
            "noise": case.noise,
            "generator": case.source,
            "prediction_type": setting.prediction_type,
            "clip_sample_range": setting.clip_sample_range,
            "use_clipped_model_output": setting.use_clipped_model_output,
            "out": case.x_t if case.in_place else None,
        }
        return {name: value for name, value in offered.items() if name in self._takes}

    def code(self, case: StepCase) -> str:
        module, _, attribute = self.name.partition(":")
        names = {self._sample_name: "x_t", "model_output": "model_output", "noise": "noise"}
        arguments = {k: v for k, v in self._arguments(case).items() if k not in ("generator", "out")}
        shown = ", ".join(f"{k}={names.get(k, repr(v))}" for k, v in arguments.items())
        return "\n".join(
            [
                f"from {module} import {attribute}",
                "",
                f"x_prev = {attribute}({shown})",
                "x_prev = x_prev[0] if isinstance(x_prev, tuple) else x_prev",
            ]
        )


# --- A whole sampler as a function ------------------------------------------------------------------------------------


class SamplerFunction(Subject):
    """A function ``sample(model, x_T, ...)`` that returns x0. ``model(x_t, t)`` takes timesteps
    ``(B,)``.

    It may also take ``alphas_cumprod``, ``timesteps``, ``num_inference_steps``, ``eta``,
    ``generator``, ``seeds`` and ``prediction_type``, which are passed by name. The calls of its
    model show the steps, which are checked one by one.
    """

    def __init__(self, function: Callable[..., Tensor], name: str | None = None):
        self.function = function
        self.name = name or f"{function.__module__}:{function.__qualname__}"
        self._takes = frozenset(_parameters(function))
        by_parameter = {
            "num_inference_steps": {"timesteps"},
            "timesteps": {"explicit_timesteps"},
            "eta": {"eta", "draws_noise"},
            "seeds": {"seeds"},
            "prediction_type": {"sample", "v_prediction"},
            "alphas_cumprod": {"num_train_timesteps"},
        }
        features = {"epsilon", "half"}
        for parameter, offered in by_parameter.items():
            features |= offered if parameter in self._takes else set()
        self.features = frozenset(features)
        self.spacings = ()
        self.own_alphas_cumprod = "alphas_cumprod" not in self._takes
        self.schedules = () if self.own_alphas_cumprod else self.schedules

    def source(self, seed: int, batch_size: int) -> Any:
        torch.manual_seed(seed)
        if "seeds" in self._takes:
            return torch.randint(2**62, (batch_size,), device="cpu")
        return torch.Generator().manual_seed(seed) if "generator" in self._takes else None

    def sample(self, setting: Setting, model: Model, x_T: Tensor, source: Any) -> Tensor:
        offered = {
            "alphas_cumprod": torch.from_numpy(setting.alphas_cumprod()),
            "num_inference_steps": setting.steps,
            "eta": setting.eta,
            "generator": source,
            "seeds": source,
            "prediction_type": setting.prediction_type,
        }
        if "timesteps" in self._takes:
            offered["timesteps"] = [int(level.t) for level in setting.levels()]
        return self.function(model, x_T, **{name: value for name, value in offered.items() if name in self._takes})

    def levels_seen(self, setting: Setting, timesteps: list[float]) -> tuple[Level, ...]:
        return setting.levels(timesteps)


# --- Finding the adapter ----------------------------------------------------------------------------------------------


class Adapter(NamedTuple):
    """A form that a subject may have, how to recognise it, and how to make a ``Subject`` of it."""

    form: str
    recognises: Callable[[Any], bool]
    make: Callable[[Any, str | None], Subject]


def _parameters(function: Callable) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def _is_scheduler(value: Any) -> bool:
    return callable(getattr(value, "set_timesteps", None)) and callable(getattr(value, "step", None))


def _is_step(value: Any) -> bool:
    names = _parameters(value) if callable(value) else ()
    return set(StepFunction.REQUIRED) <= set(names) and any(n in names for n in StepFunction.SAMPLES)


def _is_sampler(value: Any) -> bool:
    return callable(value) and _parameters(value)[:1] == ("model",)


def _scheduler(value: Any, name: str | None) -> Subject:
    if inspect.isclass(value):
        return Scheduler(value, name=name)
    varied = Scheduler(type(value)).config(Setting())
    config = {k: v for k, v in dict(getattr(value, "config", {})).items() if k not in varied and not k.startswith("_")}
    return Scheduler(type(value), config)


ADAPTERS = (
    Adapter("a Subject of ddim_fast.verify", lambda v: isinstance(v, Subject), lambda v, name: v),
    Adapter("a subclass of it", lambda v: inspect.isclass(v) and issubclass(v, Subject), lambda v, name: v()),
    Adapter("a scheduler: a class, or an object, with set_timesteps and step", _is_scheduler, _scheduler),
    Adapter("a step: step(x_t, model_output, alpha_bar_t, alpha_bar_prev, ...)", _is_step, StepFunction),
    Adapter("a sampler: sample(model, x_T, ...)", _is_sampler, SamplerFunction),
)
"""The adapters; the first that recognises an object takes it."""


def subject_of(value: Any, device: torch.device | str = "cpu") -> Subject:
    """Return the subject for the name of a backend, ``"module:attribute"``, or an object of any
    form in ``ADAPTERS``.

    Raises:
        ValueError: there is no such backend, module or attribute.
        TypeError: the object has none of the forms.
    """
    name = None
    if isinstance(value, str):
        if value in BACKENDS:
            return backend_subject(value, device)
        name, value = value, _imported(value)
    for adapter in ADAPTERS:
        if adapter.recognises(value):
            return with_new_features(adapter.make(value, name))
    forms = "\n".join(f"  {adapter.form}" for adapter in ADAPTERS)
    refuse(f"a subject must be a backend ({', '.join(BACKENDS)}) or one of\n{forms}", value, kind=TypeError)


def _imported(name: str) -> Any:
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        refuse(
            f"a subject must be a backend ({', '.join(BACKENDS)}) or module:attribute, such as diffusers:DDIMScheduler",
            name,
        )
    return import_string(name, "the subject")


def _keywords(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


__all__ = ["ADAPTERS", "FEATURES", "SamplerFunction", "Scheduler", "StepFunction", "subject_of"]
