"""Search for timesteps: dynamic programming, then refinement, then a score on noise that neither
has used."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._version import __version__
from ..generation.conditioning import Conditioning, check_rule
from ..models.metrics import sample_distances
from ..models.protocol import Model
from ..plans.continuous import ContinuousSchedule
from ..plans.files import TimestepList
from ..plans.path import NoisePath
from ..plans.plan import SamplingPlan
from ..plans.schedules import NoiseSchedule
from ..plans.timesteps import distinct_timesteps, select_timesteps
from ..sampler import DDIMSampler
from ..sampling.guidance import guidance_scales
from ..utils.checks import check_integer, check_sample_shape, refuse, usable_device
from .analytic import measure_eps_residual
from .costs import cost_table, reference
from .dynamic import best_timesteps
from .refine import Candidate, Refinement
from .runs import Progress, Runs

CANDIDATES = {1: 100, 2: 60}
"""The number of candidate timesteps in a table of costs, by order: a table of order 2 has one more
dimension."""
REFERENCE_STEPS = 200
GRID = 1000
"""The number of times among which a search chooses where time is continuous."""
_OWN_OPTIONS = {"schedule", "num_inference_steps", "timesteps", "model_timesteps", "order"}  # what a search sets itself
ONE_LIST = "searched, one list"
"""The name of the best list whose model timesteps are the timesteps visited, beside the best of
all."""


@dataclass(frozen=True)
class Score:
    """A candidate's distance to converged samples, on the noise of the search and on held-out
    noise."""

    name: str
    candidate: Candidate
    seen: float
    held_out: float


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        best: the list, with its provenance.
        scores: of the candidate after each stage, and of every closed-form spacing with as many
            steps, sorted by their distance on held-out noise.
    """

    best: TimestepList
    scores: tuple[Score, ...]

    @property
    def timesteps(self) -> tuple[float, ...]:
        return self.best.timesteps

    def score(self, name: str) -> Score:
        return next(score for score in self.scores if score.name == name)


