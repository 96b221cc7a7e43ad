"""Measure the order of convergence of the multistep solvers of diffusers, by its own methods in float64.

The steps are of equal length in lambda = log(alpha / sigma), from -4 to 4, and the model is exact.
"""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from scipy.integrate import solve_ivp
from torch import Tensor

STEPS = (20, 40, 80, 160, 320)
FIRST, LAST = -4.0, 4.0
MEANS, WEIGHTS, STD_DEV = (-1.0, 0.4, 1.5), (0.3, 0.5, 0.2), 0.25
"""Of a mixture of normal distributions, the data of the deterministic solvers."""
MEAN, WIDTH = 0.3, 0.5
"""Of a normal distribution, the data of the SDE solvers."""

SOLVERS = [
    ("dpmsolver++", 2, False),
    ("dpmsolver++", 3, False),
    ("dpmsolver++", 3, True),
    ("dpmsolver", 3, False),
    ("dpmsolver", 3, True),
    ("sde-dpmsolver++", 2, False),
    ("sde-dpmsolver++", 3, False),
    ("sde-dpmsolver++", 3, True),
]
"""algorithm_type, solver_order, and whether the second divided difference has the weight of the derivation."""


def measured() -> list[dict[str, Any]]:
    """Return the error of each solver by the number of steps: the largest of several samples of the
    mixture; of the SDE solvers, that of the standard deviation of all samples."""
    rows = []
    for algorithm, order, derived in SOLVERS:
        error = _error_of_std_dev if algorithm.startswith("sde-") else _error_of_samples
        errors = [error(_scheduler(algorithm, order, n), derived) for n in STEPS]
        rows.append({"algorithm": algorithm, "order": order, "derived": derived, "errors": errors})
    return rows


def _scheduler(algorithm: str, order: int, steps: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dpmsolver is deprecated there
        scheduler = DPMSolverMultistepScheduler(
            algorithm_type=algorithm, solver_order=order, final_sigmas_type="sigma_min", prediction_type="sample"
        )
    scheduler.sigmas = torch.exp(-torch.linspace(FIRST, LAST, steps + 1, dtype=torch.float64))
    return scheduler


def _run(scheduler: Any, x: Tensor, x0_of: Any, derived: bool, noise: Tensor | None = None) -> Tensor:
    """Run the scheduler's updates from where ``x`` is.

    Args:
        noise: (steps, ...), standard normal noise of each step.
    """
    outputs: list[Tensor] = []
    for index in range(len(scheduler.sigmas) - 1):
        scheduler._step_index = index
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index])
        outputs.append(scheduler.convert_model_output(x0_of(x, alpha, sigma), sample=x))
        z = None if noise is None else noise[index]
        order = min(scheduler.config.solver_order, index + 1)
        if order == 1:
            x = scheduler.dpm_solver_first_order_update(outputs[-1], sample=x, noise=z)
        elif order == 2:
            x = scheduler.multistep_dpm_solver_second_order_update(outputs, sample=x, noise=z)
        else:
            x = scheduler.multistep_dpm_solver_third_order_update(outputs, sample=x, noise=z)
            x = x + _missing(scheduler, index, outputs) if derived else x
    return x


def _missing(scheduler: Any, index: int, outputs: list[Tensor]) -> Tensor:
    """Return what the derivation has in a step of third order, and the scheduler has not.

    With z = -h, h or -2 h the integral of the second divided difference has the weight 2 s ((e^z - 1
    - z) / z^2 - 1/2) of alpha or -sigma, s = -1 or 1. The scheduler has it without the 2; in the SDE
    form with the other sign of the 1/2.
    """
    levels = [scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[i]) for i in range(index + 1, index - 3, -1)]
    lambdas = [math.log(alpha / sigma) for alpha, sigma in levels]
    h, h_last, h_before = (after - before for after, before in pairwise(lambdas))
    newest, last, before = outputs[-1], outputs[-2], outputs[-3]
    difference = h / (h_last + h_before) * (h / h_last * (newest - last) - h / h_before * (last - before))
    (alpha, sigma), algorithm = levels[0], scheduler.config.algorithm_type
    if algorithm == "dpmsolver":
        return -sigma * ((math.expm1(h) - h) / h**2 - 0.5) * difference
    z = -h if algorithm == "dpmsolver++" else -2 * h
    moment = (math.expm1(z) - z) / z**2
    shipped = -moment + 0.5 if algorithm == "dpmsolver++" else -moment - 0.5
    return alpha * (-2 * (moment - 0.5) - shipped) * difference


def _level(at: float) -> tuple[float, float]:
    sigma = math.exp(-at)
    return 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)


def _x0_of_mixture(x: Any, alpha: float, sigma: float) -> Any:
    """Return E[x0 | x] of the mixture."""
    x, variance = np.asarray(x)[..., None], float(alpha) ** 2 * STD_DEV**2 + float(sigma) ** 2
    means = np.array(MEANS)
    logits = np.log(WEIGHTS) - (x - float(alpha) * means) ** 2 / (2 * variance)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return (shares * (STD_DEV**2 * float(alpha) * x + float(sigma) ** 2 * means) / variance).sum(-1)


def _error_of_samples(scheduler: Any, derived: bool) -> float:
    start = np.linspace(-2.5, 2.5, 9)
    got = _run(scheduler, torch.from_numpy(start), lambda *at: torch.from_numpy(_x0_of_mixture(*at)), derived)

    def slope(at: float, scaled: np.ndarray) -> np.ndarray:  # d (x / alpha) / d lambda = x0 - x / alpha
        alpha, sigma = _level(at)
        return _x0_of_mixture(alpha * scaled, alpha, sigma) - scaled

    path = solve_ivp(slope, (FIRST, LAST), start / _level(FIRST)[0], method="DOP853", rtol=1e-13, atol=1e-15)
    return float(np.abs(got.numpy() - _level(LAST)[0] * path.y[:, -1]).max())


def _error_of_std_dev(scheduler: Any, derived: bool) -> float:
    """Everything is linear in the first sample and in the noise of each step, so runs with one of
    them at a time give the variance of the last sample."""
    steps = len(scheduler.sigmas) - 1
    (alpha, sigma), (alpha_last, sigma_last) = _level(FIRST), _level(LAST)

    def x0_of(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (WIDTH**2 * alpha * x + sigma**2 * MEAN) / (alpha**2 * WIDTH**2 + sigma**2)

    noise = torch.eye(steps, steps + 2, dtype=torch.float64)
    x = torch.zeros(steps + 2, dtype=torch.float64)
    x[steps] = math.sqrt(alpha**2 * WIDTH**2 + sigma**2)
    x = _run(scheduler, x, x0_of, derived, noise)
    std_dev = float((x[:-1] - x[-1]).square().sum().sqrt())
    return abs(std_dev - math.sqrt(alpha_last**2 * WIDTH**2 + sigma_last**2))


def orders(errors: list[float]) -> list[float]:
    """Return the order of convergence from each number of steps to the next."""
    return [math.log2(before / after) for before, after in pairwise(errors)]


if __name__ == "__main__":
    for row in measured():
        print(row["algorithm"], row["order"], "derived" if row["derived"] else "shipped", end=": ")
        print(
            *(f"{error:.2e}" for error in row["errors"]), "order", *(f"{order:.2f}" for order in orders(row["errors"]))
        )
