"""How far a result may be from float64: the only table of tolerances, in units of the machine epsilon of the type computed in.

An error is measured against the sum of the magnitudes of the result's terms, as rounding makes it: a result small by cancellation
may be wrong in more of its digits. 4 eps allow one rounding of each coefficient, product, sum and of the result, and little else.
Half precision is computed in float32 and rounded once: its result must be the correct rounding of some number that float32 was
allowed to find, which makes it the correctly rounded exact result in nearly all elements.
"""

from __future__ import annotations

import numpy as np
import oracle
import torch

COMPUTED_IN = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
SCALED_EPS = {torch.float64: 8.0, torch.float32: 4.0}
SHARE_CORRECTLY_ROUNDED = 0.999
"""Of the elements of a realistic half-precision step; the rest are off by one unit in the last place."""

ROUND = {
    torch.float64: lambda x: x,
    torch.float32: oracle.round_to_float32,
    torch.float16: oracle.round_to_float16,
    torch.bfloat16: oracle.round_to_bfloat16,
}
_TINIEST = {torch.float64: 5e-324, torch.float32: 2.0**-149}  # results this small have a fixed, not a relative, spacing


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().to(torch.float64).numpy()


def allowed_error(dtype: torch.dtype, terms: np.ndarray) -> np.ndarray:
    """The largest error of the number before it is rounded to a half type."""
    kind = COMPUTED_IN[dtype]
    return SCALED_EPS[kind] * (torch.finfo(kind).eps * terms + _TINIEST[kind])


def assert_near(actual: torch.Tensor, exact: np.ndarray, terms: np.ndarray, what: str = "result") -> None:
    """Each element of ``actual`` is one that its type may have, for finite ``exact``."""
    got, allowed = to_numpy(actual), allowed_error(actual.dtype, terms)
    rounded = ROUND[actual.dtype]
    lowest, highest = (rounded(bound).reshape(exact.shape) for bound in (exact - allowed, exact + allowed))
    wrong = ~((lowest <= got) & (got <= highest))  # NaN is wrong, too
    if wrong.any():
        i = tuple(np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}: {wrong.sum()} of {wrong.size} elements too far from float64; first at {tuple(map(int, i))}: "
            f"got {got[i]!r}, exact {exact[i]!r}, terms {terms[i]!r}, allowed {lowest[i]!r} to {highest[i]!r}"
        )


def share_correctly_rounded(actual: torch.Tensor, exact: np.ndarray) -> float:
    return float(np.mean(to_numpy(actual) == ROUND[actual.dtype](exact).reshape(exact.shape)))
