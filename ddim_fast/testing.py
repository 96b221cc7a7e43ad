"""For the tests of your own sampler: comparisons with float64 whose tolerances are derived, and memory that shows what nobody wrote.

from ddim_fast.testing import assert_close, oracle

exact, _ = oracle.textbook_step("epsilon", x_t, eps, alpha_bar_t, alpha_bar_prev)
assert_close(my_step(...), exact, terms=...)

With pytest come the fixtures ``ddim_oracle``, ``ddim_subject``, ``ddim_seed`` and ``nan_memory``: see docs/CI.md.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

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
    """Each element is the truth, within what rounding may do to it: 4 eps of the type computed in (8 of float64).

    Args:
        actual: float64, float32, float16 or bfloat16, on any device.
        expected: the truth, float64, of the same shape, finite. A truth of lower precision would hide errors of its size.
        terms: the sum of the magnitudes of the terms that each element is made of, like ``expected``; its own magnitude if none. A sum
            that is small by cancellation has larger terms than itself: ``oracle.row_step`` tells them for a step.
        factor: for results of many operations: how many times as much is allowed.
        arithmetic: "exact": half precision is computed in float32 and rounded once. "float32": half precision is computed as such.
        what: the result's name in the message.

    Raises:
        AssertionError: how many elements are too far off; of the worst, its place, its value, the truth, and the interval allowed.
        ValueError, TypeError: an argument breaks a rule.
    """
    expected = _float64("expected", expected)
    terms = np.abs(expected) if terms is None else np.abs(_float64("terms", terms))
    if not isinstance(actual, Tensor) or actual.dtype not in COMPUTED_IN:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in COMPUTED_IN)
        raise TypeError(f"actual must be a tensor of {names}, got {getattr(actual, 'dtype', type(actual).__name__)}")
    if terms.shape != expected.shape:
        raise ValueError(f"terms must have the shape of expected, {expected.shape}, got {terms.shape}")
    if not np.isfinite(expected).all() or not np.isfinite(terms).all():
        raise ValueError("expected and terms must be finite: compare infinities and NaN by themselves")
    if not factor > 0:
        raise ValueError(f"factor must be above 0, got {factor!r}")
    if arithmetic not in ARITHMETIC:
        raise ValueError(f"arithmetic must be one of {', '.join(ARITHMETIC)}, got {arithmetic!r}")
    if tuple(actual.shape) != expected.shape:
        raise AssertionError(f"{what}: the shape must be {expected.shape}, got {tuple(actual.shape)}")
    assert_within(actual, expected, _allowed(actual.dtype, factor * terms, arithmetic), what)


def _allowed(dtype: torch.dtype, terms: np.ndarray, arithmetic: str) -> np.ndarray:
    if arithmetic == "exact":
        return allowed_error(dtype, terms)
    return allowed_error_in_type(dtype, terms)


def _float64(name: str, values: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy() if values.dtype == torch.float64 else values
    if getattr(values, "dtype", None) != np.float64:
        found = getattr(values, "dtype", type(values).__name__)
        raise TypeError(f"{name} must be float64, an array or a tensor (for instance of oracle.row_step), got {found}")
    return np.asarray(values)


__all__ = ["assert_close", "nan_memory", "oracle", "verify"]
