"""Dynamic programming against trying every path."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim_fast.search import best_timesteps


def total(costs, path):
    """Of a run through these candidates, and on to clean data."""
    K = costs.shape[-2]
    ends = [*path, K]
    if costs.ndim == 2:
        return sum(costs[i, j] for i, j in pairwise(ends))
    before = [K, *path]
    return sum(costs[step] for step in zip(before, ends, ends[1:], strict=False))


def least_by_trying(costs, S):
    K = costs.shape[-2]
    return min(total(costs, (0, *rest)) for rest in combinations(range(1, K), S - 1))


def table(rng, K, order, missing=0.0):
    shape = (K, K + 1) if order == 1 else (K + 1, K, K + 1)
    costs = rng.exponential(size=shape)
    costs[rng.random(shape) < missing] = np.inf
    i, j = np.arange(K)[:, None], np.arange(K + 1)[None, :]
    costs[..., i >= j] = np.inf
    if order == 2:
        before = np.arange(K)[:, None]
        costs[:K][np.broadcast_to((before >= np.arange(K)[None, :])[:, :, None], (K, K, K + 1))] = np.inf
    return costs


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.sampled_from([1, 2]), st.data())
def test_the_least_of_all_paths(seed, K, order, data):
    S = data.draw(st.integers(1, K))
    costs = table(np.random.default_rng(seed), K, order)
    path = best_timesteps(costs, S)
    assert len(path) == S
    assert path[0] == 0
    assert path == sorted(set(path))
    assert total(costs, path) == pytest.approx(least_by_trying(costs, S))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.sampled_from([1, 2]), st.data())
def test_steps_that_are_not_there_are_not_taken(seed, K, order, data):
    S = data.draw(st.integers(1, K))
    costs = table(np.random.default_rng(seed), K, order, missing=0.4)
    least = least_by_trying(costs, S)
    if np.isinf(least):
        with pytest.raises(ValueError, match=f"no run of {S} steps"):
            best_timesteps(costs, S)
    else:
        assert total(costs, best_timesteps(costs, S)) == pytest.approx(least)


def test_second_order_needs_the_step_before():
    """Where a step is cheap after one and dear after another, no table of first order tells them apart."""
    costs = table(np.random.default_rng(0), 3, 2)
    costs[np.isfinite(costs)] = 1.0
    costs[0, 2, 3] = 100.0  # to the end from 2, after a step from 0
    assert best_timesteps(costs, 2) == [0, 1]
    costs[0, 1, 3] = 200.0
    assert best_timesteps(costs, 2) == [0, 2]


@pytest.mark.parametrize(
    ("shape", "S", "said"),
    [
        ((3, 3), 1, r"costs must be \(K, K \+ 1\) or \(K \+ 1, K, K \+ 1\), got \(3, 3\)"),
        ((3, 3, 4), 1, r"got \(3, 3, 4\)"),
        ((3, 4), 0, r"must be an integer in \[1, 3\], got 0: there are 3 candidates"),
        ((4, 3, 4), 4, r"must be an integer in \[1, 3\], got 4: there are 3 candidates"),
    ],
)
def test_errors(shape, S, said):
    with pytest.raises(ValueError, match=said):
        best_timesteps(np.ones(shape), S)
