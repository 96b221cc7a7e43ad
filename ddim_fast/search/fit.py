"""Fit a whole solver to a model: timesteps, model timesteps and weights of earlier predictions, so
that its runs end where converged ones do.

Row by row first: in a step that starts from given states the weights are the solution of a linear
least-squares problem (as DC-Solver, Zhao et al. 2024, arXiv 2409.03755, fits one number of a step).
Then jointly, through whole runs, as Bespoke solvers (Shaul et al. 2023 and 2024, arXiv 2310.19075,
2403.01329) and S4S (Frankel et al. 2025, arXiv 2502.17423) do by stochastic gradients. A solver has
few numbers and its error many elements, so here each iteration takes the derivative of every
element of the result by every number and solves for all of them (Levenberg and Marquardt), a few
tens of times. The derivatives are differences of runs, which reuse what comes before the step that
differs. The model needs no gradients of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..models.metrics import sample_distances
from ..plans.plan import SamplingPlan
from .costs import reference
from .refine import Candidate
from .runs import Runs, State, after
from .solver import Plans, Solver, weights_of_plan

HISTORIES = 2
RIDGE = 0.01
"""What deviations from the textbook cost: this share of the distance for a root mean square
deviation of 1, where the textbook's weights of second order are -1/2 in steps of equal length."""
ROW_RIDGE = 1e-3
"""The same of the fit row by row, as a share of the squared differences of predictions."""
TRIALS = 8
"""The most steps that are tried from one set of derivatives, each shorter than the one before."""
FIRST_DAMPING = 0.01
WEIGHT_CHANGE = 0.02
"""By how much a weight is changed for its derivative."""
TIME_CHANGE = 1 / 32
"""By how much a timestep is changed, as a share of the gap around it, at least 1."""
NEAREST = 0.3
"""Samples that are nearer than this share of the mean distance weigh no more than those there: few
that happen to be near would otherwise decide."""
LARGEST_MOVE = 0.4
"""The most that a timestep moves in an iteration, as a share of the gap around it."""
ENOUGH = 2e-3
"""After two iterations that gain less than this share of the distance each, or one that gains
nothing, the timesteps stay; and after as many more the fit ends."""


@dataclass(frozen=True)
class Parameter:
    """One number of a solver: ``kind`` "timestep", "model timestep" or "weight"; of step k, and of
    which of the two predictions before it."""

    kind: str
    k: int
    which: int = 0


@dataclass(frozen=True, eq=False)
class Trace:
    """A run with what its variations reuse: S + 1 states and S outputs of the model."""

    plan: SamplingPlan
    states: list[State]
    outputs: list[Tensor]

    @property
    def result(self) -> Tensor:
        return self.states[-1].x_t


