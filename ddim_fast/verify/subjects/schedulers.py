"""Schedulers as diffusers has them, as subjects."""

from __future__ import annotations

import copy
import importlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..truth.cases import Level, Model, Setting, StepCase, StepResult
from ..truth.oracle import NoiseLevel
from .functions import parameters
from .subject import Subject


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
        self._fields = frozenset(parameters(make))
        step = parameters(make.step) if inspect.isclass(make) else ()
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

    def on_path(self, path: Setting) -> Subject:
        raise ValueError(
            f"a scheduler has a path of its own, got schedule = {path.schedule!r}: pass it an object configured for that"
        )

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
        module, _, attribute = self.name.partition("?")[0].partition(":")
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


def _keywords(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


# --- Schedulers that step between sigmas --------------------------------------------------------------------------------


@dataclass(frozen=True)
class SigmaForm:
    """What a scheduler means by the entries of its ``sigmas``, and how it is configured for that.

    Args:
        path: the setting that checks start from; where alpha is 1 - sigma, and where 1, follows
            from it.
        fixed: its configuration.
        order: of its solver.
        at_eta_0: the class that makes deterministic steps in the place of one that always adds the
            noise of eta = 1.
        features: what it offers beside steps, or runs where ``order`` is not 1.
    """

    path: Setting
    fixed: dict[str, Any] = field(default_factory=dict)
    order: int = 1
    at_eta_0: str = ""
    features: frozenset[str] = frozenset(["half", "timesteps"])


_FLOW = Setting(schedule="flow?shift=3&time_scale=1000", prediction_type="flow")

SIGMA_FORMS = {
    "FlowMatchEulerDiscreteScheduler": SigmaForm(_FLOW, {"shift": 3.0}),
    "EulerDiscreteScheduler": SigmaForm(Setting(divided=True)),
    "EulerAncestralDiscreteScheduler": SigmaForm(Setting(divided=True), at_eta_0="EulerDiscreteScheduler"),
    "EDMEulerScheduler": SigmaForm(Setting(schedule="edm", prediction_type="edm")),
}
"""By the name of a class, or of one that it derives from."""


class SigmaScheduler(Scheduler):
    """A scheduler with the noise levels of a run in ``sigmas``, the last of them 0.

    Args:
        make, base, name: as for ``Scheduler``.
        form: an entry of ``SIGMA_FORMS``, by the names of the class's bases unless given.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        base: dict[str, Any] | None = None,
        name: str | None = None,
        form: SigmaForm | None = None,
    ):
        super().__init__(make, base, name)
        found = form or sigma_form(make)
        assert found is not None, "the adapter recognises these classes by their form"
        self.form = found
        self.base = found.fixed | self.base
        path = found.path
        if path.path is not None and "shift" in self.base:
            path = path.but(schedule=f"flow?shift={float(self.base['shift'])}&time_scale=1000")
        self.paths, self.order = (path.but(order=found.order),), found.order
        self.features = found.features | {path.prediction_type, "torch"} | ({"step"} if found.order == 1 else set())
        if found.at_eta_0:
            self.features |= {"eta", "draws_noise"}
            self.etas = (0.0, 1.0)
        self.schedules, self.spacings, self.ends_clean = (), (), True

    def config(self, setting: Setting) -> dict[str, Any]:
        return dict(self.base)

    @lru_cache(maxsize=512)  # noqa: B019 (as in Scheduler)
    def built(self, setting: Setting) -> Any:
        make = self.make
        if setting.eta == 0 and self.form.at_eta_0:
            make = getattr(importlib.import_module("diffusers"), self.form.at_eta_0)
        scheduler = make(**self.config(setting))
        with warnings.catch_warnings():  # of NumPy, which diffusers passes tensors
            warnings.simplefilter("ignore", DeprecationWarning)
            scheduler.set_timesteps(setting.num_inference_steps)
        return scheduler

    @lru_cache(maxsize=512)  # noqa: B019 (likewise)
    def levels(self, setting: Setting) -> tuple[Level, ...]:
        scheduler = self.built(setting)
        sigmas = torch.as_tensor(scheduler.sigmas, device="cpu").double().tolist()
        times = torch.as_tensor(scheduler.timesteps, device="cpu").double().tolist() if setting.divided else sigmas[:-1]
        straight = setting.schedule.startswith("flow")
        pairs = [NoiseLevel(1 - sigma if straight else 1.0, sigma) for sigma in sigmas]
        after = [*times[1:], setting.clean]
        return tuple(Level(*one) for one in zip(times, after, pairs[:-1], pairs[1:], strict=True))

    def step(self, case: StepCase) -> StepResult:
        scheduler = copy.copy(self.built(case.setting))  # its counter of steps belongs to this step
        scheduler.set_begin_index(case.index)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(case.x_t, scheduler.timesteps[case.index])  # it warns of steps without
        options = {"generator": case.source} if case.setting.eta else {}
        result = scheduler.step(case.model_output, scheduler.timesteps[case.index], case.x_t, **options)
        return StepResult(result.prev_sample)

    def sample(self, setting: Setting, model: Model, x_T: Tensor, source: Any) -> Tensor:
        scheduler, x_t = copy.deepcopy(self.built(setting)), x_T
        options = {"generator": source} if setting.eta else {}
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x_t, t) if hasattr(scheduler, "scale_model_input") else x_t
            output = model(scaled, t.expand(len(x_t)).to(x_t.device))
            x_t = scheduler.step(output, t, x_t, **options).prev_sample
        return x_t

    def code(self, case: StepCase) -> str:
        module, _, attribute = self.name.partition("?")[0].partition(":")
        return "\n".join(
            [
                f"from {module} import {attribute}",
                "",
                f"scheduler = {attribute}({_keywords(self.config(case.setting))})",
                f"scheduler.set_timesteps({case.setting.num_inference_steps})",
                f"scheduler.set_begin_index({case.index})",
                f"x_prev = scheduler.step(model_output, scheduler.timesteps[{case.index}], x_t).prev_sample",
            ]
        )


def sigma_form(make: Any) -> SigmaForm | None:
    """Return the form of a class by its name, or by that of one which it derives from."""
    names = [one.__name__ for one in getattr(make, "__mro__", ())]
    return next((SIGMA_FORMS[name] for name in names if name in SIGMA_FORMS), None)
