"""Fit the polynomials of the noise standard and print them: ``python tools/noise_polynomials.py``.

Each is the minimax polynomial (in the error that matters for the normals), found by Lawson's
iteration. Coefficients are rounded to float32 one by one, lowest order first, and the remaining
ones are fitted again to the residual. ``kernels/noise.py`` holds the printed values;
``tests/kernels/test_noise.py`` runs this script and compares them bit by bit.
"""

from __future__ import annotations

import numpy as np


def lawson(powers: np.ndarray, target: np.ndarray, weight: np.ndarray, iterations: int = 300) -> np.ndarray:
    """Return the coefficients c that minimise ``max |weight * (powers @ c - target)|``."""
    importance = np.full(len(target), 1.0 / len(target))
    best, best_error = None, np.inf
    for _ in range(iterations):
        scale = np.sqrt(importance) * weight
        coefficients = np.linalg.lstsq(powers * scale[:, None], target * scale, rcond=None)[0]
        error = np.abs(weight * (powers @ coefficients - target))
        if error.max() < best_error:
            best, best_error = coefficients, error.max()
        importance *= error / error.max() + 1e-3
        importance /= importance.sum()
    return best


def fit(
    function, low: float, high: float, degree: int, weight=lambda x: np.ones_like(x)
) -> tuple[list[np.float32], float]:
    """Fit a polynomial to ``function`` on [low, high].

    Returns:
        Its float32 coefficients, lowest order first, and its largest weighted error.
    """
    x = 0.5 * (low + high) + 0.5 * (high - low) * np.cos(np.pi * (np.arange(4000) + 0.5) / 4000)
    powers = x[:, None] ** np.arange(degree + 1)
    target, rounded = function(x), []
    for order in range(degree + 1):
        rest = target - powers[:, :order] @ np.array(rounded, dtype=np.float64) if order else target
        rounded.append(np.float32(lawson(powers[:, order:], rest, weight(x))[0]))
    error = np.abs(weight(x) * (powers @ np.array(rounded, dtype=np.float64) - target)).max()
    return rounded, float(error)


def minus_two_log(f: np.ndarray) -> np.ndarray:
    """Return -2 log(1 + f) / f."""
    return np.where(f == 0, -2.0, -2 * np.log1p(f) / np.where(f == 0, 1, f))


def sine_quarter(y: np.ndarray) -> np.ndarray:
    """Return sin(pi/2 t) / t as a function of y = t^2."""
    return np.sin(np.pi / 2 * np.sqrt(y)) / np.sqrt(y)


def cosine_quarter(y: np.ndarray) -> np.ndarray:
    """Return cos(pi/2 t) as a function of y = t^2."""
    return np.cos(np.pi / 2 * np.sqrt(y))


FITS = {
    # relative error, because r is the square root of this
    "MINUS_TWO_LOG": (minus_two_log, np.sqrt(0.5) - 1, np.sqrt(2.0) - 1, 7, lambda x: 1 / np.abs(minus_two_log(x))),
    "SINE": (sine_quarter, 1e-12, 1.0, 4, lambda y: 1 / sine_quarter(y)),
    "COSINE": (cosine_quarter, 1e-12, 1.0, 4, np.ones_like),
}

if __name__ == "__main__":
    for name, arguments in FITS.items():
        coefficients, error = fit(*arguments)
        print(f"{name} = (  # largest error {error:.2e}")
        for c in coefficients:
            print(f"    {float(c).hex()},  # {c:.9g}")
        print(")")
