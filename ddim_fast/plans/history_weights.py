"""Weights of the x0 that earlier steps predicted, fitted to a model: one pair for each step.

    x_prev = a x_t + b m + h_1 x0_last + h_2 x0_last_2

A solver of S steps is S such rows. Two of the four numbers of a row are free: where x0 and eps stay
the same along the trajectory, every step has to be exact, as DDIM's is, and this fixes a and b for
given h_1 and h_2 (``coefficients.history_coefficients``). So the pair (h_1, h_2) is what is fitted
and what a plan holds; a file has whole rows, which are checked against the plan's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..utils.checks import check_number, refuse

HistoryWeights = tuple[tuple[float, float], ...]
Rows = tuple[tuple[float, float, float, float], ...]


def number_rows(name: str, values: Any, width: int) -> tuple[tuple[float, ...], ...]:
    """Return rows of finite numbers from nested lists, an array or a tensor.

    Raises:
        TypeError, ValueError: they are none, or have another width.
    """
    plain = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(plain, (str, bytes)) or not isinstance(plain, Sequence):
        refuse(f"{name} must be a list of {width} numbers for each step", values, kind=TypeError)
    rows = []
    for index, row in enumerate(plain):
        if isinstance(row, (str, bytes)) or not isinstance(row, Sequence) or len(row) != width:
            refuse(f"{name}[{index}] must be {width} numbers", row)
        rows.append(tuple(check_number(f"{name}[{index}][{k}]", value) for k, value in enumerate(row)))
    return tuple(rows)


def explicit_history_weights(weights: Any, num_inference_steps: int, name: str = "history_weights") -> HistoryWeights:
    """Check weights of the caller's own and return them as pairs of floats.

    Args:
        weights: for each of the S = ``num_inference_steps`` steps, the weights of the x0 of the
            step before and of the one before that: 0 where there was no such step.
        name: what to call them in errors.

    Raises:
        TypeError: they are no list of pairs.
        ValueError: there are not S, a number is not finite, or one is for a step that was not
            taken.
    """
    pairs = number_rows(name, weights, 2)
    if len(pairs) != num_inference_steps:
        raise ValueError(f"{name} must be one row for each of the {num_inference_steps} timesteps, got {len(pairs)}")
    for index, pair in enumerate(pairs[:2]):
        if any(pair[index:]):
            raise ValueError(
                f"{name}[{index}] must have weights of 0 for steps that were not taken before it, got {pair}: there are {index}"
            )
    return tuple((float(last), float(last_2)) for last, last_2 in pairs)


def histories_read(weights: HistoryWeights) -> int:
    """Return how many earlier predictions a step reads at most: 0, 1 or 2."""
    return 2 if any(last_2 for _, last_2 in weights) else int(any(last for last, _ in weights))


def last_history_weights(weights: HistoryWeights, count: int) -> HistoryWeights:
    """Return the weights of the last ``count`` steps alone: those of predictions that are then not
    made become 0, and the step consistent without them."""
    last = weights[len(weights) - count :]
    return tuple((w if index > 0 else 0.0, w_2 if index > 1 else 0.0) for index, (w, w_2) in enumerate(last))


def weights_of_rows(rows: Rows) -> HistoryWeights:
    """Return the pair of each row (a, b, h_1, h_2)."""
    return tuple((last, last_2) for _, _, last, last_2 in rows)
