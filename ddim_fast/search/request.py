"""What to search for, and with how much effort."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..generation.conditioning import Conditioning, check_rule
from ..models.protocol import Model, sample_shape_of
from ..plans.continuous import ContinuousSchedule
from ..plans.history_weights import HistoryWeights
from ..plans.path import NoisePath
from ..plans.plan import SamplingPlan
from ..plans.schedules import NoiseSchedule
from ..plans.timesteps import distinct_timesteps, select_timesteps
from ..sampler import DDIMSampler
from ..sampling.guidance import guidance_scales
from ..utils.checks import check_integer, refuse, usable_device
from .fit import calls
from .refine import Candidate
from .runs import Progress, Runs

CANDIDATES = {1: 100, 2: 60}
"""The number of candidate timesteps in a table of costs, by order: a table of order 2 has one more
dimension."""
REFERENCE_STEPS = 200
GRID = 1000
"""The number of times among which a search chooses where time is continuous."""
# What a search sets itself.
_OWN_OPTIONS = {"schedule", "num_inference_steps", "timesteps", "model_timesteps", "order", "history_weights"}


@dataclass
class Search:
    """What to search for, and with how much effort.

    Args:
        shape: of one sample, ``(C, ...)``. None: the model's ``sample_shape``.
        num_inference_steps: how many timesteps to find.
        order: of the steps that the list is used for.
        conditioning: the rule for the conditioning of sample i.
        sampler_options: further arguments of the sampler, such as ``clip_sample``.
        count: samples of the table of costs; ``refine_count`` of the refinement; ``held_out`` of
            the last score.
        refine_runs: whole runs that refining the timesteps visited may cost; refining the model
            timesteps may cost as many, and a second round of both half as many each.
        model_timesteps: search for model timesteps, too.
        coefficients: then fit the weights of earlier predictions, too, together with the timesteps;
            the result is a whole solver. Needs order 2 and eta = 0, and costs ``refine_count``
            samples twice.
        fit_iterations: the most iterations of that fit.
        seed: of the noise; held-out samples use ``seed + 1``, the validation of the fit ``seed +
            2``.
    """

    model: Model
    schedule: NoisePath
    shape: Sequence[int] | None = None
    _: KW_ONLY
    num_inference_steps: int
    order: int = 1
    conditioning: Conditioning | None = None
    guidance_scale: float | None = None
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    count: int = 48
    refine_count: int = 96
    refine_runs: int = 150
    model_timesteps: bool = True
    held_out: int = 96
    candidates: int | None = None
    seed: int = 1000
    coefficients: bool = False
    fit_iterations: int = 24
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if not callable(self.model):
            refuse("model must be callable as model(x, t, **conditioning)", self.model, kind=TypeError)
        if not isinstance(self.schedule, NoisePath) or isinstance(self.schedule, type):
            refuse("schedule must be a noise schedule", self.schedule, "for instance NoiseSchedule.linear()", TypeError)
        self.shape = sample_shape_of(self.model, self.shape)
        if check_integer("order", self.order) not in CANDIDATES:
            refuse("order must be 1 (DDIM) or 2 (its multistep form)", self.order)
        self._check_counts()
        if self.conditioning is not None:
            check_rule("conditioning", self.conditioning)
        guidance_scales(self.guidance_scale, (0,))
        self._check_sampler_options()
        if not isinstance(self.coefficients, bool):
            refuse("coefficients must be True or False", self.coefficients, kind=TypeError)
        if self.coefficients and (self.order != 2 or self.sampler_options.get("eta", 0) != 0):
            raise ValueError(
                "coefficients are fitted from order 2 without noise: they need order=2 and eta=0, got "
                f"order={self.order} and eta={self.sampler_options.get('eta', 0)}"
            )
        self.device = usable_device(self.device)

    def _check_sampler_options(self) -> None:
        options, known = self.sampler_options, {*inspect.signature(DDIMSampler).parameters} - _OWN_OPTIONS
        if not isinstance(options, Mapping):
            refuse("sampler_options must be a dict of the sampler's arguments", options, kind=TypeError)
        if unknown := [name for name in options if name not in known]:
            refuse(f"sampler_options must be among {', '.join(sorted(known))}", unknown[0], "leave it out")
        if np.ndim(options.get("eta", 0.0)) > 0:
            refuse("sampler_options must have one eta for all steps, in which the plans differ", options["eta"])

    def _check_counts(self) -> None:
        for name in ("count", "refine_count", "held_out"):
            check_integer(name, getattr(self, name), at_least=1)
        check_integer("refine_runs", self.refine_runs, at_least=0)
        check_integer(
            "seed", self.seed, at_least=0, at_most=2**64 - 3, remedy="other samples use seed + 1 and seed + 2"
        )
        check_integer("fit_iterations", self.fit_iterations, at_least=1)
        if self.candidates is not None:
            check_integer("candidates", self.candidates, at_least=1)
        there = min(self.candidates or CANDIDATES[self.order], self.num_timesteps)
        check_integer(
            "num_inference_steps",
            self.num_inference_steps,
            at_least=1,
            at_most=there,
            remedy="" if there == self.num_timesteps else "or pass more candidates",
        )

    def plan_of(
        self, candidate: Candidate, order: int | None = None, history_weights: HistoryWeights | None = None
    ) -> SamplingPlan:
        """Return the plan of these timesteps, of the order of the search, another one, or with
        weights of its own."""
        options: dict[str, Any] = dict(self.sampler_options)
        if history_weights is None:
            options["order"] = self.order if order is None else order
        else:
            options["history_weights"] = history_weights
        options.pop("timestep_spacing", None)
        options.pop("steps_offset", None)
        given = None if candidate.is_one_list else candidate.model_timesteps
        sampler = DDIMSampler(
            self.schedule,
            timesteps=self.times(candidate.timesteps),
            model_timesteps=None if given is None else self.times(given),
            **options,
        )
        return sampler.plan(self.model)

    @cached_property
    def _grid(self) -> tuple[float, ...]:
        """All timesteps that may be visited, increasing."""
        if isinstance(self.schedule, ContinuousSchedule):
            return self.schedule.select(GRID)[::-1]
        assert isinstance(self.schedule, NoiseSchedule)
        return tuple(range(self.schedule.num_train_timesteps))

    def times(self, candidates: Sequence[int]) -> tuple[float, ...]:
        """Return the schedule's timesteps of numbers from 0 to ``num_timesteps`` - 1."""
        return tuple(self._grid[i] for i in candidates)

    @property
    def num_timesteps(self) -> int:
        """The number of timesteps to choose from."""
        return len(self._grid)

    def select(self, count: int, spacing: str) -> tuple[int, ...]:
        """Return the numbers of ``count`` timesteps by a closed-form spacing, decreasing."""
        if isinstance(self.schedule, ContinuousSchedule):
            positions = np.interp(self.schedule.select(count, spacing), self._grid, np.arange(GRID))
            return distinct_timesteps(positions, GRID)
        assert isinstance(self.schedule, NoiseSchedule)
        return select_timesteps(count, self.num_timesteps, spacing, schedule=self.schedule)  # type: ignore[arg-type]  # it checks

    @property
    def candidate_timesteps(self) -> tuple[int, ...]:
        """The candidates: half of them spaced evenly in t, half evenly in log-SNR."""
        total = self.num_timesteps
        wanted = min(self.candidates or CANDIDATES[self.order], total)
        even = self.select(wanted // 2, "trailing") if wanted > 1 else ()
        return distinct_timesteps([*even, *self.select(wanted - len(even), "log_snr")], total)

    @property
    def reference_timesteps(self) -> tuple[int, ...]:
        many = self.select(min(REFERENCE_STEPS, self.num_timesteps), "log_snr")
        return tuple(sorted({*many, *self.candidate_timesteps}, reverse=True))

    def converging_plan(self, through: Candidate | None = None) -> SamplingPlan:
        """Return a plan of many steps, which also visits the timesteps of ``through``."""
        visited = {*self.reference_timesteps, *(() if through is None else through.timesteps)}
        return self.plan_of(Candidate(tuple(sorted(visited, reverse=True))), order=2)

    def converged(self, runs: Runs) -> Tensor:
        """Return converged samples from the noise of ``runs``."""
        return runs.run(self.converging_plan())[-1].x_t

    def runs(self, count: int, seed: int, progress: Progress) -> Runs:
        conditioning = None if self.conditioning is None else self.conditioning.rows(0, count)
        conditioning = {name: rows.to(self.device) for name, rows in (conditioning or {}).items()}
        return Runs.from_seed(
            self.model,
            sample_shape_of(self.model, self.shape),
            count,
            seed,
            self.device,
            conditioning=conditioning,
            guidance_scale=self.guidance_scale,
            progress=progress,
        )

    def closed_forms(self) -> dict[str, Candidate]:
        """Return the timesteps of every closed-form spacing with as many steps."""
        return {name: Candidate(self.select(self.num_inference_steps, name)) for name in self.schedule.spacings}

    def calls(self) -> int:
        """Return the largest number of model calls, counted by sample, that the search can make."""
        S, many, closed = self.num_inference_steps, len(self.reference_timesteps), len(self.closed_forms())
        per_step = 1 if self.guidance_scale in (None, 1) else 2
        stages, searched = (3, 2) if self.model_timesteps else (1, 1)
        seen = self.refine_count * (many + S * (closed + 2 + stages * self.refine_runs))
        fitted = self.refine_count * self._fit_calls() if self.coefficients else 0
        judged = closed + 1 + searched + (2 if self.coefficients else 0)
        return per_step * (self.count * many + seen + fitted + self.held_out * (many + S * judged))

    def _fit_calls(self) -> int:
        """Return the largest number of model calls of the fit, for a sample of it and one of the
        validation."""
        S, many = self.num_inference_steps, len(self.reference_timesteps)
        fitting, validating = calls(S, self.model_timesteps, self.fit_iterations)
        # The trajectory that visits the timesteps found, too; the rows; three starts; and the best
        # solver of an interrupted fit. On the validation noise: the start's distance, and that
        # solver's.
        return (many + S) + S + 3 * S + S + fitting + many + 2 * S + validating
