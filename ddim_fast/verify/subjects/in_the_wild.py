"""DDIM samplers of other libraries as subjects: ``ddim-fast verify
ddim_fast.verify.subjects.in_the_wild:Azula``.

Each translates names and declares the library's conventions; all arithmetic is the library's own. A
library is imported when its subject is made. docs/FINDINGS.md lists what was found.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...utils.random_state import global_generator
from ..truth.cases import CLEAN, Level, Model, Setting, StepCase, StepResult
from .schedulers import Scheduler, SigmaForm, SigmaScheduler
from .subject import Subject


def library(module: str, package: str) -> Any:
    """Import a module of another library.

    Raises:
        ImportError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this subject needs {package} ({error}): pip install {package}") from error


# --- diffusers --------------------------------------------------------------------------------------------------------


class Diffusers(Scheduler):
    """diffusers' ``DDIMScheduler``. A subclass sets further configuration fields in ``fixed``."""

    home = "diffusers"
    scheduler = "DDIMScheduler"
    fixed: dict[str, Any] = {}  # noqa: RUF012 (never written to)

    def __init__(self):
        self.module = library(self.home, "diffusers")
        super().__init__(getattr(self.module, self.scheduler), self.fixed)
        self.name = f"{type(self).__module__}:{type(self).__qualname__}"

    def code(self, case: StepCase) -> str:
        ours, self.name = self.name, f"{self.home}:{self.scheduler}"
        try:
            return super().code(case)
        finally:
            self.name = ours


class DiffusersInversion(Diffusers):
    """``DDIMScheduler``, with ``DDIMInverseScheduler`` for inversion."""

    def __init__(self):
        super().__init__()
        self.features |= {"invert"}

    def invert(self, setting: Setting, model: Model, x0: Tensor) -> Tensor:
        scheduler = self.module.DDIMInverseScheduler(**self.config(setting))
        scheduler.set_timesteps(setting.num_inference_steps)
        x_t = x0
        for t in scheduler.timesteps:
            output = model(x_t, torch.full((len(x_t),), int(t), dtype=torch.int64, device=x_t.device))
            x_t = scheduler.step(output, t, x_t).prev_sample
        return x_t


class DiffusersFinalAlpha(Diffusers):
    """``DDIMScheduler`` with ``set_alpha_to_one=False``: the last step goes to the noise level of
    timestep 0."""

    fixed = dict(set_alpha_to_one=False)  # noqa: RUF012 (never written to)


class DiffusersOffset(Diffusers):
    """``DDIMScheduler`` as Stable Diffusion 1 and 2 configure it: ``set_alpha_to_one=False``,
    ``steps_offset=1``."""

    fixed = dict(set_alpha_to_one=False, steps_offset=1)  # noqa: RUF012 (never written to)


class DiffusersParallel(Diffusers):
    """``DDIMParallelScheduler``, through ``step``."""

    scheduler = "DDIMParallelScheduler"


class DiffusersBatch(DiffusersParallel):
    """``DDIMParallelScheduler``, through ``batch_step_no_noise``: the whole batch at once, eta = 0."""

    def __init__(self):
        super().__init__()
        self.features -= {"eta", "given_noise", "draws_noise", "x0"}

    def step(self, case: StepCase) -> StepResult:
        scheduler = self.built(case.setting.but(eta=0.0, use_clipped_model_output=False))
        timesteps = scheduler.timesteps[case.index].expand(len(case.x_t))
        options = {"use_clipped_model_output": case.setting.use_clipped_model_output}
        return StepResult(scheduler.batch_step_no_noise(case.model_output, timesteps, case.x_t, **options))

    def code(self, case: StepCase) -> str:
        lines = super().code(case).split("\n")
        option = f"use_clipped_model_output={case.setting.use_clipped_model_output}"
        lines[-3:] = [
            f"t = scheduler.timesteps[{case.index}].expand(len(x_t))",
            f"x_prev = scheduler.batch_step_no_noise(model_output, t, x_t, {option})",
        ]
        return "\n".join(lines)


class DiffusersBatchFinalAlpha(DiffusersBatch):
    """``batch_step_no_noise`` with ``set_alpha_to_one=False``."""

    fixed = dict(set_alpha_to_one=False)  # noqa: RUF012 (never written to)


