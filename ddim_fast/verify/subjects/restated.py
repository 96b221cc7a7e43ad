"""Steps with log-probabilities of codes that train with them, and are no packages, as subjects:
``ddim-fast verify ddim_fast.verify.subjects.restated:DDPO``.

Each restates a function as it was read at the commit in ``SOURCES``: its formulas, the types
that it computes in, and what it rounds when. The lines are ours; the schedulers are diffusers'.
docs/FINDINGS.md lists what was found.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..truth.cases import ScoredStep, StepCase, StepResult
from .in_the_wild import Diffusers, DiffusersOffset, library
from .schedulers import SigmaScheduler

SOURCES = {
    "ddpo-pytorch": ("1958463", "kvablack/ddpo-pytorch: ddpo_pytorch/diffusers_patch/ddim_with_logprob.py"),
    "flow_grpo": ("54809b5", "yifan123/flow_grpo: flow_grpo/diffusers_patch/sd3_sde_with_logprob.py"),
}
"""The commit and the file of each code that is restated."""

_SCORED = frozenset({"log_prob", "given_x_prev", "log_prob_gradient", "given_noise"})


def _noise(case: StepCase, dtype: torch.dtype) -> Tensor:
    if case.noise is not None:
        return case.noise.to(dtype)
    return torch.randn(case.x_t.shape, generator=case.source, dtype=dtype, device=case.x_t.device)


def _mean_over_elements(each: Tensor) -> Tensor:
    return each.mean(dim=tuple(range(1, each.ndim)))


def _mean_of_log_density(x_prev: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    squares = (x_prev.detach() - mean) ** 2
    return _mean_over_elements(-squares / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi))


class DDPO(DiffusersOffset):
    """``ddim_step_with_logprob`` of DDPO, on ``DDIMScheduler`` as Stable Diffusion configures it.

    Coefficients are float32 tensors in the shape of the samples, so that half precision is promoted;
    the log-probability is that of x_prev before it is rounded again. Only "leading" spacing: what
    diffusers' others are, findings of its own say.
    """

    def __init__(self):
        super().__init__()
        self.spacings = ("leading",)
        self.features = (self.features | _SCORED) - {"x0", "zero_terminal_snr"}

    def step(self, case: StepCase) -> StepResult:
        return StepResult(self.step_with_log_prob(case).x_prev)

    def step_with_log_prob(self, case: StepCase) -> ScoredStep:
        mean, std = self._gaussian(case)
        x_prev = mean + std * _noise(case, case.model_output.dtype)
        return ScoredStep(x_prev.to(case.dtype), self._log_prob(x_prev, mean, std))

    def log_prob(self, case: StepCase, x_prev: Tensor) -> Tensor:
        return self._log_prob(x_prev, *self._gaussian(case))

    def _log_prob(self, x_prev: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return _mean_of_log_density(x_prev, mean, std)

    def _gaussian(self, case: StepCase) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation, both like the samples."""
        setting, x, m = case.setting, case.x_t, case.model_output
        scheduler = self.built(setting.but(eta=0.0, use_clipped_model_output=False))
        t = int(scheduler.timesteps[case.index])
        target = max(t - setting.num_train_timesteps // setting.num_inference_steps, 0)
        a, p = (scheduler.alphas_cumprod[i].to(x.device).expand(x.shape) for i in (t, target))
        x0, eps = {
            "epsilon": lambda: ((x - (1 - a).sqrt() * m) / a.sqrt(), m),
            "sample": lambda: (m, (x - a.sqrt() * m) / (1 - a).sqrt()),
            "v_prediction": lambda: (a.sqrt() * x - (1 - a).sqrt() * m, a.sqrt() * m + (1 - a).sqrt() * x),
        }[setting.prediction_type]()
        if setting.clip_sample_range is not None:
            x0 = x0.clamp(-setting.clip_sample_range, setting.clip_sample_range)
        std = setting.eta * ((1 - p) / (1 - a) * (1 - a / p)).sqrt()
        if setting.use_clipped_model_output:
            eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        return p.sqrt() * x0 + (1 - p - std**2).sqrt() * eps, std

    def code(self, case: StepCase) -> str:
        raise NotImplementedError


class DDPOToCleanData(DDPO):
    """The same with ``set_alpha_to_one=True`` and ``steps_offset=0``, diffusers' defaults."""

    fixed = Diffusers.fixed


class FlowGRPO(SigmaScheduler):
    """``sde_step_with_logprob`` of Flow-GRPO, on ``FlowMatchEulerDiscreteScheduler``, at its own noise
    level. All in float32."""

    eta_scales = "flow_grpo"

    def __init__(self):
        make = library("diffusers", "diffusers").FlowMatchEulerDiscreteScheduler
        super().__init__(make, name=f"{type(self).__module__}:{type(self).__qualname__}")
        self.features = (self.features | _SCORED) - {"half"}
        self.etas = (0.7,)

    def step(self, case: StepCase) -> StepResult:
        return StepResult(self.step_with_log_prob(case).x_prev)

    def step_with_log_prob(self, case: StepCase) -> ScoredStep:
        mean, std = self._gaussian(case)
        x_prev = mean + std * _noise(case, torch.float32)
        return ScoredStep(x_prev, self._log_prob(x_prev, mean, std))

    def log_prob(self, case: StepCase, x_prev: Tensor) -> Tensor:
        return self._log_prob(x_prev, *self._gaussian(case))

    def _log_prob(self, x_prev: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return _mean_of_log_density(x_prev, mean, std)

    def _gaussian(self, case: StepCase) -> tuple[Tensor, Tensor]:
        x, v = case.x_t.float(), case.model_output.float()
        sigmas = self.built(case.setting).sigmas.to(x.device)
        sigma, sigma_prev = sigmas[case.index], sigmas[case.index + 1]
        return self._between(x, v, sigma, sigma_prev, sigmas[1], case.setting.eta)

    def _between(
        self, x: Tensor, v: Tensor, sigma: Tensor, sigma_prev: Tensor, largest: Tensor, noise_level: float
    ) -> tuple[Tensor, Tensor]:
        dt = sigma_prev - sigma
        diffusion = (sigma / (1 - torch.where(sigma == 1, largest, sigma))).sqrt() * noise_level
        pull = diffusion**2 / (2 * sigma)
        return x * (1 + pull * dt) + v * (1 + pull * (1 - sigma)) * dt, diffusion * (-dt).sqrt()

    def code(self, case: StepCase) -> str:
        raise NotImplementedError


class FlowGRPOWithCPS(FlowGRPO):
    """The same with ``sde_type="cps"``, Coefficients-Preserving Sampling."""

    eta_scales = "cps"

    def _log_prob(self, x_prev: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return _mean_over_elements(-((x_prev.detach() - mean) ** 2))

    def _between(
        self, x: Tensor, v: Tensor, sigma: Tensor, sigma_prev: Tensor, largest: Tensor, noise_level: float
    ) -> tuple[Tensor, Tensor]:
        std = sigma_prev * math.sin(noise_level * math.pi / 2)
        x0, x1 = x - sigma * v, x + v * (1 - sigma)
        return x0 * (1 - sigma_prev) + x1 * (sigma_prev**2 - std**2).sqrt(), std


SUBJECTS: dict[str, Any] = {kind.__name__: kind for kind in (DDPO, DDPOToCleanData, FlowGRPO, FlowGRPOWithCPS)}
"""The subjects of this module."""
