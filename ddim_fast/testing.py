"""Tools for the tests of your own sampler: a float64 oracle, a comparison with derived tolerances,
and memory filled with NaN.

from ddim_fast.testing import assert_close, oracle

exact, _ = oracle.textbook_step("epsilon", x_t, eps, alpha_bar_t, alpha_bar_prev)
assert_close(my_step(...), exact, terms=...)

With pytest come the fixtures ``ddim_oracle``, ``ddim_subject``, ``ddim_seed`` and ``nan_memory``:
see docs/CI.md.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .utils.checks import check_choice, check_number
from .verify.checks.new_memory import nan_memory
from .verify.run import verify
from .verify.subjects.subject import ARITHMETIC
from .verify.truth import oracle
from .verify.truth.tolerances import COMPUTED_IN, allowed_error, allowed_error_in_type, assert_within


def assert_close(
    actual: Tensor,
    expected: np.ndarray | Tensor,
    terms: np.ndarray | Tensor | None = None,
    *,
    factor: float = 1.0,
    arithmetic: str = "exact",
    what: str = "result",
) -> None:
    """Check that each element is the exact value up to rounding: 4 eps of the type computed in (8
    for float64).

    Args:
        actual: float64, float32, float16 or bfloat16, on any device.
        expected: the exact values, float64, of the same shape, finite. Values of lower precision
            would hide errors of their size.
        terms: the sum of the magnitudes of each element's terms, like ``expected``; by default the
            element's own magnitude. A sum that is small by cancellation has larger terms than
            itself: ``oracle.row_step`` returns them for a step.
        factor: allow this many times as much, for results of many operations.
        arithmetic: "exact": half precision is computed in float32 and rounded once. "float32": half
            precision is computed as such.
        what: the result's name in the message.

    Raises:
        AssertionError: elements are too far off. The message has their number, and the index,
            value, exact value and allowed interval of the worst.
        ValueError, TypeError: an argument breaks a rule.
    """
    exact = _float64("expected", expected)
    sizes = np.abs(exact if terms is None else _float64("terms", terms))
    if not isinstance(actual, Tensor) or actual.dtype not in COMPUTED_IN:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in COMPUTED_IN)
        raise TypeError(f"actual must be a tensor of {names}, got {getattr(actual, 'dtype', type(actual).__name__)}")
    if sizes.shape != exact.shape:
        raise ValueError(f"terms must have the shape of expected, {exact.shape}, got {sizes.shape}")
    if not np.isfinite(exact).all() or not np.isfinite(sizes).all():
        raise ValueError("expected and terms must be finite, got infinity or NaN: compare those separately")
    factor = check_number("factor", factor, above=0)
    check_choice("arithmetic", arithmetic, ARITHMETIC)
    if tuple(actual.shape) != exact.shape:
        raise AssertionError(f"{what}: the shape must be {exact.shape}, got {tuple(actual.shape)}")
    assert_within(actual, exact, _allowed(actual.dtype, factor * sizes, arithmetic), what)


def _allowed(dtype: torch.dtype, terms: np.ndarray, arithmetic: str) -> np.ndarray:
    if arithmetic == "exact":
        return allowed_error(dtype, terms)
    return allowed_error_in_type(dtype, terms)


def _float64(name: str, values: np.ndarray | Tensor) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) and values.dtype == torch.float64 else values
    if not isinstance(array, (np.ndarray, np.generic)) or array.dtype != np.float64:
        found = getattr(values, "dtype", type(values).__name__)
        raise TypeError(f"{name} must be float64, an array or a tensor (such as oracle.row_step returns), got {found}")
    return np.asarray(array)


__all__ = ["assert_close", "nan_memory", "oracle", "verify"]
