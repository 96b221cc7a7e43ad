"""Noise paths in continuous time, in float64, written from the papers alone: the levels, the times
of a run, and what a model is told. Like ``oracle``, this imports nothing else of ddim_fast.

Sources: flow matching, arXiv 2210.02747, with the shift of arXiv 2403.03206, equation 23; EDM, arXiv
2206.00364, table 1 and equation 5; the variance exploding and preserving SDEs, arXiv 2011.13456,
equations 30 to 33; the cosine path, arXiv 2301.11093 and 2410.11081.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from .oracle import NoiseLevel


def _same(t: float) -> float:
    return t


def _one(t: float) -> float:
    return 1.0


@dataclass(frozen=True)
class Path:
    """A path x_t = alpha x0 + sigma eps for real times t, from noise to clean data at 0.

    Attributes:
        first: the noisiest time, where a run starts.
        level: the level at a time.
        times: the N times of a run, decreasing from ``first``; the step after the last goes to 0.
        prediction_type: what models on this path predict.
        told: what the model is told at a time.
        time_told: its inverse.
        input_scale: what x_t is multiplied by before the model sees it, at a time.
        starts_at_unit_scale: whether a run starts from N(0, 1), not from N(0, sigma^2).
        sigma_data: of the prediction type "edm".
    """

    first: float
    level: Callable[[float], NoiseLevel]
    times: Callable[[int], list[float]]
    prediction_type: str
    told: Callable[[float], float] = _same
    time_told: Callable[[float], float] = _same
    input_scale: Callable[[float], float] = _one
    starts_at_unit_scale: bool = False
    sigma_data: float = 0.5


def _uniform(count: int) -> list[float]:
    return [1 - i / count for i in range(count)]


def _flow(shift: float = 1.0, time_scale: float = 1.0) -> Path:
    return Path(
        1.0,
        lambda t: NoiseLevel(1 - t, t),
        lambda count: [shift * u / (1 + (shift - 1) * u) for u in _uniform(count)],
        "flow",
        lambda t: time_scale * t,
        lambda told: told / time_scale,
    )


def _edm(
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    sigma_data: float = 0.5,
    preconditioned: bool = False,
) -> Path:
    def times(count: int) -> list[float]:
        high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
        return [(high + i / max(count - 1, 1) * (low - high)) ** rho for i in range(count)]

    return Path(
        sigma_max,
        lambda t: NoiseLevel(1.0, t),
        times,
        "sample" if preconditioned else "edm",
        _same if preconditioned else lambda t: math.log(t) / 4,
        _same if preconditioned else lambda told: math.exp(4 * told),
        _one if preconditioned else lambda t: 1 / math.sqrt(t**2 + sigma_data**2),
        sigma_data=sigma_data,
    )


def _ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Path:
    def times(count: int) -> list[float]:
        return [sigma_max * (sigma_min / sigma_max) ** (i / max(count - 1, 1)) for i in range(count)]

    return Path(sigma_max, lambda t: NoiseLevel(1.0, t), times, "score")


def _vp(beta_min: float = 0.1, beta_max: float = 20.0, time_scale: float = 1.0) -> Path:
    def level(t: float) -> NoiseLevel:
        integral = beta_min * t + (beta_max - beta_min) * t**2 / 2
        return NoiseLevel(math.exp(-integral / 2), math.sqrt(-math.expm1(-integral)))

    scaled, unscaled = (lambda t: time_scale * t), (lambda told: told / time_scale)
    return Path(1.0, level, _uniform, "epsilon", scaled, unscaled, starts_at_unit_scale=True)


def _trigonometric(shift: float = 1.0, time_scale: float = 1.0) -> Path:
    def level(t: float) -> NoiseLevel:
        if t == 1:
            return NoiseLevel(0.0, 1.0)
        ratio = shift * math.tan(math.pi / 2 * t)  # sigma / alpha
        return NoiseLevel(1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio))

    scaled, unscaled = (lambda t: time_scale * t), (lambda told: told / time_scale)
    return Path(1.0, level, _uniform, "v_prediction", scaled, unscaled, starts_at_unit_scale=True)


PATHS: dict[str, Callable[..., Path]] = {
    "flow": _flow,
    "edm": _edm,
    "ve": _ve,
    "vp": _vp,
    "trigonometric": _trigonometric,
}
"""Continuous paths by name; each takes its parameters, in the paper's words where it has some."""


@lru_cache
def path_of(text: str) -> Path | None:
    """Return the path that a schedule's name says, "flow?shift=3" with its parameters; None for the
    schedules of discrete timesteps."""
    name, _, query = text.partition("?")
    if name not in PATHS:
        return None
    return PATHS[name](**{k: json.loads(v) for k, _, v in (pair.partition("=") for pair in query.split("&") if pair)})


__all__ = ["PATHS", "Path", "path_of"]
