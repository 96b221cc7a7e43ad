"""The cheapest path of S steps through a table of costs, by dynamic programming (Watson et al.
2021, algorithm 1)."""

from __future__ import annotations

import numpy as np

from ..utils.checks import check_integer, refuse


def best_timesteps(costs: np.ndarray, num_inference_steps: int) -> list[int]:
    """Return the candidates of the run of S steps with the least sum of costs.

    Candidate 0 is the noisiest, where every run begins. Candidate K stands for clean data, where
    every run ends.

    Args:
        costs: the cost of each step, not negative; infinite where a step is not possible. Order 1,
            ``(K, K + 1)``: ``costs[i, j]`` of the step from candidate i to j > i. Order 2, ``(K +
            1, K, K + 1)``: ``costs[l, i, j]`` of the same step after one from l < i; l = K where it
            is the first step.
        num_inference_steps: 1 <= S <= K.

    Returns:
        S numbers of candidates, increasing, 0 first.

    Raises:
        TypeError: the table is no NumPy array, or S no integer.
        ValueError: the table has another shape, or S is out of range, or every run has infinite
            costs.
    """
    if not isinstance(costs, np.ndarray):
        refuse("costs must be a NumPy array (K, K + 1) or (K + 1, K, K + 1)", costs, kind=TypeError)
    K = costs.shape[-2] if costs.ndim > 1 else 0
    if costs.shape not in ((K, K + 1), (K + 1, K, K + 1)):
        raise ValueError(f"costs must be (K, K + 1) or (K + 1, K, K + 1), got {costs.shape}")
    check_integer("num_inference_steps", num_inference_steps, at_least=1, at_most=K, remedy=f"there are {K} candidates")
    path = (_first_order if costs.ndim == 2 else _second_order)(costs, num_inference_steps)
    if path is None:
        raise ValueError(f"no run of {num_inference_steps} steps has finite costs: use more candidates")
    return path


def _first_order(costs: np.ndarray, S: int) -> list[int] | None:
    K = len(costs)
    least = np.full(K + 1, np.inf)  # of runs that are at a candidate after so many steps
    least[0] = 0
    came_from = []
    for _ in range(S):
        totals = least[:K, None] + costs
        came_from.append(totals.argmin(axis=0))
        least = totals.min(axis=0)
    if not np.isfinite(least[K]):
        return None
    path = [K]
    for sources in reversed(came_from):
        path.append(int(sources[path[-1]]))
    return path[:0:-1]


def _second_order(costs: np.ndarray, S: int) -> list[int] | None:
    """Search over pairs of successive candidates instead of candidates."""
    K = costs.shape[1]
    least = np.full((K, K + 1), np.inf)  # of runs whose last step went from i to j
    least[0] = costs[K, 0]
    came_from = []
    for _ in range(S - 1):
        totals = least[:, :K, None] + costs[:K]
        came_from.append(totals.argmin(axis=0))
        least = totals.min(axis=0)
    last = int(least[:, K].argmin())
    if not np.isfinite(least[last, K]):
        return None
    path = [K, last]
    for sources in reversed(came_from):
        path.append(int(sources[path[-1], path[-2]]))
    return path[:0:-1]
