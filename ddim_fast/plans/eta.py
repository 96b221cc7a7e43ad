"""What eta means: the table of conventions by which one number says how much noise a step adds.

Every step here goes from x_t = alpha_t x0 + sigma_t eps to::

    x_prev = alpha_prev x0 + prev_eps eps + std_dev z

A convention gives std_dev. Where prev_eps^2 + std_dev^2 = sigma_prev^2, the step keeps the
marginals: with a model that knows x0 and eps, x_prev is a sample at its level, however long the
step is.

To add one, add an entry to ``ETA_SCALES``, and its formula, written independently, to
``tests/plans/test_eta.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from ..utils.checks import refuse
from .coefficients import check_eta, ddim_variance, ddpm_variance, noise_variance
from .levels import AnyLevel, NoiseLevel, as_text, level_of
from .timestep_lists import number_list


class StepNoise(NamedTuple):
    """The noise of a step, by the names of the arguments of ``ddim_coefficients``.

    Attributes:
        variance: of the noise that is added, std_dev^2.
        prev_eps: the coefficient of eps; None for sqrt(sigma_prev^2 - variance), which keeps the
            marginals.
    """

    variance: float
    prev_eps: float | None = None


@dataclass(frozen=True)
class EtaScale:
    """One meaning of eta.

    Attributes:
        noise: ``noise(level_t, level_prev, eta)``: the noise of a step.
        largest: ``largest(level_t, level_prev)``: the eta at which the step has no room for more.
        keeps_marginals: whether the step does, at any eta.
        of: what eta is a part or a level of, in words that follow its number.
        paper_eta: the eta of equation 16 that adds the same noise; None where there is none for all
            steps.
    """

    noise: Callable[[AnyLevel, AnyLevel, float], StepNoise]
    largest: Callable[[AnyLevel, AnyLevel], float]
    keeps_marginals: bool
    of: str
    paper_eta: Callable[[float], float] | None = None


def _scaled_std_dev(level_t: AnyLevel, level_prev: AnyLevel, eta: float) -> StepNoise:
    """Scale the standard deviation of DDPM's noise: equation 16 of arXiv 2010.02502."""
    return StepNoise(ddim_variance(level_t, level_prev, eta))


def _scaled_variance(level_t: AnyLevel, level_prev: AnyLevel, eta: float) -> StepNoise:
    """Scale the variance of DDPM's noise, as lecture notes and azula do."""
    return StepNoise(ddpm_variance(level_t, level_prev) * eta)


def _room(level_t: AnyLevel, level_prev: AnyLevel) -> float:
    """Return how many times the variance of DDPM's noise fits into that of x_prev."""
    variance = ddpm_variance(level_t, level_prev)
    return noise_variance(level_prev) / variance if variance else math.inf


def cps_noise(level_t: AnyLevel, level_prev: AnyLevel, eta: float) -> StepNoise:
    """Return the noise of Coefficients-Preserving Sampling (Wang and Yu 2025, arXiv 2509.05952)::

        std_dev  = sigma_prev sin(eta pi / 2)
        prev_eps = sigma_prev cos(eta pi / 2)

    A share of the noise of x_prev that is the same in each step, whatever its length: DDIM with
    another variance.

    Args:
        eta: the paper's noise level, in [0, 1]. 1 replaces all noise, so that x_prev depends on x0
            alone.
    """
    return StepNoise(noise_variance(level_prev) * math.sin(eta * math.pi / 2) ** 2)


def flow_grpo_noise(level_t: AnyLevel, level_prev: AnyLevel, eta: float) -> StepNoise:
    """Return the noise of a step of Flow-GRPO (Liu et al. 2025, arXiv 2505.05470): Euler-Maruyama's
    step of the reverse SDE of flow matching with the diffusion s_t. On the straight path, where
    alpha = 1 - sigma, with dt = sigma_prev - sigma_t, which is negative::

        s_t      = eta sqrt(sigma_t / (1 - sigma_t))
        std_dev  = s_t sqrt(-dt)
        prev_eps = sigma_prev + s_t^2 dt / (2 sigma_t)

    At pure noise, where s_t would be infinite, 1 - sigma_prev takes the place of 1 - sigma_t: the
    paper's code has 1 - sigma of the run's second level there, which is the same. The noise is
    right to first order in dt alone: x_prev holds more than its level says, by s_t^2 dt^2 / sigma_t
    + (s_t^2 dt / (2 sigma_t))^2 in its variance.

    Any other path is the straight one times a scale (``as_flow``): x / (alpha + sigma) is on it,
    at the time sigma / (alpha + sigma). This is its step there, scaled back.

    Args:
        eta: the paper's noise level a (its code's ``noise_level``, 0.7 by default).

    Raises:
        ValueError: the step leads towards more noise, starts at clean data, or stays at pure noise.
    """
    at_t, target = level_of(level_t), level_of(level_prev)
    finite = at_t if at_t.alpha > 0 else target
    if at_t.sigma == 0 or finite.alpha == 0 or target.is_noisier_than(at_t):
        raise ValueError(
            f"Flow-GRPO's step leads from noise to less noise, got one from {as_text(level_t)} to {as_text(level_prev)}: "
            "leave that timestep out, or use another eta_scales"
        )
    (_, noisy), scale = _flow_shares(at_t), target.alpha + target.sigma
    dt = _flow_shares(target)[1] - noisy
    diffusion = eta * eta * noisy / _flow_shares(finite)[0]  # s_t^2
    return StepNoise(scale * scale * diffusion * -dt, target.sigma + scale * diffusion * dt / (2 * noisy))