@dataclass(eq=False)
class Fit:
    """A solver, and how near its runs end to converged ones from the same noise.

    Args:
        converged: converged samples ``(N, C, ...)`` from the noise of ``runs``.
        num_timesteps: the number of timesteps to choose from.
        validation: another set of noise with its converged samples: of the solvers that the
            iterations pass through, the one that is nearest there is kept.
        model_timesteps: fit the timesteps given to the model apart from those visited.
        iterations: the most of them.
        done: called after each iteration with the number of iterations so far and the fit itself.
    """

    runs: Runs
    plans: Plans
    converged: Tensor
    num_timesteps: int
    validation: tuple[Runs, Tensor]
    model_timesteps: bool = True
    iterations: int = 24
    done: Callable[[int, Fit], Any] = lambda iteration, fit: None
    damping: float = FIRST_DAMPING
    iteration: int = 0
    idle: int = 0
    moves_times: bool = True
    ended: bool = False
    current: Solver | None = field(default=None, init=False)
    best: Solver | None = field(default=None, init=False)
    validated: float = field(default=float("inf"), init=False)
    seen: float = field(default=float("nan"), init=False)

    def start(self, solvers: Sequence[Solver]) -> Solver:
        """Return the solver whose runs end nearest to converged ones, on the noise of the fit."""
        distances = [self.distance(self.trace(solver).result) for solver in solvers]
        return solvers[distances.index(min(distances))]

    def rows(self, candidate: Candidate, converging: SamplingPlan, times: Sequence[float]) -> Solver:
        """Return the solver with the weights that, in each step from where the steps before it led,
        come nearest to the converged trajectory.

        Args:
            converging: a plan of many steps that visits all of the candidate's timesteps.
            times: these timesteps, as the plan has them.
        """
        along = reference(self.runs, converging, times)
        ddim, textbook = self.plans.of_order(candidate, 1), self.plans.of_order(candidate, 2)
        state, weights = self.runs.first_state(textbook), []
        for k, step in enumerate(textbook.steps):
            m = self.runs.predict(state.x_t, step)
            first = after(state, ddim.steps[k], m, 1 + HISTORIES)
            assert first.x0_last is not None
            towards = [
                history - first.x0_last for history in (state.x0_last, state.x0_last_2)[:k] if history is not None
            ]
            start = weights_of_plan(textbook)[k]
            fitted = _least_squares(towards, along.x_t[k + 1] - first.x_t, start[: len(towards)])
            weights.append((*fitted, *[0.0] * (HISTORIES - len(fitted))))
            moved = first.x_t + sum((w * d for w, d in zip(fitted, towards, strict=True)), torch.zeros_like(first.x_t))
            state = replace(first, x_t=moved)
        return self.plans.with_weights(candidate, tuple(weights))  # type: ignore[arg-type]  # pairs

    def fit(self, solver: Solver) -> Solver:
        """Improve a solver as long as that helps, and return the one that is nearest on the
        validation noise."""
        trace = self.trace(solver)
        self.consider(solver, trace)
        while self.iteration < self.iterations and not self.ended:
            better, gained = self._iterate(solver, trace), 0.0
            self.iteration += 1
            if better is not None:
                gained = 1 - self._cost(*better) / self._cost(solver, trace)
                solver, trace = better
                self.consider(solver, trace)
            self.current = solver
            self.idle = self.idle + 1 if gained < ENOUGH else 0
            if better is None or self.idle == 2:
                # Timesteps are whole numbers: the weights may gain once these stay.
                self.ended, self.moves_times = not self.moves_times, False
                self.idle, self.damping = 0, FIRST_DAMPING
            self.done(self.iteration, self)
        assert self.best is not None
        return self.best

    def validation_distance(self, solver: Solver) -> float:
        """Return the distance of a solver's runs to converged ones on the validation noise."""
        runs, converged = self.validation
        return sample_distances(self._run(runs, self.plans.of(solver)), converged).mean().item()

    @property
    def rounding(self) -> float:
        """The distance that rounding alone may leave between two runs."""
        return 32 * torch.finfo(self.converged.dtype).eps * self.converged.double().square().mean().sqrt().item()

    def distance(self, result: Tensor) -> float:
        return sample_distances(result, self.converged).mean().item()

    def trace(self, solver: Solver) -> Trace:
        return self._traced(self.plans.of(solver))

    # ---- one iteration ---------------------------------------------------------------------------

    def consider(self, solver: Solver, trace: Trace) -> None:
        """Keep a solver if it is the nearest so far on the validation noise."""
        distance = self.validation_distance(solver)
        if distance < self.validated:
            self.best, self.validated, self.seen = solver, distance, self.distance(trace.result)

    def _iterate(self, solver: Solver, trace: Trace) -> tuple[Solver, Trace] | None:
        """Return a better solver and its run, or None."""
        if not self.distance(trace.result) > self.rounding:
            return None
        parameters = list(self._parameters(len(solver.deviations)))
        if not parameters:
            return None
        slopes = torch.stack([self._slope(solver, trace, parameter) for parameter in parameters])
        error = trace.result - self.converged
        distances = sample_distances(trace.result, self.converged).to(error.dtype)
        # The mean of distances, rather than of their squares: each sample weighted by the inverse
        # of its own.
        weights = 1 / (distances.clamp(min=NEAREST * distances.mean()) * error[0].numel() * len(error))
        weighted = slopes * weights.view(1, -1, *[1] * (error.ndim - 1))
        hessian = (weighted.flatten(1) @ slopes.flatten(1).T).double()
        gradient = (weighted.flatten(1) @ error.flatten()).double()
        # The ridge.
        scale = 2 * RIDGE * self.distance(trace.result) / max(1, sum(p.kind == "weight" for p in parameters))
        for i, parameter in enumerate(parameters):
            if parameter.kind == "weight":
                hessian[i, i] += scale
                gradient[i] += scale * solver.deviations[parameter.k][parameter.which]
        cost = self._cost(solver, trace)
        for _ in range(TRIALS):
            diagonal = hessian.diagonal()
            damped = hessian + torch.diag(self.damping * diagonal + 1e-12 * diagonal.max() + 1e-30)
            move = torch.linalg.solve(damped, -gradient).tolist()
            moved = self._moved(solver, dict(zip(parameters, move, strict=True)))
            if moved == solver:
                return None
            there = self.trace(moved)
            if self._cost(moved, there) < cost:
                self.damping = max(self.damping / 10, 1e-6)
                return moved, there
            self.damping *= 4
        return None

    def _cost(self, solver: Solver, trace: Trace) -> float:
        own = [value for pair in solver.deviations for value in pair]
        return self.distance(trace.result) * (1 + RIDGE * sum(value**2 for value in own) / max(1, len(own) - 3))

    def _parameters(self, S: int) -> Iterator[Parameter]:
        for k in range(S):
            if self.moves_times:
                yield Parameter("timestep", k)
            if self.moves_times and self.model_timesteps:
                yield Parameter("model timestep", k)
            for which in range(min(k, HISTORIES)):
                yield Parameter("weight", k, which)

    def _slope(self, solver: Solver, trace: Trace, parameter: Parameter) -> Tensor:
        """Return the derivative of the run's result by one number: for a timestep, per timestep."""
        change = WEIGHT_CHANGE
        if parameter.kind != "weight":
            change = max(1, round(TIME_CHANGE * _gap(solver.candidate, parameter.k, self.num_timesteps)))
        changed = self._moved(solver, {parameter: change})
        if changed == solver:  # at the end of the range
            change = -change
            changed = self._moved(solver, {parameter: change})
        if changed == solver:
            return torch.zeros_like(self.converged)
        k = parameter.k
        first, first_call = {
            "weight": (k, k + 1),
            "model timestep": (k, k),
            "timestep": (max(k - 1, 0), k),
        }[parameter.kind]
        plan = self.plans.of(changed)
        state = self.runs.first_state(plan) if first == 0 else trace.states[first]
        for step in plan.steps[first:]:
            m = trace.outputs[step.index] if step.index < first_call else self.runs.predict(state.x_t, step)
            state = after(state, step, m, 1 + HISTORIES)
        return (state.x_t - trace.result) / change

    def _moved(self, solver: Solver, moves: dict[Parameter, float]) -> Solver:
        """Return a solver with numbers changed: timesteps rounded, kept in order and within
        reach."""
        candidate, total = solver.candidate, self.num_timesteps
        visited, told = list(candidate.timesteps), list(candidate.model_timesteps)
        own = [list(pair) for pair in solver.deviations]
        for parameter, move in moves.items():
            k = parameter.k
            if parameter.kind == "weight":
                own[k][parameter.which] += move
                continue
            reach = max(1.0, LARGEST_MOVE * _gap(candidate, k, total))
            moved = round(max(-reach, min(reach, move)))
            if parameter.kind == "timestep":
                visited[k] += moved
            else:
                told[k] = min(max(told[k] + moved, 0), total - 1)
        for k in range(len(visited)):  # strictly decreasing, with room for those that follow
            above = visited[k - 1] if k else total
            visited[k] = min(max(visited[k], len(visited) - 1 - k), above - 1)
        given = tuple(told) if self.model_timesteps else ()
        return Solver(Candidate(tuple(visited), given), tuple((a, b) for a, b in own))

    def _traced(self, plan: SamplingPlan) -> Trace:
        states, outputs = [self.runs.first_state(plan)], []
        for step in plan.steps:
            outputs.append(self.runs.predict(states[-1].x_t, step))
            states.append(after(states[-1], step, outputs[-1], 1 + HISTORIES))
        return Trace(plan, states, outputs)

    @staticmethod
    def _run(runs: Runs, plan: SamplingPlan) -> Tensor:
        state = runs.first_state(plan)
        for step in plan.steps:
            state = after(state, step, runs.predict(state.x_t, step), 1 + HISTORIES)
        return state.x_t


