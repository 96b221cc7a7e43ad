"""Steps and whole samplers that are functions, as subjects."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from ..truth.cases import Level, Model, ScoredStep, Setting, StepCase, StepResult, nearest
from ..truth.oracle import alpha_sigma
from .subject import Subject


def parameters(function: Callable) -> tuple[str, ...]:
    """Return the names of a function's parameters; none where it does not say."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


# --- A step as a function ---------------------------------------------------------------------------------------------


class StepFunction(Subject):
    """A function ``step(x_t, model_output, alpha_bar_t, alpha_bar_prev, ...)`` that returns x_prev,
    or (x_prev, x0).

    Instead of the two alpha_bars it may take ``alpha_t, sigma_t, alpha_prev, sigma_prev``,
    ``sigma_t, sigma_prev`` (x0 + sigma eps, with models that predict x0) or ``t, t_prev`` (flow
    matching, with models that predict eps - x0), and then belongs to that path, unless verified on
    another. It may also take ``eta``, ``noise``, ``generator``, ``prediction_type``, ``clip_sample_range``,
    ``use_clipped_model_output`` and ``out``, which are passed by name. Without ``noise`` and
    ``generator``, it draws its noise from torch's global generator.

    One that takes ``x_prev`` returns (x_prev, log_prob), ``(B,)``: of the x_prev that is given, or
    where none is, of the one that it draws; None where it has no density. It may take
    ``log_prob_reduction``, "mean" or "sum".
    """

    LEVELS: tuple[tuple[tuple[str, ...], Setting], ...] = (
        (("alpha_bar_t", "alpha_bar_prev"), Setting()),
        (("alpha_t", "sigma_t", "alpha_prev", "sigma_prev"), Setting()),
        (("sigma_t", "sigma_prev"), Setting(schedule="edm?preconditioned=true", prediction_type="sample")),
        (("t", "t_prev"), Setting(schedule="flow", prediction_type="flow")),
    )
    """The names of the levels that a step may take, and the path that each belongs to."""
    SAMPLES = ("x_t", "sample", "x")

    def __init__(self, function: Callable[..., Any], name: str | None = None):
        self.function = function
        self.name = name or f"{function.__module__}:{function.__qualname__}"
        self._takes = frozenset(parameters(function))
        self._sample_name = next(n for n in self.SAMPLES if n in self._takes)
        path = self.path_by_parameters(self._takes)
        assert path is not None, "the adapter recognises steps by their parameters"
        self.paths = (path,)
        self.schedules = () if path.path is not None else self.schedules
        features = {"step", path.prediction_type, "torch", "half"}
        features |= {"explicit_timesteps"} if path.path is not None else set()
        # A time says where on the path a level is, and has none beside it.
        features |= set() if "t_prev" in self._takes else {"levels"}
        by_parameter = {
            "eta": {"eta"},
            "noise": {"given_noise"},
            "prediction_type": {"sample", "v_prediction"},
            "clip_sample_range": {"clip", "clip_range"},
            "use_clipped_model_output": {"use_clipped_model_output"},
            "out": {"in_place"},
            "x_prev": {"log_prob", "given_x_prev", "log_prob_gradient"},
            "log_prob_reduction": {"log_prob_reduction"},
        }
        for parameter, offered in by_parameter.items():
            features |= offered if parameter in self._takes else set()
        if "eta" in self._takes and ("generator" in self._takes or "noise" not in self._takes):
            features |= {"draws_noise"}
        self.features = frozenset(features)

    @classmethod
    def path_by_parameters(cls, takes: Collection[str]) -> Setting | None:
        """Return the path of a function with these parameters; None where they are not a step's."""
        if "model_output" not in takes or not any(name in takes for name in cls.SAMPLES):
            return None
        return next((path for names, path in cls.LEVELS if set(names) <= set(takes)), None)

    def step(self, case: StepCase) -> StepResult:
        result = self.function(**self._arguments(case))
        if "x_prev" in self._takes:
            return StepResult(result[0])
        return StepResult(*result[:2]) if isinstance(result, tuple) else StepResult(result)

    def step_with_log_prob(self, case: StepCase) -> ScoredStep:
        return ScoredStep(*self.function(**self._arguments(case))[:2])

    def log_prob(self, case: StepCase, x_prev: Tensor) -> Tensor:
        offered = self._arguments(case) | {"x_prev": x_prev}
        return self.function(**{name: value for name, value in offered.items() if name not in ("noise", "generator")})[
            1
        ]

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
            "t": level.t,
            "t_prev": level.t_prev,
            **dict(zip(("alpha_t", "sigma_t"), alpha_sigma(level.level_t), strict=True)),
            **dict(zip(("alpha_prev", "sigma_prev"), alpha_sigma(level.level_prev), strict=True)),
            "eta": setting.eta,
            "noise": case.noise,
            "generator": case.source,
            "prediction_type": setting.prediction_type,
            "clip_sample_range": setting.clip_sample_range,
            "use_clipped_model_output": setting.use_clipped_model_output,
            "out": case.x_t if case.in_place else None,
            "log_prob_reduction": case.more.get("log_prob_reduction", self.log_prob_reduction),
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

    One that takes ``sigmas``, the noise levels of a run with the last one 0, belongs to the path x0
    + sigma eps, with models that predict x0 and are told sigma, unless verified on another; there
    ``timesteps`` are real numbers. It may also take ``alphas_cumprod``, ``timesteps``, ``num_inference_steps``, ``eta``,
    ``generator``, ``seeds`` and ``prediction_type``, which are passed by name. The calls of its
    model show the steps, which are checked one by one.
    """

    def __init__(self, function: Callable[..., Tensor], name: str | None = None):
        self.function = function
        self.name = name or f"{function.__module__}:{function.__qualname__}"
        self._takes = frozenset(parameters(function))
        by_parameter = {
            "num_inference_steps": {"timesteps"},
            "timesteps": {"explicit_timesteps"},
            "sigmas": {"explicit_timesteps"},
            "eta": {"eta", "draws_noise"},
            "seeds": {"seeds"},
            "prediction_type": {"sample", "v_prediction"},
            "alphas_cumprod": {"num_train_timesteps"},
        }
        if "sigmas" in self._takes:
            self.paths = (Setting(schedule="edm?preconditioned=true", prediction_type="sample"),)
        features = {self.paths[0].prediction_type, "half"}
        for parameter, offered in by_parameter.items():
            features |= offered if parameter in self._takes else set()
        self.features = frozenset(features)
        self.spacings = ()
        self.own_alphas_cumprod = "alphas_cumprod" not in self._takes and self.paths[0].path is None
        discrete = self.paths[0].path is None and not self.own_alphas_cumprod
        self.schedules = self.schedules if discrete else ()

    def source(self, seed: int, batch_size: int) -> Any:
        torch.manual_seed(seed)
        if "seeds" in self._takes:
            return torch.randint(2**62, (batch_size,), device="cpu")
        return torch.Generator().manual_seed(seed) if "generator" in self._takes else None

    def sample(self, setting: Setting, model: Model, x_T: Tensor, source: Any) -> Tensor:
        offered: dict[str, Any] = {
            "num_inference_steps": setting.steps,
            "eta": setting.eta,
            "generator": source,
            "seeds": source,
            "prediction_type": setting.prediction_type,
        }
        levels = setting.levels() if {"timesteps", "sigmas"} & self._takes else ()
        offered["timesteps"] = [level.t for level in levels]
        offered["sigmas"] = [*(alpha_sigma(level.level_t).sigma for level in levels), 0.0]
        if "alphas_cumprod" in self._takes:
            offered["alphas_cumprod"] = torch.from_numpy(setting.alphas_cumprod())
        return self.function(model, x_T, **{name: value for name, value in offered.items() if name in self._takes})

    def levels_seen(self, setting: Setting, timesteps: list[float]) -> tuple[Level, ...]:
        if setting.path is not None and "explicit_timesteps" in self.features:  # the model is told them in float32
            asked = [level.t for level in setting.levels()]
            timesteps = [nearest(asked, t) for t in timesteps]
        return setting.levels(timesteps)