def flow_grpo_diffusion(level_t: AnyLevel, level_prev: AnyLevel, eta: float) -> float:
    """Return s_t of ``flow_grpo_noise``, the diffusion, for a step on the straight path that does not
    stay where it is. (Times sqrt(-dt) it is the standard deviation of the step's noise.)"""
    dt = level_of(level_prev).sigma - level_of(level_t).sigma
    return math.sqrt(flow_grpo_noise(level_t, level_prev, eta).variance / -dt)


def _flow_shares(level: NoiseLevel) -> tuple[float, float]:
    """Return (1 - sigma, sigma) of the level on the straight path with the same signal-to-noise
    ratio."""
    total = level.alpha + level.sigma
    return level.alpha / total, level.sigma / total


def _largest_flow_grpo(level_t: AnyLevel, level_prev: AnyLevel) -> float:
    """Return the eta at which nothing of the predicted noise is kept. Beyond it, the step turns the
    noise around."""
    target = level_of(level_prev).sigma
    removed = target - (flow_grpo_noise(level_t, level_prev, 1.0).prev_eps or 0.0)
    return math.sqrt(target / removed) if removed else math.inf


ETA_SCALES: dict[str, EtaScale] = {
    "std_dev": EtaScale(
        _scaled_std_dev,
        lambda level_t, level_prev: math.sqrt(_room(level_t, level_prev)),
        True,
        "of the standard deviation",
        lambda eta: eta,
    ),
    "variance": EtaScale(
        _scaled_variance,
        lambda level_t, level_prev: _room(level_t, level_prev),
        True,
        "of the variance",
        math.sqrt,
    ),
    "flow_grpo": EtaScale(
        flow_grpo_noise,
        _largest_flow_grpo,
        False,
        "of Flow-GRPO",
    ),
    "cps": EtaScale(
        cps_noise,
        lambda level_t, level_prev: 1.0,
        True,
        "of coefficients-preserving sampling",
    ),
}
"""What eta means, by name."""

PAPER: Final = "std_dev"
"""The convention of the DDIM paper, and the default."""
OF_EQUATION_16 = tuple(name for name, scale in ETA_SCALES.items() if scale.paper_eta is not None)
"""The conventions whose noise is that of equation 16, at some eta."""


def step_noise(eta_scales: str, level_t: AnyLevel, level_prev: AnyLevel, eta: float) -> StepNoise:
    """Return the noise of a step of a run. Clean data stays clean: a step that leads to it adds
    none, in any convention."""
    if eta == 0 or noise_variance(level_prev) == 0:
        return StepNoise(0.0)
    return ETA_SCALES[eta_scales].noise(level_t, level_prev, eta)


def largest_eta(eta_scales: str, level_t: AnyLevel, level_prev: AnyLevel) -> float:
    """Return the eta at which a step of a run has no room for more noise."""
    if noise_variance(level_prev) == 0:
        return math.inf
    return ETA_SCALES[eta_scales].largest(level_t, level_prev)


def told_apart(eta_scales: str, eta: float) -> tuple[str, float]:
    """Return the convention and eta by which noise is told from other noise: the paper's where its
    equation 16 says the same."""
    of_paper = ETA_SCALES[eta_scales].paper_eta
    if eta <= 0:
        return PAPER, eta
    return (eta_scales, eta) if of_paper is None else (PAPER, of_paper(eta))


def explicit_eta(eta: Any, num_inference_steps: int) -> float | tuple[float, ...]:
    """Return eta as a plan holds it: one number, or one for each step where they differ.

    Args:
        eta: a number, or a list, array or tensor of S = ``num_inference_steps`` numbers.

    Raises:
        TypeError: it is a list of something else.
        ValueError: a number is negative or not finite, or there are not S.
    """
    is_list = isinstance(eta, Sequence) or (hasattr(eta, "tolist") and np.ndim(eta) > 0)
    if isinstance(eta, (str, bytes)) or not is_list:
        check_eta(eta)
        return eta  # type: ignore[no-any-return]  # checked: a number
    etas = number_list("eta", eta)
    for index, value in enumerate(etas):
        check_eta(value, f"eta[{index}]")
    if len(etas) != num_inference_steps:
        refuse(
            f"eta must be one number, or one for each of the {num_inference_steps} steps",
            etas,
            "0 for a step without noise",
        )
    return etas[0] if len(set(etas)) == 1 else etas
