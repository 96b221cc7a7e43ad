"""Fit the polynomial of SiLU's exponential and print it: ``python tools/silu_polynomial.py``.

(exp(-r) - 1) / r on +-log(2) / 2, with -1 as the first coefficient, in relative error of exp(-r).
``kernels/csrc/normalization.inl`` holds the printed values; ``tests/kernels/test_normalization.py``
compares them.
"""

from __future__ import annotations

import numpy as np
from noise_polynomials import fit

END = np.log(2) / 2 * 1.001  # k is rounded from a product in float32


def rest(r: np.ndarray) -> np.ndarray:
    """Return (exp(-r) - 1 + r) / r^2."""
    return (np.expm1(-r) + r) / r**2


def coefficients() -> tuple[list[str], float]:
    """Return the float32 coefficients in C's notation, lowest order first, and the largest error."""
    fitted, error = fit(rest, -END, END, 4, lambda r: r**2 * np.exp(r))
    return [f"{float(c).hex()}f".replace("0000000p", "p") for c in (-1.0, *fitted)], error


if __name__ == "__main__":
    values, error = coefficients()
    print(f"{', '.join(values)}  // largest relative error {error:.2e}")
