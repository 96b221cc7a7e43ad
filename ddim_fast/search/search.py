"""Search for timesteps: dynamic programming, then refinement, then a score on noise that neither
has used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..models.metrics import sample_distances
from ..plans.files import TimestepList
from ..plans.history_weights import histories_read
from ..plans.plan import SamplingPlan
from ..plans.rows import rows_of_plan
from ..plans.schedules import NoiseSchedule
from ..utils.brief import brief_fields
from .analytic import measure_eps_residual
from .costs import cost_table, reference
from .dynamic import best_timesteps
from .fitted import FITTED, Checkpoint, FittedSolver, fit_solver
from .refine import Candidate, Refinement
from .request import Search
from .runs import Progress, Runs

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
        fitted: the fitted solver, with ``Search.coefficients``; ``best`` has it where it gained.
    """

    best: TimestepList
    scores: tuple[Score, ...]
    fitted: FittedSolver | None = None

    __repr__ = brief_fields

    @property
    def timesteps(self) -> tuple[float, ...]:
        return self.best.timesteps

    def score(self, name: str) -> Score:
        return next(score for score in self.scores if score.name == name)


def search_timesteps(
    search: Search,
    progress: Progress = lambda calls: None,
    say: Callable[[str], Any] = lambda text: None,
    checkpoint: Path | None = None,
) -> Found:
    """Find the S timesteps whose runs end nearest to converged samples from the same noise.

    Dynamic programming finds the path with the least sum of costs. The better of that and the
    closed-form spacings is refined by whole runs. With ``search.coefficients`` a whole solver is
    then fitted, which begins there. All are then judged on held-out noise.

    Args:
        checkpoint: a file that keeps what is found so far, from which the same search goes on after
            it was interrupted. It is removed at the end.

    Raises:
        ValueError: the file is of another search.
    """
    kept = Checkpoint(checkpoint, search)
    try:
        return _found(search, kept, progress, say)
    except BaseException:  # Ctrl-C, too
        if kept.content:
            kept.write()
        raise


def _found(search: Search, kept: Checkpoint, progress: Progress, say: Callable[[str], Any]) -> Found:
    runs = search.runs(search.refine_count, search.seed, progress)
    converged = search.converged(runs)
    lists, seen, began = _lists(search, runs, converged, kept, progress, say)
    best, fitted = lists["searched"], None
    plans = {name: (candidate, search.plan_of(candidate)) for name, candidate in lists.items()}
    if search.coefficients:
        fitted = fit_solver(search, runs, converged, best, kept, progress, say)
        plans[FITTED], seen[FITTED] = (fitted.solver.candidate, fitted.plan), fitted.seen
        best = fitted.solver.candidate if fitted.gained else best
    scores = _held_out(search, plans, seen, progress)
    chosen = plans[FITTED if fitted is not None and fitted.gained else "searched"][1]
    weights = chosen.history_weights
    found = TimestepList(
        search.times(best.timesteps),
        search.schedule.num_train_timesteps if isinstance(search.schedule, NoiseSchedule) else None,
        search.schedule.digest,
        search.order if weights is None else 1 + histories_read(weights),
        _residual(search, runs, best, converged),
        _provenance(search, scores, began, fitted),
        None if best.is_one_list else search.times(best.model_timesteps),
        None if weights is None else rows_of_plan(chosen),
        None if weights is None else chosen.prediction_type,
    )
    kept.remove()
    return Found(found, tuple(scores), fitted)


def _lists(
    search: Search, runs: Runs, converged: Tensor, kept: Checkpoint, progress: Progress, say: Callable[[str], Any]
) -> tuple[dict[str, Candidate], dict[str, float], str]:
    """Return the lists of timesteps that were found, their distances, and which of them was
    refined."""
    if "lists" in kept.content:
        saved = kept.content["lists"]
        lists = {name: Candidate(tuple(visited), tuple(told)) for name, (visited, told) in saved.items()}
        return lists, dict(kept.content["seen"]), kept.content["began"]
    if "dynamic" not in kept.content:
        kept.save(dynamic=list(_by_dynamic_programming(search, progress, say).timesteps))
    found = Candidate(tuple(kept.content["dynamic"]))
    refinement = Refinement(
        runs, search.plan_of, converged, search.num_timesteps, budget=10**9, known=kept.known, found=kept.add
    )
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
    kept.save(lists={name: (c.timesteps, c.model_timesteps) for name, c in lists.items()}, seen=seen, began=began)
    return lists, seen, began


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
    along = reference(runs, search.converging_plan(), search.times(search.candidate_timesteps))
    say(f"costs of steps between {len(along.timesteps)} candidates")
    costs = cost_table(along, search.plan_of(Candidate(search.candidate_timesteps)))
    return Candidate(tuple(search.candidate_timesteps[i] for i in best_timesteps(costs, search.num_inference_steps)))


def _residual(search: Search, runs: Runs, candidate: Candidate, converged: Tensor) -> tuple[float, ...]:
    """Measure the residual of the model's eps on its own converged samples, each with the noise of
    the next sample."""
    others = replace(runs, start=runs.start.roll(1, 0))
    return measure_eps_residual(others, search.plan_of(candidate), converged)


def _held_out(
    search: Search,
    plans: Mapping[str, tuple[Candidate, SamplingPlan]],
    seen: Mapping[str, float],
    progress: Progress,
) -> list[Score]:
    runs = search.runs(search.held_out, search.seed + 1, progress)
    converged = search.converged(runs)
    ends = {plan: runs.run(plan)[-1].x_t for plan in dict.fromkeys(plan for _, plan in plans.values())}
    scores = [
        Score(name, candidate, seen[name], sample_distances(ends[plan], converged).mean().item())
        for name, (candidate, plan) in plans.items()
    ]
    return sorted(scores, key=lambda score: score.held_out)


def _provenance(search: Search, scores: Sequence[Score], began: str, fitted: FittedSolver | None) -> dict[str, Any]:
    return {
        "method": "dynamic programming over costs of single steps (arXiv 2106.03802, 2405.11326), then moves judged by whole runs"
        + ("; model timesteps searched beside the timesteps visited" if search.model_timesteps else ""),
        "refined": began,
        **({} if fitted is None else {"fit": _fit_provenance(search, fitted)}),
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


def _fit_provenance(search: Search, fitted: FittedSolver) -> dict[str, Any]:
    return {
        "method": "weights of earlier predictions, timesteps and model timesteps by Levenberg and Marquardt's method "
        "through whole runs (as arXiv 2310.19075, 2403.01329 and 2502.17423 by gradients)",
        "began": fitted.began,
        "iterations": fitted.iterations,
        "samples": {"fit": search.refine_count, "validation": search.refine_count},
        "seeds": {"fit": search.seed, "validation": search.seed + 2},
        "validation": {"fitted": round(fitted.validated, 6), "order 2 before": round(fitted.textbook, 6)},
        "kept": fitted.gained,
    }