@dataclass
class Search:
    """What to search for, and with how much effort.

    Args:
        shape: of one sample.
        order: of the steps that the list is used for.
        conditioning: the rule for the conditioning of sample i.
        sampler_options: further arguments of the sampler, such as ``clip_sample``.
        count: samples of the table of costs; ``refine_count`` of the refinement; ``held_out`` of
            the last score.
        refine_runs: whole runs that refining the timesteps visited may cost; refining the model
            timesteps may cost as many, and a second round of both half as many each.
        model_timesteps: search for model timesteps, too.
        seed: of the noise; held-out samples use ``seed + 1``.
    """

    model: Model
    schedule: NoisePath
    shape: tuple[int, ...]
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
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if not callable(self.model):
            refuse("model must be callable as model(x, t, **conditioning)", self.model, kind=TypeError)
        if not isinstance(self.schedule, NoisePath) or isinstance(self.schedule, type):
            refuse("schedule must be a noise schedule", self.schedule, "for instance NoiseSchedule.linear()", TypeError)
        self.shape = check_sample_shape("shape", self.shape)
        if check_integer("order", self.order) not in CANDIDATES:
            refuse("order must be 1 (DDIM) or 2 (its multistep form)", self.order)
        self._check_counts()
        if self.conditioning is not None:
            check_rule("conditioning", self.conditioning)
        guidance_scales(self.guidance_scale, (0,))
        self._check_sampler_options()
        self.device = usable_device(self.device)

    def _check_sampler_options(self) -> None:
        options, known = self.sampler_options, {*inspect.signature(DDIMSampler).parameters} - _OWN_OPTIONS
        if not isinstance(options, Mapping):
            refuse("sampler_options must be a dict of the sampler's arguments", options, kind=TypeError)
        if unknown := [name for name in options if name not in known]:
            refuse(f"sampler_options must be among {', '.join(sorted(known))}", unknown[0], "leave it out")

    def _check_counts(self) -> None:
        for name in ("count", "refine_count", "held_out"):
            check_integer(name, getattr(self, name), at_least=1)
        check_integer("refine_runs", self.refine_runs, at_least=0)
        check_integer("seed", self.seed, at_least=0, at_most=2**64 - 2, remedy="held-out samples use seed + 1")
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

    def plan_of(self, candidate: Candidate, order: int | None = None) -> SamplingPlan:
        options: dict[str, Any] = {**self.sampler_options, "order": self.order if order is None else order}
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
        return select_timesteps(count, self.num_timesteps, spacing, schedule=self.schedule)

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

    def runs(self, count: int, seed: int, progress: Progress) -> Runs:
        conditioning = None if self.conditioning is None else self.conditioning.rows(0, count)
        conditioning = {name: rows.to(self.device) for name, rows in (conditioning or {}).items()}
        return Runs.from_seed(
            self.model,
            self.shape,
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
        return per_step * (self.count * many + seen + self.held_out * (many + S * (closed + 1 + searched)))


def search_timesteps(
    search: Search, progress: Progress = lambda calls: None, say: Callable[[str], Any] = lambda text: None
) -> Found:
    """Find the S timesteps whose runs end nearest to converged samples from the same noise.

    Dynamic programming finds the path with the least sum of costs. The better of that and the
    closed-form spacings is refined by whole runs. All lists are then judged on held-out noise.
    """
    found = _by_dynamic_programming(search, progress, say)
    runs = search.runs(search.refine_count, search.seed, progress)
    converged = _converged(search, runs)
    refinement = Refinement(runs, search.plan_of, converged, search.num_timesteps, budget=10**9)
    lists = {"dynamic programming": found, **search.closed_forms()}
    for candidate in lists.values():
        refinement.offer(candidate)
    seen = {name: refinement.tried[candidate] for name, candidate in lists.items()}
    began = min(seen, key=seen.__getitem__)
    for name, refine, runs_allowed in _stages(search, refinement):
        say(f"refining: {refinement.distance:.4f}")
        refinement.budget = refinement.spent + runs_allowed * search.num_inference_steps
        refine()
        lists[name], seen[name] = refinement.best, refinement.distance
    scores = _held_out(search, lists, seen, progress)
    best = TimestepList(
        search.times(refinement.best.timesteps),
        search.schedule.num_train_timesteps if isinstance(search.schedule, NoiseSchedule) else None,
        search.schedule.digest,
        search.order,
        _residual(search, runs, refinement.best, converged),
        _provenance(search, scores, began),
        None if refinement.best.is_one_list else search.times(refinement.best.model_timesteps),
    )
    return Found(best, tuple(scores))


def _stages(search: Search, refinement: Refinement) -> list[tuple[str, Callable[[], None], int]]:
    """Return the stages of the refinement: the name of the result, the function that refines, the
    runs it may cost."""
    visited, given, most = refinement.refine, refinement.refine_model_timesteps, search.refine_runs
    if not search.model_timesteps:
        return [("searched", visited, most)]
    again = [("searched", visited, most // 2), ("searched", given, most // 2)]
    return [(ONE_LIST, visited, most), ("searched", given, most), *again]


def _by_dynamic_programming(search: Search, progress: Progress, say: Callable[[str], Any]) -> Candidate:
    runs = search.runs(search.count, search.seed, progress)
    converging = search.plan_of(Candidate(search.reference_timesteps), order=2)
    along = reference(runs, converging, search.times(search.candidate_timesteps))
    say(f"costs of steps between {len(along.timesteps)} candidates")
    costs = cost_table(along, search.plan_of(Candidate(search.candidate_timesteps)))
    return Candidate(tuple(search.candidate_timesteps[i] for i in best_timesteps(costs, search.num_inference_steps)))


def _converged(search: Search, runs: Runs) -> Tensor:
    return runs.run(search.plan_of(Candidate(search.reference_timesteps), order=2))[-1].x_t


def _residual(search: Search, runs: Runs, candidate: Candidate, converged: Tensor) -> tuple[float, ...]:
    """Measure the residual of the model's eps on its own converged samples, each with the noise of
    the next sample."""
    others = replace(runs, start=runs.start.roll(1, 0))
    return measure_eps_residual(others, search.plan_of(candidate), converged)


def _held_out(
    search: Search, lists: Mapping[str, Candidate], seen: Mapping[str, float], progress: Progress
) -> list[Score]:
    runs = search.runs(search.held_out, search.seed + 1, progress)
    converged = _converged(search, runs)
    ends = {candidate: runs.run(search.plan_of(candidate))[-1].x_t for candidate in dict.fromkeys(lists.values())}
    scores = [
        Score(name, candidate, seen[name], sample_distances(ends[candidate], converged).mean().item())
        for name, candidate in lists.items()
    ]
    return sorted(scores, key=lambda score: score.held_out)


def _provenance(search: Search, scores: Sequence[Score], began: str) -> dict[str, Any]:
    return {
        "method": "dynamic programming over costs of single steps (arXiv 2106.03802, 2405.11326), then moves judged by whole runs"
        + ("; model timesteps searched beside the timesteps visited" if search.model_timesteps else ""),
        "refined": began,
        "samples": {"costs": search.count, "refinement": search.refine_count, "held_out": search.held_out},
        "seeds": {"search": search.seed, "held_out": search.seed + 1},
        "candidates": len(search.candidate_timesteps),
        "reference": {"timesteps": len(search.reference_timesteps), "order": 2},
        "sampler_options": dict(search.sampler_options),
        "guidance_scale": search.guidance_scale,
        "distance": {
            score.name: {"search": round(score.seen, 6), "held_out": round(score.held_out, 6)} for score in scores
        },
        "ddim_fast": __version__,
        "torch": torch.__version__,
        "made_at": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
