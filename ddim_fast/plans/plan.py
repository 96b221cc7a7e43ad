"""A sampling plan: every step of a run as data, computed once, in float64, before the first model
call.

The plan holds explicit pairs (t, t_prev) and, for each, one row of coefficients. Kernels see
nothing else: schedule, prediction type, eta and clipping end here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise

import torch

from ..kernels.contract import StepCoefficients, StepTable
from ..utils.checks import check_choice
from .clipping import Thresholding
from .coefficients import (
    ETA_SCALES,
    PREDICTION_TYPES,
    analytic_variance,
    check_eta,
    ddim_coefficients,
    ddim_variance,
    ddpm_variance,
    multistep_coefficients,
)
from .schedules import NoiseSchedule
from .timesteps import explicit_model_timesteps

BEFORE_FIRST = -1
"""The timestep of clean data, after the last step."""


@dataclass(frozen=True)
class PlannedStep:
    """One step, from timestep ``t`` to ``t_prev`` (-1: clean data): its noise levels, its noise,
    and its row.

    ``model_timestep`` is what the model is called with.
    """

    index: int
    t: int
    t_prev: int
    model_timestep: int
    alpha_bar_t: float
    alpha_bar_prev: float
    std_dev_t: float
    coefficients: StepCoefficients


@dataclass(frozen=True)
class SamplingPlan:
    """All steps of a run. Frozen and hashable: two equal plans give the same samples.

    Args:
        schedule: the noise schedule the model was trained with.
        timesteps: which timesteps to visit, strictly decreasing, as the functions of
            ``plans.timesteps`` return them.
        prediction_type: what the model predicts, a key of ``PREDICTION_TYPES``.
        eta: 0 is deterministic DDIM, 1 adds as much noise as DDPM.
        eta_scales: what eta multiplies, "std_dev" (the paper) or "variance".
        sigma_hat: add the paper's larger DDPM noise, sqrt(1 - alpha_bar_t / alpha_bar_prev), with
            the direction term of eta = 1 (appendix D.3). Needs eta = 1.
        set_alpha_to_one: the last step goes to alpha_bar = 1 (clean data); otherwise to
            alpha_bar_0, as some models were sampled.
        clip_sample_range: clip the predicted x0 to [-range, range]; None for no clipping.
        use_clipped_model_output: derive eps again from the clipped x0, so that the two agree (GLIDE
            and guided-diffusion do).
        order: 1 is DDIM. 2 is its multistep form (DPM-Solver++(2M), see
            ``multistep_coefficients``), which reads the x0 that the step before predicted: as many
            model calls, and an error that falls with the square of the number of steps. Needs eta =
            0.
        eps_residual: the mean squared error of the model's eps at each timestep visited, as
            ``search.measure_eps_residual`` measures it: the added noise then has the analytic
            variance (``coefficients.analytic_variance``) instead of eta's own. Not with
            ``sigma_hat`` or order 2.
        model_timesteps: the timestep that the model is called with at each of them, where it is a
            different one (arXiv 2310.09469, 2405.15506): a long step ends nearer to where many
            short ones lead with the output of a timestep on its way. In any order. Empty: those
            visited.
        thresholding: dynamic thresholding of x0 before it is clipped; None for none.

    Raises:
        ValueError: an argument is unknown or out of range; eta asks for more noise than a step has
            room for; epsilon prediction at zero terminal SNR.
    """

    schedule: NoiseSchedule
    timesteps: tuple[int, ...]
    prediction_type: str = "epsilon"
    eta: float = 0.0
    eta_scales: str = "std_dev"
    sigma_hat: bool = False
    set_alpha_to_one: bool = True
    clip_sample_range: float | None = None
    use_clipped_model_output: bool = False
    order: int = 1
    eps_residual: tuple[float, ...] | None = None
    model_timesteps: tuple[int, ...] = ()
    thresholding: Thresholding | None = None

    def __post_init__(self) -> None:
        check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        check_choice("eta_scales", self.eta_scales, ETA_SCALES)
        check_eta(self.eta)
        if any(later >= earlier for earlier, later in pairwise(self.timesteps)) or not self.timesteps:
            raise ValueError(f"timesteps must be at least one, and strictly decreasing, got {self.timesteps}")
        if not self.model_timesteps:
            object.__setattr__(self, "model_timesteps", self.timesteps)
        elif self.model_timesteps != self.timesteps:
            explicit_model_timesteps(self.model_timesteps, len(self.timesteps), self.schedule.num_train_timesteps)
        if self.sigma_hat and self.eta != 1:
            raise ValueError(f"sigma_hat is DDPM's larger noise and needs eta = 1, got eta = {self.eta}")
        if self.clip_sample_range is not None and not 0 < self.clip_sample_range < math.inf:
            raise ValueError(
                f"clip_sample_range must be positive and finite (None: no clipping), got {self.clip_sample_range}"
            )
        if self.use_clipped_model_output and self.clip_sample_range is None:
            raise ValueError(
                "use_clipped_model_output derives eps from the clipped x0: it needs a clip_sample_range, got None"
            )
        if self.order not in (1, 2) or isinstance(self.order, bool):
            raise ValueError(f"order must be 1 (DDIM) or 2 (its multistep form), got {self.order!r}")
        if self.order == 2 and (self.eta != 0 or self.sigma_hat):
            raise ValueError(
                "order=2 extrapolates from the step before, along a trajectory that fresh noise leaves: it needs eta = 0, got "
                f"eta = {self.eta}: use order=1, or eta=0"
            )
        self._check_eps_residual()
        if self.eta > self.largest_eta * (1 + 1e-9):
            # Rounded down, so that the value named is one that is accepted.
            raise ValueError(
                "a step cannot add more noise than its target holds: with these timesteps, eta may be at most "
                f"{math.floor(self.largest_eta * 1e6) / 1e6}, got {self.eta}"
            )
        self.steps  # noqa: B018  (computed now, so that errors come here)

    def _check_eps_residual(self) -> None:
        values = self.eps_residual
        if values is None:
            return
        if len(values) != len(self.timesteps) or not all(0 <= value < math.inf for value in values):
            raise ValueError(
                f"eps_residual must be one finite number, 0 or more, for each of the {len(self.timesteps)} timesteps, got {values}"
            )
        if self.sigma_hat or self.order != 1:
            raise ValueError(
                f"eps_residual decides how much noise is added, got sigma_hat={self.sigma_hat} and order={self.order} beside it: "
                "leave them out, or eps_residual"
            )

    @property
    def num_inference_steps(self) -> int:
        return len(self.timesteps)

    @cached_property
    def adds_noise(self) -> bool:
        """Whether some step adds noise."""
        return any(step.coefficients.adds_noise for step in self.steps)

    @cached_property
    def adds_known_noise(self) -> bool:
        """Whether some step adds noise to a known region."""
        return any(step.coefficients.adds_known_noise for step in self.steps)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(t, t_prev) of every step."""
        return tuple(zip(self.timesteps, (*self.timesteps[1:], BEFORE_FIRST), strict=True))

    @property
    def largest_eta(self) -> float:
        """The eta at which the noise of some step takes up all the variance of its target, 1 -
        alpha_bar_prev."""
        rooms = []
        for alpha_bar_t, alpha_bar_prev in self._levels:
            if variance := ddpm_variance(alpha_bar_t, alpha_bar_prev):
                rooms.append((1 - alpha_bar_prev) / variance)
        most = min(rooms, default=math.inf)
        return math.sqrt(most) if self.eta_scales == "std_dev" else most

    @cached_property
    def _levels(self) -> tuple[tuple[float, float], ...]:
        """(alpha_bar_t, alpha_bar_prev) of every step."""
        final = 1.0 if self.set_alpha_to_one else float(self.schedule.alphas_cumprod[0])
        return tuple(pairwise([*(self.schedule.alpha_bar(t) for t in self.timesteps), final]))

    @cached_property
    def steps(self) -> tuple[PlannedStep, ...]:
        steps = enumerate(zip(self.pairs, self._levels, strict=True))
        return tuple(self._step(index, *pair, *levels) for index, (pair, levels) in steps)

    def last_steps(self, count: int) -> SamplingPlan:
        """Return the plan of the last ``count`` of these steps alone."""
        return self if count == len(self.timesteps) else _last_steps(self, count)

    def table(
        self, device: torch.device | str = "cpu", guidance_scale: float | Sequence[float] | None = None
    ) -> StepTable:
        """Return all steps as one table in device memory, for ``ddim_step_from_table``."""
        return StepTable.of([step.coefficients for step in self.steps], device, guidance_scale)

    def _step(self, index: int, t: int, t_prev: int, alpha_bar_t: float, alpha_bar_prev: float) -> PlannedStep:
        variance = ddim_variance(alpha_bar_t, alpha_bar_prev, self.eta, self.eta_scales)
        std_dev_t = math.sqrt(variance)
        if self.sigma_hat and alpha_bar_prev < 1:  # clean data stays clean
            std_dev_t = math.sqrt(1 - alpha_bar_t / alpha_bar_prev)
        if self.eps_residual is not None:
            std_dev_t = math.sqrt(analytic_variance(alpha_bar_t, alpha_bar_prev, variance, self.eps_residual[index]))
        if self.order == 2 and index > 0:
            row = multistep_coefficients(
                self._levels[index - 1][0],
                alpha_bar_t,
                alpha_bar_prev,
                self.prediction_type,
                clip_sample_range=self.clip_sample_range,
                use_clipped_model_output=self.use_clipped_model_output,
            )
        else:
            row = ddim_coefficients(
                alpha_bar_t,
                alpha_bar_prev,
                self.prediction_type,
                variance=variance,
                std_dev_added=std_dev_t,
                clip_sample_range=self.clip_sample_range,
                use_clipped_model_output=self.use_clipped_model_output,
            )
        return PlannedStep(index, t, t_prev, self.model_timesteps[index], alpha_bar_t, alpha_bar_prev, std_dev_t, row)


@lru_cache(maxsize=64)
def _last_steps(plan: SamplingPlan, count: int) -> SamplingPlan:
    return replace(
        plan,
        timesteps=plan.timesteps[-count:],
        model_timesteps=plan.model_timesteps[-count:],
        eps_residual=None if plan.eps_residual is None else plan.eps_residual[-count:],
    )
