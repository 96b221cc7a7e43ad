"""A solver of S steps as numbers: the timesteps, what the model is told at each, and the weights of
earlier predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..plans.history_weights import HistoryWeights
from ..plans.levels import level_of
from ..plans.plan import SamplingPlan
from .refine import Candidate


@dataclass(frozen=True)
class Solver:
    """Timesteps with weights of earlier predictions.

    Attributes:
        deviations: for each step, how far the weights of the x0 of the two steps before are from
            the textbook's of order 2 at these timesteps, in multiples of what x0 counts for in the
            step (``x0_weights``). So a solver whose timesteps move keeps the textbook's part of
            them.
    """

    candidate: Candidate
    deviations: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Plans:
    """The plans of solvers.

    Args:
        of_order: returns the textbook's plan of a candidate, of order 1, 2 or 3.
        of_weights: returns the plan of a candidate with weights of earlier predictions.
    """

    of_order: Callable[[Candidate, int], SamplingPlan]
    of_weights: Callable[[Candidate, HistoryWeights], SamplingPlan]

    def of(self, solver: Solver) -> SamplingPlan:
        """Return the plan of a solver."""
        textbook = self.of_order(solver.candidate, 2)
        scales = x0_weights(textbook)
        weights = tuple(
            (textbook_1 + scale * own_1, textbook_2 + scale * own_2)
            for (textbook_1, textbook_2), (own_1, own_2), scale in zip(
                weights_of_plan(textbook), solver.deviations, scales, strict=True
            )
        )
        return self.of_weights(solver.candidate, weights)

    def textbook(self, candidate: Candidate, order: int) -> Solver:
        """Return the solver whose steps are the textbook's, of order 2 or 3."""
        return self.with_weights(candidate, weights_of_plan(self.of_order(candidate, order)))

    def with_weights(self, candidate: Candidate, weights: HistoryWeights) -> Solver:
        """Return the solver with these weights of earlier predictions."""
        second = self.of_order(candidate, 2)
        deviations = [
            ((last - textbook_1) / scale, (last_2 - textbook_2) / scale)
            for (last, last_2), (textbook_1, textbook_2), scale in zip(
                weights, weights_of_plan(second), x0_weights(second), strict=True
            )
        ]
        return Solver(candidate, tuple(deviations))


def weights_of_plan(plan: SamplingPlan) -> HistoryWeights:
    """Return the weights of earlier predictions in the rows of a plan."""
    return tuple((step.coefficients.prev_history, step.coefficients.prev_history_2) for step in plan.steps)


def x0_weights(plan: SamplingPlan) -> Sequence[float]:
    """Return what x0 counts for in each step for a given x_t: alpha_prev - alpha_t sigma_prev /
    sigma_t, which is positive where noise falls."""
    levels = [(level_of(step.level_t), level_of(step.level_prev)) for step in plan.steps]
    return [target.alpha - at_t.alpha * (target.sigma / at_t.sigma) for at_t, target in levels]