class FastDiffusersFinalAlpha(DiffusersFinalAlpha):
    """This package's drop-in for ``DDIMScheduler``, with ``set_alpha_to_one=False``."""

    home = "ddim_fast.integrations.diffusers"
    scheduler = "FastDDIMScheduler"


class DiffusersFlowStochastic(SigmaScheduler):
    """``FlowMatchEulerDiscreteScheduler``, at eta = 1 with ``stochastic_sampling=True``."""

    def __init__(self):
        make = library("diffusers", "diffusers").FlowMatchEulerDiscreteScheduler
        super().__init__(make, name=f"{type(self).__module__}:{type(self).__qualname__}")
        self.features |= {"eta", "draws_noise"}
        self.etas = (0.0, 1.0)

    def config(self, setting: Setting) -> dict[str, Any]:
        return super().config(setting) | {"stochastic_sampling": setting.eta > 0}


class DiffusersFlowSolver(SigmaScheduler):
    """``DPMSolverMultistepScheduler`` with flow sigmas, of order 1, which is DDIM."""

    order = 1
    shift = 3.0

    def __init__(self):
        fixed = dict(use_flow_sigmas=True, flow_shift=self.shift, prediction_type="flow_prediction")
        path = Setting(schedule=f"flow?shift={self.shift}&time_scale=1000", prediction_type="flow")
        super().__init__(
            library("diffusers", "diffusers").DPMSolverMultistepScheduler,
            name=f"{type(self).__module__}:{type(self).__qualname__}",
            form=SigmaForm(path, fixed | {"solver_order": self.order}, self.order),
        )


class DiffusersFlowSolver2(DiffusersFlowSolver):
    """The same, of order 2, without a shift, with which its error falls steadily."""

    order = 2
    shift = 1.0


# --- azula ------------------------------------------------------------------------------------------------------------


class Azula(Subject):
    """azula's ``DDIMSampler``. Its eta scales the variance.

    Time is continuous in azula, and the user supplies the noise schedule: here one with the noise
    level of timestep t at time (t + 1) / T.
    """

    eta_scales = "variance"
    features = frozenset(
        [
            "step",
            "levels",
            "explicit_timesteps",
            "eta",
            "draws_noise",
            "epsilon",
            "sample",
            "float64",
            "half",
            "zero_terminal_snr",
            "torch",
        ]
    )

    def __init__(self):
        self.name = f"{type(self).__module__}:{type(self).__qualname__}"
        self.sampler = library("azula.sample", "azula").DDIMSampler

    def step(self, case: StepCase) -> StepResult:
        level, setting = self.levels(case.setting)[case.index], case.setting
        time = torch.float64 if case.dtype is torch.float64 else torch.float32
        schedule = AzulaSchedule(setting, level)
        denoiser = AzulaDenoiser(schedule, setting.prediction_type, case.model_output)
        sampler = self.sampler(denoiser, eta=setting.eta, silent=True)
        t, s = (torch.tensor((i + 1) / schedule.total, dtype=time, device="cpu") for i in (level.t, level.t_prev))
        with global_generator(case.source):
            return StepResult(sampler.step(case.x_t, t, s))

    def code(self, case: StepCase) -> str:
        level, setting = self.levels(case.setting)[case.index], case.setting
        mean = "model_output" if setting.prediction_type == "sample" else "(x - sigma * model_output) / alpha"
        return "\n".join(
            [
                "from types import SimpleNamespace",
                "from azula.sample import DDIMSampler",
                "",
                f"alpha_bar = {{1.0: {level.alpha_bar_t!r}, 0.0: {level.alpha_bar_prev!r}}}",
                "class Denoiser:",
                "    def schedule(self, t):",
                "        a = torch.tensor(alpha_bar[float(t)], dtype=torch.float64)",
                "        return a.sqrt().to(t), (1 - a).sqrt().to(t)",
                "    def __call__(self, x, t):",
                "        alpha, sigma = self.schedule(t)",
                f"        return SimpleNamespace(mean={mean})",
                f"sampler = DDIMSampler(Denoiser(), eta={setting.eta!r}, silent=True)",
                "x_prev = sampler.step(x_t, torch.tensor(1.0), torch.tensor(0.0))",
            ]
        )


