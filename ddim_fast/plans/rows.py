"""The rows of a plan as a file has them: (a, b, h_1, h_2) for each step."""

from __future__ import annotations

import numpy as np

from .history_weights import Rows
from .plan import SamplingPlan

_SAME = 1e-9
"""How far a coefficient of a file may be from the plan's, relative to the largest of its row: both
are computed in float64 from the same levels."""


def rows_of_plan(plan: SamplingPlan) -> Rows:
    """Return (a, b, h_1, h_2) of each step of a plan, where nothing is clipped."""
    rows = (step.coefficients for step in plan.steps)
    return tuple((*row.folded, row.prev_history, row.prev_history_2) for row in rows)


def check_rows(rows: Rows, plan: SamplingPlan, name: str) -> None:
    """Check that the rows of a file are those of the plan that its timesteps and weights make.

    Args:
        name: what to call the file in the error.

    Raises:
        ValueError: a step is not consistent: with constant x0 and eps it would not be exact, since
            the rows were fitted for another schedule or prediction type, or changed.
    """
    for index, (row, ours) in enumerate(zip(rows, rows_of_plan(plan), strict=True)):
        room = _SAME * max(map(abs, ours))
        if not np.allclose(row, ours, rtol=0, atol=room):
            wanted, got = (tuple(float(f"{value:.9g}") for value in values[:2]) for values in (ours, row))
            raise ValueError(
                f"{name} must hold consistent coefficients: with its weights of earlier predictions, step {index} from t = "
                f"{plan.steps[index].t} needs (a, b) = {wanted} for {plan.prediction_type} on this schedule, got {got}: "
                "search again with this model and schedule"
            )