def _gap(candidate: Candidate, k: int, num_timesteps: int) -> int:
    """Return the distance of the timesteps before and after the k-th, or of the ends of the
    range."""
    t = (num_timesteps, *candidate.timesteps, -1)
    return t[k] - t[k + 2]


def _least_squares(towards: list[Tensor], error: Tensor, start: Sequence[float]) -> list[float]:
    """Return the weights of ``towards`` whose sum is nearest to ``error``, drawn towards
    ``start``."""
    if not towards:
        return []
    columns = torch.stack([direction.double().flatten() for direction in towards])
    normal = columns @ columns.T
    ridge = ROW_RIDGE * normal.diagonal().mean() * torch.eye(len(towards), dtype=torch.float64, device=normal.device)
    begin = torch.tensor(start, dtype=torch.float64, device=normal.device)
    right = columns @ error.double().flatten() + ridge @ begin
    if not normal.diagonal().max() > 0:  # all predictions are alike: the weights do not matter
        return list(start)
    return torch.linalg.solve(normal + ridge, right).tolist()


def calls(S: int, model_timesteps: bool, iterations: int) -> tuple[int, int]:
    """Return the largest number of model calls of ``Fit.fit`` for a solver of S steps: for each
    sample of the fit, and for each of the validation."""
    slopes = sum((1 + model_timesteps) * (S - k) + min(k, HISTORIES) * (S - k - 1) for k in range(S))
    return S + iterations * (slopes + TRIALS * S), (iterations + 1) * S
