"""The backends of ddim_fast as subjects."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...kernels import triton_backend
from ...kernels.contract import StepCoefficients, StepInputs, check_inputs
from ...kernels.density import DensityInputs, check_density_inputs
from ...kernels.dispatch import BACKENDS, ddim_step
from ...kernels.log_prob import ddim_log_prob
from ...kernels.noise import sample_seeds
from ...plans.coefficients import ddim_coefficients
from ...plans.eta import ETA_SCALES
from ...plans.levels import AnyLevel, NoiseLevel
from ...plans.named import make_schedule, schedule_from_text
from ...plans.path import NoisePath
from ...plans.plan import SamplingPlan
from ...plans.schedules import NoiseSchedule
from ...sampler import DDIMSampler
from ...utils.checks import check_choice
from ..truth import oracle
from ..truth.cases import Level, Model, ScoredStep, Setting, StepCase, StepResult
from .subject import FEATURES, Subject

PATHS = (
    Setting(),
    Setting(schedule="flow", prediction_type="flow"),
    Setting(schedule="flow?shift=3&time_scale=1000", prediction_type="flow"),
    Setting(schedule="edm", prediction_type="edm"),
    Setting(schedule="edm?sigma_max=50&rho=5&preconditioned=true", prediction_type="sample"),
    Setting(schedule="vp", prediction_type="epsilon"),
    Setting(schedule="ve", prediction_type="score"),
    Setting(schedule="trigonometric", prediction_type="v_prediction"),
)
"""Every path that ``DDIMSampler`` takes, with what models predict on it."""


class Backend(Subject):
    """A backend of ``ddim_fast``, called through ``ddim_step`` and ``DDIMSampler``."""

    arithmetic = "exact"
    paths = PATHS
    features = frozenset(FEATURES) - {"float64", "torch", "no_waiting", "no_allocation"}

    def __init__(self, name: str):
        self.name = self.backend = name
        if name == "reference":
            self.features |= {"float64"}
        else:
            self.features |= {"no_allocation"}
        if name == "triton":
            self.features |= {"no_waiting"}

    def levels(self, setting: Setting) -> tuple[Level, ...]:
        if setting.alpha_bars is not None:
            return setting.levels()
        steps = self._plan(setting).steps
        return tuple(Level(s.t, s.t_prev, _known(s.level_t), _known(s.level_prev)) for s in steps)

    def step(self, case: StepCase) -> StepResult:
        x0 = None if case.in_place else torch.empty_like(case.x_t)  # a step in place must allocate nothing
        noise_from: dict[str, Any] = {"noise": case.noise}
        if case.noise is None and case.source is not None:
            noise_from = {"seeds": case.source, "noise_step": case.index}
        x_prev = self._step(
            case.x_t,
            case.model_output,
            self.coefficients(case.setting, case.index),
            **noise_from,
            **case.more,
            out=case.x_t if case.in_place else None,
            x0_out=x0,
        )
        return StepResult(x_prev, x0)

    def _step(self, *args: Any, **options: Any) -> Tensor:
        return ddim_step(*args, **options, backend=self.backend)

    def step_with_log_prob(self, case: StepCase) -> ScoredStep:
        noise: dict[str, Any] = {"noise": case.noise}
        if case.noise is None:
            noise = {"seeds": case.source, "noise_step": case.index}
        log_prob = case.x_t.new_empty(len(case.x_t), dtype=torch.float32)
        row = self.coefficients(case.setting, case.index)
        step = self._step
        if case.model_output.requires_grad:  # gradients of a step are the reference's, whichever backend is asked for
            step = ddim_step
        x_prev = step(case.x_t, case.model_output, row, **noise, **case.more, log_prob_out=log_prob)
        return ScoredStep(x_prev, log_prob)

    def log_prob(self, case: StepCase, x_prev: Tensor) -> Tensor:
        row = self.coefficients(case.setting, case.index)
        return self._log_prob(x_prev, case.x_t, case.model_output, row, **case.more)

    def _log_prob(self, *args: Any, **options: Any) -> Tensor:
        return ddim_log_prob(*args, **options, backend=self.backend)

    def source(self, seed: int, batch_size: int) -> Tensor:
        return torch.from_numpy(sample_seeds(seed, batch_size))

    def sample(self, setting: Setting, model: Model, x_T: Tensor, source: Tensor) -> Tensor:
        called: Any = model  # it takes no conditions, and none are given
        samples = self._sampler(setting).sample(called, x_T=x_T, seeds=source, backend=self.backend, capture="off")
        assert isinstance(samples, Tensor)  # not the whole trajectory
        return samples

    def invert(self, setting: Setting, model: Model, x0: Tensor) -> Tensor:
        called: Any = model
        x_T = self._sampler(setting).invert(called, x0, iterations=20, backend=self.backend)
        assert isinstance(x_T, Tensor)
        return x_T

    def code(self, case: StepCase) -> str:
        level = self.levels(case.setting)[case.index]
        setting = case.setting
        lines = [
            "from ddim_fast import ddim_step",
            "from ddim_fast.plans.coefficients import ddim_coefficients, edm_prediction",
            "from ddim_fast.plans.eta import ETA_SCALES",
            "from ddim_fast.plans.levels import NoiseLevel",
            "",
            f"level_t, level_prev = {level.level_t!r}, {level.level_prev!r}",
            f"noise = ETA_SCALES[{self.eta_scales!r}].noise(level_t, level_prev, {setting.eta!r})",
            f"prediction = {_prediction_as_code(setting)}",
            "row = ddim_coefficients(level_t, level_prev, prediction, **noise._asdict(),",
            f"    clip_sample_range={setting.clip_sample_range!r},",
            f"    use_clipped_model_output={setting.use_clipped_model_output!r})",
            f"x_prev = ddim_step(x_t, model_output, row, noise=noise, backend={self.backend!r}, **more)",
        ]
        return "\n".join(lines)

    def coefficients(self, setting: Setting, index: int) -> StepCoefficients:
        """Return the row of a step."""
        if setting.alpha_bars is None:
            return self._plan(setting).steps[index].coefficients
        return _coefficients(*map(_ours, setting.alpha_bars[index]), setting, self.eta_scales)

    def _plan(self, setting: Setting) -> SamplingPlan:
        return self._sampler(setting).plan()

    def _sampler(self, setting: Setting) -> DDIMSampler:
        return _sampler_of(setting, self.eta_scales)


def _known(level: AnyLevel) -> oracle.AnyLevel:
    """Return a level of ours as the harness has it."""
    return oracle.NoiseLevel(*level) if isinstance(level, NoiseLevel) else level


def _ours(level: oracle.AnyLevel) -> AnyLevel:
    return NoiseLevel(*level) if isinstance(level, oracle.NoiseLevel) else level


def _prediction_as_code(setting: Setting) -> str:
    return (
        f"edm_prediction(level_t, {setting.sigma_data})"
        if setting.prediction_type == "edm"
        else repr(setting.prediction_type)
    )


@lru_cache(maxsize=256)
def _coefficients(level_t: AnyLevel, level_prev: AnyLevel, setting: Setting, eta_scales: str) -> StepCoefficients:
    noise = ETA_SCALES[eta_scales].noise(level_t, level_prev, setting.eta)
    return ddim_coefficients(
        level_t,
        level_prev,
        _schedule_of(setting).prediction(setting.prediction_type, level_t),
        **noise._asdict(),
        clip_sample_range=setting.clip_sample_range,
        use_clipped_model_output=setting.use_clipped_model_output,
    )


def _schedule_of(setting: Setting) -> NoisePath:
    if setting.path is not None:
        return schedule_from_text(setting.schedule)
    return make_schedule(setting.schedule, setting.num_train_timesteps)  # type: ignore[arg-type]  # it checks


@lru_cache(maxsize=512)
def _sampler_of(setting: Setting, eta_scales: str) -> DDIMSampler:
    schedule = _schedule_of(setting)
    if setting.zero_terminal_snr:
        assert isinstance(schedule, NoiseSchedule)  # no other ends in noise by rescaling
        schedule = schedule.rescale_zero_terminal_snr()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "one step from noise")  # one step is verified like any other number
        return DDIMSampler(
            schedule,
            num_inference_steps=None if setting.timesteps else setting.num_inference_steps,
            timesteps=setting.timesteps or None,
            timestep_spacing=setting.timestep_spacing if setting.path is None else None,  # type: ignore[arg-type]  # it checks
            order=setting.order,
            eta=setting.eta,
            eta_scales=eta_scales,  # type: ignore[arg-type]  # it checks
            prediction_type=setting.prediction_type,  # type: ignore[arg-type]  # it checks
            clip_sample=setting.clip_sample_range is not None,
            clip_sample_range=setting.clip_sample_range,
            use_clipped_model_output=setting.use_clipped_model_output,
        )


class EmulatedTriton(Backend):
    """The Triton backend without a GPU: compiled for one, its PTX executed on the CPU (see
    ``emulated_gpu``)."""

    # Its runs are loops of single steps, which hand no history on.
    features = Backend.features - {"invert", "log_prob_gradient", "orders"}

    slow = True

    def __init__(self, target: str = "sm_90"):
        super().__init__("triton")
        self.target = target
        self.name = f"triton, its PTX for {target} executed on the CPU"

    def _step(self, x_t: Tensor, model_output: Tensor, coefficients: StepCoefficients, **options: Any) -> Tensor:
        from ...gpu_lab.emulated_gpu import emulated_gpu

        names = {"out": "x_prev", "x0_out": "x0"}
        inputs = StepInputs(
            x_t, model_output, coefficients, **{names.get(name, name): value for name, value in options.items()}
        )
        check_inputs(inputs)
        with emulated_gpu(self.target):
            return triton_backend.run(inputs)

    def _log_prob(
        self,
        x_prev: Tensor,
        x_t: Tensor,
        model_output: Tensor,
        coefficients: StepCoefficients,
        log_prob_reduction: str = "mean",
    ) -> Tensor:
        from ...gpu_lab.emulated_gpu import emulated_gpu

        step = StepInputs(x_t, model_output, coefficients)
        inputs = DensityInputs(step, x_prev=x_prev, reduction=log_prob_reduction)
        check_density_inputs(inputs, "log_prob_reduction")
        with emulated_gpu(self.target):
            return triton_backend.density(inputs)

    def sample(self, setting: Setting, model: Model, x_T: Tensor, source: Tensor) -> Tensor:
        return Subject.sample(self, setting, model, x_T, source)

    def on_gpu(self) -> Subject:
        return Backend("triton")


def reasons_against(name: str, device: torch.device | str) -> list[str]:
    """Return why a backend cannot make steps on this device; empty where it can."""
    x = torch.zeros(1, 4, dtype=torch.float32, device=device)
    row = StepCoefficients(
        x0_x=1.0, x0_m=0.0, eps_x=0.0, eps_m=1.0, eps_0=0.0, prev_x0=1.0, prev_eps=0.0, prev_noise=0.0
    )
    return BACKENDS[name].unsupported_reasons(StepInputs(x, x, row))


def backend_subject(name: str, device: torch.device | str = "cpu") -> Backend:
    """Return the subject for a name in ``BACKENDS``."""
    check_choice("a backend", name, BACKENDS)
    return EmulatedTriton() if name == "triton" and torch.device(device).type == "cpu" else Backend(name)
