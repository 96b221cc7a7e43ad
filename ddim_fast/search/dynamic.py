"""The best path of a given number of steps through a table of costs, by dynamic programming (Watson et al. 2021, algorithm 1)."""

from __future__ import annotations

import numpy as np


def best_timesteps(costs: np.ndarray, num_inference_steps: int) -> list[int]:
    """The candidates that a run of S steps visits, so that its costs add up to the least.

    Candidate K stands for clean data, where every run ends. The first candidate, 0, is the noisiest; every run begins there.

    Args:
        costs: of a step, not negative; infinite where there is no such step. First order, ``(K, K + 1)``: ``costs[i, j]`` of a step from
            candidate i to j > i. Second order, ``(K + 1, K, K + 1)``: ``costs[l, i, j]`` of that step where the one before came from l < i,
            or none did: l = K.
        num_inference_steps: 1 <= S <= K.

    Returns:
        S numbers of candidates, increasing, 0 first.

    Raises:
        ValueError: the table has another shape, or S is out of range, or every run has infinite costs.
    """
    K = costs.shape[-2]
    if costs.shape not in ((K, K + 1), (K + 1, K, K + 1)):
        raise ValueError(f"costs must be (K, K + 1) or (K + 1, K, K + 1), got {costs.shape}")
    if not 1 <= num_inference_steps <= K:
        raise ValueError(
            f"num_inference_steps must be from 1 to the number of candidates, {K}, got {num_inference_steps}"
        )
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
    """The same over pairs of neighbouring candidates."""
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