class AzulaSchedule:
    """A schedule for azula that has the two noise levels of a step: (alpha, sigma) of a time."""

    def __init__(self, setting: Setting, level: Level):
        self.total = setting.steps if setting.alpha_bars is not None else setting.num_train_timesteps
        self.bars = {round(level.t): level.alpha_bar_t, round(level.t_prev): level.alpha_bar_prev}

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        bar = torch.tensor(self.bars[round(float(t) * self.total) - 1], dtype=torch.float64, device="cpu")
        return bar.sqrt().to(t), (1 - bar).sqrt().to(t)


class AzulaDenoiser:
    """A denoiser for azula that turns a model output into the mean, eps as azula's own plugins do."""

    def __init__(self, schedule: AzulaSchedule, prediction_type: str, output: Tensor):
        self.schedule, self.prediction_type, self.output = schedule, prediction_type, output

    def __call__(self, x_t: Tensor, t: Tensor) -> SimpleNamespace:
        if self.prediction_type == "sample":
            return SimpleNamespace(mean=self.output)
        alpha, sigma = self.schedule(t)
        return SimpleNamespace(mean=(x_t - sigma * self.output) / alpha)


# --- denoising-diffusion-pytorch --------------------------------------------------------------------------------------


class DenoisingDiffusionPytorch(Subject):
    """denoising-diffusion-pytorch's ``GaussianDiffusion.ddim_sample``.

    It chooses its timesteps itself ("trailing" where their number divides T). The noise that it
    starts from is replaced by x_T. It always clips x0 to [-1, 1]; here the setting decides.
    """

    objectives = {"epsilon": "pred_noise", "sample": "pred_x0", "v_prediction": "pred_v"}  # noqa: RUF012 (never written to)
    features = frozenset(["eta", "draws_noise", "epsilon", "sample", "v_prediction"])

    def __init__(self):
        self.name = f"{type(self).__module__}:{type(self).__qualname__}"
        self.module = library("denoising_diffusion_pytorch", "denoising-diffusion-pytorch")

    def sample(self, setting: Setting, model: Model, x_T: Tensor, source: Any) -> Tensor:
        def called(x: Tensor, t: Tensor, x_self_cond: None) -> Tensor:
            return model(x, t)

        vars(called).update(channels=x_T.shape[1], out_dim=x_T.shape[1], self_condition=False)
        diffusion = self._diffusion(setting)(
            called,
            image_size=1,  # ddim_sample does not use it
            timesteps=setting.num_train_timesteps,
            sampling_timesteps=setting.num_inference_steps,
            objective=self.objectives[setting.prediction_type],
            beta_schedule={"linear": "linear", "cosine": "cosine"}[setting.schedule],
            ddim_sampling_eta=setting.eta,
            auto_normalize=False,
        )
        with quiet(self.module.denoising_diffusion_pytorch), global_generator(source), StartFrom(x_T):
            return diffusion.ddim_sample(tuple(x_T.shape)).clone()

    def _diffusion(self, setting: Setting) -> type:
        """Return the class with clipping as the setting says, by the arguments that
        ``model_predictions`` has for it."""
        original = self.module.GaussianDiffusion

        def model_predictions(self: Any, *args: Any, **options: Any) -> Any:
            options["clip_x_start"] = setting.clip_sample_range is not None
            options["rederive_pred_noise"] = setting.use_clipped_model_output
            return original.model_predictions(self, *args, **options)

        return type("WithClipping", (original,), {"model_predictions": model_predictions})

    def levels(self, setting: Setting) -> tuple[Level, ...]:
        return setting.levels(list(_times_of(self, setting.but(prediction_type="epsilon", eta=0.0, schedule="linear"))))

    def levels_seen(self, setting: Setting, timesteps: list[float]) -> tuple[Level, ...]:
        return setting.levels([round(t) for t in timesteps])


class DenoisingDiffusionPytorchClipped(DenoisingDiffusionPytorch):
    """``ddim_sample`` as it is: x0 is clipped to [-1, 1], and eps computed again from it."""

    features = frozenset(["eta", "draws_noise", "epsilon", "clip", "use_clipped_model_output"])


@lru_cache(maxsize=64)
def _times_of(subject: DenoisingDiffusionPytorch, setting: Setting) -> tuple[int, ...]:
    seen: list[int] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t[0]))
        return torch.zeros_like(x)

    subject.sample(setting, model, torch.zeros(1, 1, dtype=torch.float32, device="cpu"), None)
    return tuple(seen)


