"""A sampling plan: every step of a run as data, computed once, in float64, before the first model
call.

The plan holds explicit pairs (t, t_prev) and, for each, one row of coefficients. Kernels see
nothing else: schedule, prediction type, eta and clipping end here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import torch

from ..kernels.contract import StepCoefficients, StepTable
from ..utils.brief import brief_fields
from ..utils.checks import check_choice
from .clipping import Thresholding
from .coefficients import (
    PREDICTION_TYPES,
    Prediction,
    analytic_variance,
    ddim_coefficients,
    forward_variance,
    history_coefficients,
    multistep_coefficients,
    noise_variance,
)
from .eta import ETA_SCALES, PAPER, explicit_eta, largest_eta, step_noise, told_apart
from .history_weights import explicit_history_weights, histories_read, last_history_weights
from .levels import CLEAN, AnyLevel, NoiseLevel
from .path import NoisePath
from .schedules import NoiseSchedule


@dataclass(frozen=True)
class PlannedStep:
    """One step, from timestep ``t`` to ``t_prev``: its noise levels, its noise, and its row.

    ``t_prev`` after the last step is clean data: -1 on a discrete schedule, 0 in continuous time.
    ``model_timestep`` is the timestep that the model is asked about, ``model_time`` what it is
    called with there, in ``time_dtype``, beside ``input_scale`` times x_t.
    """

    index: int
    t: float
    t_prev: float
    model_timestep: float
    model_time: float
    time_dtype: torch.dtype
    input_scale: float
    level_t: AnyLevel
    level_prev: AnyLevel
    std_dev_t: float
    coefficients: StepCoefficients

    @property
    def alpha_bar_t(self) -> float:
        """alpha_t^2 / (alpha_t^2 + sigma_t^2): on a variance-preserving path, alpha_t^2."""
        return _alpha_bar(self.level_t)

    @property
    def alpha_bar_prev(self) -> float:
        """The same of the level that the step leads to."""
        return _alpha_bar(self.level_prev)


def _alpha_bar(level: AnyLevel) -> float:
    return level.alpha_bar if isinstance(level, NoiseLevel) else level


@dataclass(frozen=True)
class SamplingPlan:
    """All steps of a run. Frozen and hashable: two equal plans give the same samples.

    Args:
        schedule: the noise schedule the model was trained with.
        timesteps: which timesteps to visit, strictly decreasing, as the functions of
            ``plans.timesteps`` or the schedule's own ``select`` return them.
        prediction_type: what the model predicts, a key of ``PREDICTION_TYPES``.
        eta: 0 is deterministic DDIM, 1 adds as much noise as DDPM. One number, or one for each
            step: 0 for those without noise.
        eta_scales: what eta means, a key of ``eta.ETA_SCALES``. "std_dev" (the paper): it scales the
            standard deviation of DDPM's noise; "variance": its variance. "cps": the noise level of
            Coefficients-Preserving Sampling (arXiv 2509.05952), std_dev = sigma_prev sin(eta pi / 2).
            "flow_grpo": the noise level of Flow-GRPO's SDE (arXiv 2505.05470), which keeps the
            marginals to first order alone, and needs order 1.
        sigma_hat: add the paper's larger DDPM noise, sqrt(1 - alpha_bar_t / alpha_bar_prev), with
            the direction term of eta = 1 (appendix D.3). Needs eta = 1.
        set_alpha_to_one: the last step goes to alpha_bar = 1 (clean data); otherwise to
            alpha_bar_0, as some models were sampled. Of discrete schedules alone.
        clip_sample_range: clip the predicted x0 to [-range, range]; None for no clipping.
        use_clipped_model_output: derive eps again from the clipped x0, so that the two agree (GLIDE
            and guided-diffusion do).
        order: 1 is DDIM. 2 is its multistep form (DPM-Solver++(2M), see
            ``multistep_coefficients``), which reads the x0 that the step before predicted: as many
            model calls, and an error that falls with the square of the number of steps. With eta it
            is the SDE form of that solver. 3 reads the x0 of two steps before, and needs eta = 0.
        eps_residual: the mean squared error of the model's eps at each timestep visited, as
            ``search.measure_eps_residual`` measures it: the added noise then has the analytic
            variance (``coefficients.analytic_variance``) instead of eta's own. Not with
            ``sigma_hat`` or order 2.
        model_timesteps: the timestep that the model is called with at each of them, where it is a
            different one (arXiv 2310.09469, 2405.15506): a long step ends nearer to where many
            short ones lead with the output of a timestep on its way. In any order. Empty: those
            visited.
        thresholding: dynamic thresholding of x0 before it is clipped; None for none.
        history_weights: for each step the weights of the x0 that the two steps before it predicted,
            the last one first, as fitted to a model, instead of the textbook's of order 2 or 3: see
            ``coefficients.history_coefficients``. The first step has none to read and the second
            one: the others are 0. Needs eta = 0, and an order above the number that is read.

    Raises:
        ValueError: an argument is unknown or out of range; eta asks for more noise than a step has
            room for; epsilon prediction at zero terminal SNR.
    """

    schedule: NoisePath
    timesteps: tuple[float, ...]
    prediction_type: str = "epsilon"
    eta: float | tuple[float, ...] = 0.0
    eta_scales: str = PAPER
    sigma_hat: bool = False
    set_alpha_to_one: bool = True
    clip_sample_range: float | None = None
    use_clipped_model_output: bool = False
    order: int = 1
    eps_residual: tuple[float, ...] | None = None
    model_timesteps: tuple[float, ...] = ()
    thresholding: Thresholding | None = None
    history_weights: tuple[tuple[float, float], ...] | None = None

    __repr__ = brief_fields

    def __post_init__(self) -> None:
        check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        check_choice("eta_scales", self.eta_scales, ETA_SCALES)
        if any(later >= earlier for earlier, later in pairwise(self.timesteps)) or not self.timesteps:
            raise ValueError(f"timesteps must be at least one, and strictly decreasing, got {self.timesteps}")
        object.__setattr__(self, "eta", explicit_eta(self.eta, len(self.timesteps)))
        if not self.model_timesteps:
            object.__setattr__(self, "model_timesteps", self.timesteps)
        elif self.model_timesteps != self.timesteps:
            self.schedule.check_model_timesteps(self.model_timesteps, len(self.timesteps))
        is_ddpm = self.eta != 0 and all(eta in (0, 1) for eta in self.etas)  # in each step with noise
        if self.sigma_hat and not (is_ddpm and told_apart(self.eta_scales, 1) == (PAPER, 1)):
            of = f" of eta_scales={self.eta_scales!r}" if is_ddpm else ""
            raise ValueError(f"sigma_hat is DDPM's larger noise and needs eta = 1, got eta = {self.eta}{of}")
        if self.clip_sample_range is not None and not 0 < self.clip_sample_range < math.inf:
            raise ValueError(
                f"clip_sample_range must be positive and finite (None: no clipping), got {self.clip_sample_range}"
            )
        if self.use_clipped_model_output and self.clip_sample_range is None:
            raise ValueError(
                "use_clipped_model_output derives eps from the clipped x0: it needs a clip_sample_range, got None"
            )
        if not self.set_alpha_to_one and not isinstance(self.schedule, NoiseSchedule):
            raise ValueError(
                "set_alpha_to_one=False ends at alpha_bar_0, which a path in continuous time does not have, got schedule="
                f"{self.schedule!r}: leave it out"
            )
        if self.order not in (1, 2, 3) or isinstance(self.order, bool):
            raise ValueError(f"order must be 1 (DDIM), or 2 or 3 (its multistep forms), got {self.order!r}")
        if self.order != 1 and self.sigma_hat:
            raise ValueError(
                f"sigma_hat is DDPM's noise, in steps of order 1, got order={self.order} beside it: leave one of them out"
            )
        self._check_history_weights()
        if self.order == 3 and self.eta != 0:
            raise ValueError(
                "order=3 extrapolates from two steps before, along a trajectory that fresh noise leaves: it needs eta = 0, got "
                f"eta = {self.eta}: use order=2, or eta=0"
            )
        self._check_eps_residual()
        self._check_eta_scales()
        self._check_largest_eta()
        self.steps  # noqa: B018  (computed now, so that errors come here)

    def _check_eta_scales(self) -> None:
        if self.eta == 0 or ETA_SCALES[self.eta_scales].keeps_marginals:
            return
        if self.order != 1 or self.eps_residual is not None:
            beside = f"order={self.order}" if self.order != 1 else f"eps_residual={self.eps_residual}"
            raise ValueError(
                f"eta_scales={self.eta_scales!r} is a step of order 1 with its own noise, got {beside} beside it: "
                "leave that out, or use another eta_scales"
            )

    def _check_largest_eta(self) -> None:
        for index, (eta, largest) in enumerate(zip(self.etas, self._largest_etas, strict=True)):
            if eta > largest * (1 + 1e-9):
                # Rounded down, so that the value named is one that is accepted.
                most = self.largest_eta if self.eta == eta else largest
                name = "eta" if self.eta == eta else f"eta[{index}]"
                raise ValueError(
                    f"a step cannot add more noise than its target holds: with these timesteps, {name} may be at most "
                    f"{math.floor(most * 1e6) / 1e6}, got {eta}"
                )

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

    def _check_history_weights(self) -> None:
        if self.history_weights is None:
            return
        weights = explicit_history_weights(self.history_weights, len(self.timesteps))
        object.__setattr__(self, "history_weights", weights)
        read = histories_read(weights)
        if self.order <= read:
            raise ValueError(
                f"history_weights that read {read} earlier predictions need an order of {read + 1} at least, got order={self.order}"
            )
        if self.eta != 0 or self.eps_residual is not None:
            raise ValueError(
                "history_weights were fitted to a trajectory that fresh noise leaves: they need eta = 0, got "
                f"eta = {self.eta} and eps_residual = {self.eps_residual}: use eta=0, or an order for the textbook's steps"
            )

    @property
    def num_inference_steps(self) -> int:
        return len(self.timesteps)

    @cached_property
    def etas(self) -> tuple[float, ...]:
        """eta of each step."""
        return self.eta if isinstance(self.eta, tuple) else (self.eta,) * len(self.timesteps)

    @cached_property
    def adds_noise(self) -> bool:
        """Whether some step adds noise."""
        return any(step.coefficients.adds_noise for step in self.steps)

    @cached_property
    def adds_known_noise(self) -> bool:
        """Whether some step adds noise to a known region."""
        return any(step.coefficients.adds_known_noise for step in self.steps)

    @cached_property
    def scales_input(self) -> bool:
        """Whether the model is given x_t times a scale other than 1 in some step."""
        return any(step.input_scale != 1 for step in self.steps)

    def meaning_at(self, level: AnyLevel) -> Prediction:
        """Return what the model's output means at a noise level."""
        return self.schedule.prediction(self.prediction_type, level)

    @cached_property
    def model_times(self) -> tuple[float, ...]:
        """What the model is called with in each step."""
        return tuple(step.model_time for step in self.steps)

    @cached_property
    def initial_std_dev(self) -> float:
        """The standard deviation of the noise x_T that a run starts from."""
        return self.schedule.initial_std_dev(self.timesteps[0])

    @property
    def pairs(self) -> tuple[tuple[float, float], ...]:
        """(t, t_prev) of every step."""
        return tuple(pairwise((*self.timesteps, self.schedule.after_last)))

    @property
    def largest_eta(self) -> float:
        """The eta at which some step has no room for more: its noise takes up all the variance of
        its target, 1 - alpha_bar_prev, or nothing of what is predicted of it is kept."""
        return min(self._largest_etas)

    @property
    def _largest_etas(self) -> list[float]:
        """The largest eta of each step."""
        return [largest_eta(self.eta_scales, *levels) for levels in self._levels]

    @cached_property
    def _levels(self) -> tuple[tuple[AnyLevel, AnyLevel], ...]:
        """(level_t, level_prev) of every step."""
        return tuple(pairwise([*(self.schedule.level(t) for t in self.timesteps), self._final_level]))

    @property
    def _final_level(self) -> AnyLevel:
        if not isinstance(self.schedule, NoiseSchedule):
            return CLEAN
        return 1.0 if self.set_alpha_to_one else float(self.schedule.alphas_cumprod[0])

    @cached_property
    def steps(self) -> tuple[PlannedStep, ...]:
        steps = enumerate(zip(self.pairs, self._levels, strict=True))
        return tuple(self._step(index, *pair, *levels) for index, (pair, levels) in steps)

    def last_steps(self, count: int) -> SamplingPlan:
        """Return the plan of the last ``count`` of these steps alone."""
        return self if count == len(self.timesteps) else _last_steps(self, count)

    def with_noise_in(self, steps: Collection[int]) -> SamplingPlan:
        """Return this plan with noise in these of its steps alone, by their numbers: the others are
        deterministic."""
        etas = tuple(eta if index in steps else 0.0 for index, eta in enumerate(self.etas))
        residual = self.eps_residual
        if residual is not None:
            residual = tuple(value if index in steps else 0.0 for index, value in enumerate(residual))
        return replace(self, eta=etas, eps_residual=residual, sigma_hat=self.sigma_hat and any(etas))

    def table(
        self,
        device: torch.device | str = "cpu",
        guidance_scale: float | Sequence[float] | None = None,
        min_std: float | None = None,
        skip_quiet: bool = False,
    ) -> StepTable:
        """Return all steps as one table in device memory, for ``ddim_step_from_table``; see
        ``StepTable.of``."""
        return StepTable.of([step.coefficients for step in self.steps], device, guidance_scale, min_std, skip_quiet)

    def _input_scale(self, t: float) -> float:
        """Return what x_t is multiplied by for the model, in the float32 that kernels and tables
        hold."""
        return float(np.float32(self.schedule.input_scale(t)))

    def _step(self, index: int, t: float, t_prev: float, level_t: AnyLevel, level_prev: AnyLevel) -> PlannedStep:
        noise = step_noise(self.eta_scales, level_t, level_prev, self.etas[index])
        variance, std_dev_t = noise.variance, math.sqrt(noise.variance)
        if self.sigma_hat and self.etas[index] and noise_variance(level_prev) > 0:  # clean data stays clean
            std_dev_t = math.sqrt(forward_variance(level_t, level_prev))
        if self.eps_residual is not None:
            std_dev_t = math.sqrt(analytic_variance(level_t, level_prev, variance, self.eps_residual[index]))
        prediction = self.meaning_at(level_t)
        if self.order > 1 and index > 0 and self.history_weights is None:
            row = multistep_coefficients(
                self._levels[index - 1][0],
                level_t,
                level_prev,
                prediction,
                variance=variance,
                level_before_last=self._levels[index - 2][0] if self.order == 3 and index > 1 else None,
                clip_sample_range=self.clip_sample_range,
                use_clipped_model_output=self.use_clipped_model_output,
            )
        else:
            row = ddim_coefficients(
                level_t,
                level_prev,
                prediction,
                **noise._asdict(),
                std_dev_added=std_dev_t,
                clip_sample_range=self.clip_sample_range,
                use_clipped_model_output=self.use_clipped_model_output,
            )
            if self.history_weights is not None:
                row = history_coefficients(row, *self.history_weights[index])
        if index + 1 < len(self.timesteps) and (scale := self._input_scale(t_prev)) != 1:
            row = replace(row, input_scale=scale)
        told = self.model_timesteps[index]
        return PlannedStep(
            index=index,
            t=t,
            t_prev=t_prev,
            model_timestep=told,
            model_time=self.schedule.model_time(told),
            time_dtype=self.schedule.time_dtype,
            input_scale=self._input_scale(t),
            level_t=level_t,
            level_prev=level_prev,
            std_dev_t=std_dev_t,
            coefficients=row,
        )


@lru_cache(maxsize=64)
def _last_steps(plan: SamplingPlan, count: int) -> SamplingPlan:
    return replace(
        plan,
        timesteps=plan.timesteps[-count:],
        eta=plan.etas[-count:],
        model_timesteps=plan.model_timesteps[-count:],
        eps_residual=None if plan.eps_residual is None else plan.eps_residual[-count:],
        history_weights=None if plan.history_weights is None else last_history_weights(plan.history_weights, count),
    )