class StartFrom(TorchFunctionMode):
    """A mode in which the first call of ``torch.randn`` returns a given tensor."""

    def __init__(self, x_T: Tensor):
        super().__init__()
        self.x_T: Tensor | None = x_T

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.randn and self.x_T is not None:
            found, self.x_T = self.x_T, None
            return found
        return function(*args, **(kwargs or {}))


@contextmanager
def quiet(module: Any) -> Iterator[None]:
    """Switch off the progress bars of a module that imports ``tqdm`` by name."""
    before = module.tqdm
    module.tqdm = lambda steps, **_: steps
    try:
        yield
    finally:
        module.tqdm = before


# --- k-diffusion ------------------------------------------------------------------------------------------------------


class KDiffusion(Subject):
    """k-diffusion's ``sample_euler``, and with eta ``sample_euler_ancestral``.

    They work on x_t / sqrt(alpha_bar_t) with noise of standard deviation sigma = sqrt((1 -
    alpha_bar_t) / alpha_bar_t), where Euler's step is DDIM's. k-diffusion's
    ``DiscreteEpsDDPMDenoiser`` and ``DiscreteVDDPMDenoiser`` convert for models of eps and v.
    """

    features = frozenset(["explicit_timesteps", "eta", "draws_noise", "epsilon", "v_prediction"])

    def __init__(self):
        self.name = f"{type(self).__module__}:{type(self).__qualname__}"
        self.sampling = library("k_diffusion.sampling", "k-diffusion")
        self.external = library("k_diffusion.external", "k-diffusion")

    def sample(self, setting: Setting, model: Model, x_T: Tensor, source: Any) -> Tensor:
        denoiser, sigmas = self._denoiser(setting, model), self._sigmas(setting)
        x = x_T * (1 + sigmas[0] ** 2).sqrt().to(x_T)
        with global_generator(source):
            if setting.eta == 0:
                return self.sampling.sample_euler(denoiser, x, sigmas, disable=True)
            return self.sampling.sample_euler_ancestral(denoiser, x, sigmas, eta=setting.eta, disable=True)

    def _denoiser(self, setting: Setting, model: Model | None = None):
        kind = {"epsilon": "DiscreteEpsDDPMDenoiser", "v_prediction": "DiscreteVDDPMDenoiser"}[setting.prediction_type]
        alphas_cumprod = torch.from_numpy(setting.alphas_cumprod()).float()
        return getattr(self.external, kind)(model, alphas_cumprod, quantize=True)

    def _sigmas(self, setting: Setting) -> Tensor:
        timesteps = torch.tensor([round(level.t) for level in setting.levels()], dtype=torch.int64, device="cpu")
        return self.sampling.append_zero(self._denoiser(setting).t_to_sigma(timesteps))

    def levels(self, setting: Setting) -> tuple[Level, ...]:
        timesteps = [round(level.t) for level in setting.levels()]
        bars = [1 / (1 + float(sigma) ** 2) for sigma in self._sigmas(setting)]
        pairs = zip(timesteps, [*timesteps[1:], CLEAN], bars, bars[1:], strict=False)
        return tuple(Level(*level) for level in pairs)


SUBJECTS = {
    "diffusers": (
        Diffusers,
        DiffusersInversion,
        DiffusersFinalAlpha,
        DiffusersOffset,
        DiffusersParallel,
        DiffusersBatch,
        DiffusersBatchFinalAlpha,
        DiffusersFlowStochastic,
        DiffusersFlowSolver,
        DiffusersFlowSolver2,
    ),
    "azula": (Azula,),
    "denoising-diffusion-pytorch": (DenoisingDiffusionPytorch, DenoisingDiffusionPytorchClipped),
    "k-diffusion": (KDiffusion,),
}
"""The adapters of this module, by the package that they need."""

__all__ = [
    "SUBJECTS",
    "Azula",
    "DenoisingDiffusionPytorch",
    "DenoisingDiffusionPytorchClipped",
    "Diffusers",
    "DiffusersBatch",
    "DiffusersBatchFinalAlpha",
    "DiffusersFinalAlpha",
    "DiffusersFlowSolver",
    "DiffusersFlowSolver2",
    "DiffusersFlowStochastic",
    "DiffusersInversion",
    "DiffusersOffset",
    "DiffusersParallel",
    "FastDiffusersFinalAlpha",
    "KDiffusion",
]
