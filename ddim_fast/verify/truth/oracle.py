"""The DDIM step in float64 NumPy, written from the papers alone. It imports nothing else of
ddim_fast, so that it cannot share an error with the code that it judges.

``textbook_step`` has one formula for each prediction type. ``row_step`` evaluates any row of
coefficients, and returns with each result the sum of the magnitudes of its terms: the scale of its
rounding errors (see ``tolerances``).

A noise level is a number, the alpha_bar of the papers' variance-preserving path, or on any other
path the pair (alpha, sigma): x_t = alpha x0 + sigma eps. ``paths`` has those paths.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

_Function = TypeVar("_Function", bound=Callable[..., Any])
_OLD_KEYWORDS = {"convention": "eta_scales", "rederive": "use_clipped_model_output"}


def _with_old_keywords(function: _Function) -> _Function:
    """Accept the names that two keywords had in ddim_fast 0.1, with a warning. To be removed in
    0.3."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        for old in _OLD_KEYWORDS.keys() & options.keys():
            new = _OLD_KEYWORDS[old]
            warnings.warn(
                f"{function.__name__}({old}=...) ends with ddim_fast 0.3: call it {new}",
                DeprecationWarning,
                stacklevel=2,
            )
            options[new] = options.pop(old)
        return function(*args, **options)

    return cast(_Function, call)


# --- Correctly rounded results ----------------------------------------------------------------------------------------


def round_to_float32(x: np.ndarray) -> np.ndarray:
    """Return the nearest float32 of each element, as float64."""
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(x, np.float64).astype(np.float32).astype(np.float64)


def round_to_float16(x: np.ndarray) -> np.ndarray:
    """Return the nearest float16 of each element, as float64."""
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(x, np.float64).astype(np.float16).astype(np.float64)


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Return the nearest bfloat16 of each element, as float64.

    The bits are rounded to nearest even, from a float32 that is rounded to odd: its last bit is set
    where it is not exact.
    """
    x = np.atleast_1d(np.asarray(x, np.float64))
    with np.errstate(over="ignore", under="ignore"):
        single = x.astype(np.float32)
    too_far = np.abs(single.astype(np.float64)) > np.abs(x)
    # Truncate towards zero (infinity becomes the largest number).
    bits = single.view(np.uint32) - too_far.astype(np.uint32)
    bits = np.where(np.isinf(x), single.view(np.uint32), bits).astype(np.uint32)
    bits |= (bits.view(np.float32).astype(np.float64) != x) & ~np.isnan(x)
    upper = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    result = upper.astype(np.uint32).view(np.float32).astype(np.float64)
    return np.where(np.isnan(x), np.nan, result)


# --- Noise levels -------------------------------------------------------------------------------------------------------


class NoiseLevel(NamedTuple):
    """A level of a path that need not be variance preserving: x_t = alpha x0 + sigma eps."""

    alpha: float
    sigma: float


AnyLevel = float | NoiseLevel


def alpha_sigma(level: AnyLevel) -> NoiseLevel:
    """Return (alpha, sigma) of a level, or of the alpha_bar that stands for it."""
    if isinstance(level, NoiseLevel):
        return level
    return NoiseLevel(math.sqrt(level), math.sqrt(1 - level))


def alpha_bar(level: AnyLevel) -> float:
    """Return the alpha_bar at which the variance-preserving path has this level's signal-to-noise
    ratio."""
    return level.alpha**2 / (level.alpha**2 + level.sigma**2) if isinstance(level, NoiseLevel) else level


def edm_scales(level: AnyLevel, sigma_data: float) -> tuple[float, float]:
    """Return (c_skip / alpha, c_out) of EDM's preconditioning (table 1 of arXiv 2206.00364): the
    denoiser is c_skip x + c_out F, of x = x_t / alpha and the noise level sigma / alpha."""
    alpha, sigma = alpha_sigma(level)
    total = sigma**2 + (alpha * sigma_data) ** 2
    return alpha * sigma_data**2 / total, sigma * sigma_data / math.sqrt(total)


# --- Noise schedules and timesteps --------------------------------------------------------------------------------------


def alphas_cumprod(schedule: str = "linear", num_train_timesteps: int = 1000) -> np.ndarray:
    """Return the cumulative products of 1 - beta, float64, ``(num_train_timesteps,)``.

    Args:
        schedule: "linear" (DDPM's), "scaled_linear" (Stable Diffusion's) or "cosine" (equation 17
            of arXiv 2102.09672).
    """
    total = num_train_timesteps
    if schedule == "linear":
        betas = np.linspace(1e-4, 0.02, total)
    elif schedule == "scaled_linear":
        betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), total) ** 2
    elif schedule == "cosine":
        f = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    else:
        raise ValueError(schedule)
    return np.cumprod(1 - betas)


def zero_terminal_snr(alpha_bars: np.ndarray) -> np.ndarray:
    """Rescale a schedule to zero terminal SNR: algorithm 1 of arXiv 2305.08891.

    sqrt(alpha_bar) is shifted and scaled so that its last value is 0 and its first is unchanged.
    """
    root = np.sqrt(alpha_bars)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def timesteps(spacing: str, count: int, total: int) -> list[int]:
    """Return the timesteps of table 2 of arXiv 2305.08891, in decreasing order.

    Raises:
        ValueError: ``count`` does not divide the timesteps: implementations then round in different
            ways.
    """
    if total % count or (spacing == "linspace" and (total - 1) % max(count - 1, 1)):
        raise ValueError(f"{count} does not divide {total}")
    stride = total // count
    if spacing == "leading":
        return [i * stride for i in range(count)][::-1]
    if spacing == "trailing":
        return [total - 1 - i * stride for i in range(count)]
    if spacing == "linspace":
        return [i * (total - 1) // max(count - 1, 1) for i in range(count)][::-1]
    raise ValueError(spacing)


# --- The paper --------------------------------------------------------------------------------------------------------


@_with_old_keywords
def std_dev(alpha_bar_t: AnyLevel, alpha_bar_prev: AnyLevel, eta: float, eta_scales: str = "std_dev") -> float:
    """Return std_dev_t, the standard deviation of the noise that a step adds: equation 16 of arXiv
    2010.02502; between pairs sigma_s^2 (1 - (alpha_t sigma_s / (alpha_s sigma_t))^2) eta^2, its
    square without alpha^2 + sigma^2 = 1.

    Args:
        eta_scales: "std_dev", as in the paper, or "variance": eta multiplies the variance instead.
    """
    if isinstance(alpha_bar_t, NoiseLevel) or isinstance(alpha_bar_prev, NoiseLevel):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(alpha_bar_t), alpha_sigma(alpha_bar_prev)
        if eta == 0 or sigma_s == 0:
            return 0.0
        kept = alpha_t * sigma_s / (alpha_s * sigma_t)
        return (eta if eta_scales == "std_dev" else math.sqrt(eta)) * sigma_s * math.sqrt((1 - kept) * (1 + kept))
    if eta == 0 or alpha_bar_prev == 1:
        return 0.0
    if eta_scales == "variance":
        return math.sqrt(eta * (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev))
    return eta * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t)) * math.sqrt(1 - alpha_bar_t / alpha_bar_prev)


def _flow_grpo_noise(level_t: AnyLevel, level_prev: AnyLevel, noise_level: float) -> tuple[float, float]:
    """Return (std, coefficient of eps) of a step of Flow-GRPO, equation 9 of arXiv 2505.05470, on the
    straight path: x + (v + g (x + (1 - sigma) v)) dt + s sqrt(-dt) z, with s^2 = noise_level^2 sigma
    / (1 - sigma) and g = s^2 / (2 sigma).

    x + v dt is the straight path's point at sigma_prev, and x + (1 - sigma) v is eps. At sigma = 1 the
    paper's code divides by 1 - sigma of the next level.
    """
    (_, sigma), (_, sigma_prev) = alpha_sigma(level_t), alpha_sigma(level_prev)
    length = sigma - sigma_prev
    squared = noise_level**2 * sigma / (1 - (sigma_prev if sigma == 1 else sigma))
    return math.sqrt(squared * length), sigma_prev - squared / (2 * sigma) * length


def _cps_noise(level_t: AnyLevel, level_prev: AnyLevel, noise_level: float) -> tuple[float, float]:
    """Return the same of Coefficients-Preserving Sampling, equation 14 of arXiv 2509.05952: sines and
    cosines of the noise of x_prev."""
    sigma = alpha_sigma(level_prev).sigma
    return sigma * math.sin(noise_level * math.pi / 2), sigma * math.cos(noise_level * math.pi / 2)


OTHER_NOISE = {"flow_grpo": _flow_grpo_noise, "cps": _cps_noise}
"""By name: noise that is not eta times that of equation 16. ``textbook_row`` takes these names for
``eta_scales``, too."""


def guide(cond: np.ndarray, uncond: np.ndarray, scale: float) -> np.ndarray:
    """Return the guided model output as most code writes it: (1 - w) * uncond + w * cond."""
    return (1 - scale) * uncond + scale * cond


def per_sample(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Return one value for each sample, shaped to broadcast against ``like``, ``(B, C, ...)``."""
    return np.asarray(values, np.float64).reshape(-1, *[1] * (like.ndim - 1))


def split(
    prediction_type: str, x_t: Any, model_output: Any, alpha_bar_t: AnyLevel, sigma_data: float = 0.5
) -> tuple[Any, Any]:
    """Return the (x0, eps) that a model output stands for. Takes arrays, or tensors.

    Sources: "epsilon", equation 9 of arXiv 2010.02502; "v_prediction", section 2.4 of arXiv
    2202.00512, with m = alpha eps - sigma x0 on any path; "flow", m = eps - x0 of arXiv 2210.02747;
    "score", m = -eps / sigma of arXiv 2011.13456; "edm", the network F of arXiv 2206.00364,
    equation 7.

    Raises:
        ValueError: the prediction type is unknown.
    """
    signal, spread = alpha_sigma(alpha_bar_t)
    if prediction_type == "epsilon":
        return (x_t - spread * model_output) / signal, model_output
    if prediction_type == "sample":
        return model_output, (x_t - signal * model_output) / spread
    if prediction_type == "v_prediction":
        total = signal**2 + spread**2 if isinstance(alpha_bar_t, NoiseLevel) else 1.0
        return (signal * x_t - spread * model_output) / total, (signal * model_output + spread * x_t) / total
    if prediction_type == "flow":
        return (x_t - spread * model_output) / (signal + spread), (x_t + signal * model_output) / (signal + spread)
    if prediction_type == "score":
        return (x_t + spread**2 * model_output) / signal, -spread * model_output
    if prediction_type == "edm":
        of_x, of_network = edm_scales(alpha_bar_t, sigma_data)
        x0 = of_x * x_t + of_network * model_output
        return x0, (x_t - signal * x0) / spread
    raise ValueError(prediction_type)


def model_output(prediction_type: str, x0: Any, eps: Any, alpha_bar_t: AnyLevel, sigma_data: float = 0.5) -> Any:
    """Return the model output that stands for (x0, eps), the inverse of ``split``. Takes arrays, or
    tensors.

    Raises:
        ValueError: the prediction type is unknown.
    """
    signal, spread = alpha_sigma(alpha_bar_t)
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x0
    if prediction_type == "v_prediction":
        return signal * eps - spread * x0
    if prediction_type == "flow":
        return eps - x0
    if prediction_type == "score":
        return -eps / spread
    if prediction_type == "edm":
        of_x, of_network = edm_scales(alpha_bar_t, sigma_data)
        return (x0 - of_x * (signal * x0 + spread * eps)) / of_network
    raise ValueError(prediction_type)


@_with_old_keywords
def textbook_step(
    prediction_type: str,
    x_t: np.ndarray,
    model_output: np.ndarray,
    alpha_bar_t: AnyLevel,
    alpha_bar_prev: AnyLevel,
    *,
    eta: float = 0.0,
    eta_scales: str = "std_dev",
    sigma_data: float = 0.5,
    noise: np.ndarray | None = None,
    clip: float = math.inf,
    use_clipped_model_output: bool = False,
    thresholds: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (x_prev, x0) by equation 12 of arXiv 2010.02502.

    Args:
        x_t, model_output: float64, ``(B, C, ...)``.
        eta_scales: see ``std_dev``.
        sigma_data: of the prediction type "edm".
        noise: z, like ``x_t``. Needed where the step adds noise.
        clip: x0 is clipped to [-clip, clip].
        use_clipped_model_output: compute eps again from the clipped x0.
        thresholds: one s for each sample: x0 is clipped to [-s, s] and scaled by ``clip / s``
            (Imagen, arXiv 2205.11487).

    Raises:
        ValueError: the prediction type is unknown.
    """
    x0, eps = split(prediction_type, x_t, model_output, alpha_bar_t, sigma_data)
    if thresholds is not None:
        s = per_sample(thresholds, x_t)
        x0 = np.minimum(np.maximum(x0, -s), s) / s * clip
    elif clip != math.inf:
        x0 = np.minimum(np.maximum(x0, -clip), clip)
    if use_clipped_model_output:
        _, eps = split("sample", x_t, x0, alpha_bar_t)
    std_dev_t = std_dev(alpha_bar_t, alpha_bar_prev, eta, eta_scales)
    x_prev = alpha_sigma(alpha_bar_prev).alpha * x0 + _direction(alpha_bar_prev, std_dev_t) * eps
    if std_dev_t != 0:
        assert noise is not None, "a step that adds noise needs it"
        x_prev = x_prev + std_dev_t * noise
    return x_prev, x0


@_with_old_keywords
def textbook_row(
    prediction_type: str,
    alpha_bar_t: AnyLevel,
    alpha_bar_prev: AnyLevel,
    *,
    eta: float = 0.0,
    eta_scales: str = "std_dev",
    sigma_data: float = 0.5,
    clip: float = math.inf,
    use_clipped_model_output: bool = False,
) -> dict[str, float]:
    """Return the coefficients of the step of ``textbook_step``, by the names of a row's columns; with
    the noise of ``OTHER_NOISE``, too.

    Raises:
        KeyError: the prediction type is unknown.
    """
    signal, spread = alpha_sigma(alpha_bar_t)
    known_x0, known_noise = alpha_sigma(alpha_bar_prev)
    total = signal**2 + spread**2 if isinstance(alpha_bar_t, NoiseLevel) else 1.0
    both = signal + spread
    edm_x, edm_m = edm_scales(alpha_bar_t, sigma_data) if prediction_type == "edm" else (0.0, 0.0)
    x0_x, x0_m, eps_x, eps_m = {
        "epsilon": lambda: (1 / signal, -spread / signal, 0.0, 1.0),
        "sample": lambda: (0.0, 1.0, 1 / spread, -signal / spread),
        "v_prediction": lambda: (signal / total, -spread / total, spread / total, signal / total),
        "flow": lambda: (1 / both, -spread / both, 1 / both, signal / both),
        "score": lambda: (1 / signal, spread**2 / signal, 0.0, -spread),
        "edm": lambda: (edm_x, edm_m, (1 - signal * edm_x) / spread, -signal * edm_m / spread),
    }[prediction_type]()
    eps_0 = 0.0
    if use_clipped_model_output:
        eps_x, eps_m, eps_0 = 1 / spread, 0.0, -signal / spread
    if eta_scales in OTHER_NOISE:
        std_dev_t, direction = OTHER_NOISE[eta_scales](alpha_bar_t, alpha_bar_prev, eta)
    else:
        std_dev_t = std_dev(alpha_bar_t, alpha_bar_prev, eta, eta_scales)
        direction = _direction(alpha_bar_prev, std_dev_t)
    return {
        "x0_x": x0_x,
        "x0_m": x0_m,
        "eps_x": eps_x,
        "eps_m": eps_m,
        "eps_0": eps_0,
        "prev_x0": known_x0,
        "prev_eps": direction,
        "prev_noise": std_dev_t,
        "clip": clip,
        "known_x0": known_x0,
        "known_noise": known_noise,
    }


def _direction(level: AnyLevel, std_dev_t: float) -> float:
    """Return the coefficient of eps: what the noise of a step leaves of that of its target."""
    if isinstance(level, NoiseLevel):
        return math.sqrt(max((level.sigma - std_dev_t) * (level.sigma + std_dev_t), 0.0))
    return math.sqrt(max(1 - level - std_dev_t * std_dev_t, 0.0))


def ddpm_posterior(alpha_bar_t: AnyLevel, alpha_bar_s: AnyLevel) -> tuple[float, float, float]:
    """Return (a, b, variance) of q(x_s | x_t, x0) = N(a x0 + b x_t, variance), for any two noise
    levels of a Markov chain.

    Source: equations 6 and 7 of arXiv 2006.11239, with beta_t = 1 - alpha_bar_t / alpha_bar_s; on
    any path by Bayes' rule, from x_t = (alpha_t / alpha_s) x_s and noise of variance sigma_t^2 -
    (alpha_t sigma_s / alpha_s)^2.
    """
    if isinstance(alpha_bar_t, NoiseLevel) or isinstance(alpha_bar_s, NoiseLevel):
        (signal_t, sigma_t), (signal_s, sigma_s) = alpha_sigma(alpha_bar_t), alpha_sigma(alpha_bar_s)
        scale = signal_t / signal_s
        added = (sigma_t - scale * sigma_s) * (sigma_t + scale * sigma_s) / sigma_t**2
        return signal_s * added, scale * sigma_s**2 / sigma_t**2, sigma_s**2 * added
    beta_t = 1 - alpha_bar_t / alpha_bar_s
    alpha_t = 1 - beta_t
    of_x0 = math.sqrt(alpha_bar_s) * beta_t / (1 - alpha_bar_t)
    of_x_t = math.sqrt(alpha_t) * (1 - alpha_bar_s) / (1 - alpha_bar_t)
    return of_x0, of_x_t, (1 - alpha_bar_s) / (1 - alpha_bar_t) * beta_t


# --- Any row ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Result:
    """The results of a step in float64, each with the sum of the magnitudes of its terms.

    Attributes:
        x_prev, x0: the results, like ``x_t``.
        terms: of x_prev; a step without clipping counts as the two or three terms of its folded
            form (see ``fold``).
        long_terms: of x_prev, never folded.
        x0_terms: of x0.
    """

    x_prev: np.ndarray
    terms: np.ndarray
    long_terms: np.ndarray
    x0: np.ndarray
    x0_terms: np.ndarray


def fold(row: dict[str, float]) -> tuple[float, float]:
    """Return (a, b) of a step without clipping: x_prev = a x_t + b m, and what history and noise
    add."""
    of_x0 = row["prev_x0"] + row["prev_eps"] * row["eps_0"]
    return (
        of_x0 * row["x0_x"] + row["prev_eps"] * row["eps_x"],
        of_x0 * row["x0_m"] + row["prev_eps"] * row["eps_m"],
    )


def row_step(
    row: dict[str, float],
    x_t: np.ndarray,
    model_output: np.ndarray,
    *,
    uncond: np.ndarray | None = None,
    guidance: float | None = None,
    noise: np.ndarray | None = None,
    thresholds: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    known_x0: np.ndarray | None = None,
    known_noise: np.ndarray | None = None,
    history: np.ndarray | None = None,
    history_2: np.ndarray | None = None,
) -> Result:
    """Evaluate a row of coefficients in float64.

    Args:
        row: by column; "clip", "prev_history" and "prev_history_2" may be missing, "known_x0" and
            "known_noise" only without a mask.
        x_t, model_output, noise, history, history_2: ``(B, C, ...)``.
        uncond, guidance: the unconditional output, and the guidance scale w: m = uncond + w
            (model_output - uncond).
        thresholds: ``(B,)``, see ``textbook_step``.
        mask, known_x0, known_noise: where the mask is 1, x_prev is the known image at the noise
            level of x_prev.
    """
    c, clip = row, row.get("clip", math.inf)
    x, m = np.asarray(x_t, np.float64), np.asarray(model_output, np.float64)
    m_size = np.abs(m)
    if uncond is not None:
        assert guidance is not None
        uncond = np.asarray(uncond, np.float64)
        m, m_size = uncond + guidance * (m - uncond), np.abs(uncond) + abs(guidance) * (np.abs(m) + np.abs(uncond))
    z = np.zeros_like(x) if noise is None or c["prev_noise"] == 0 else np.asarray(noise, np.float64)
    past, past_size = np.zeros_like(x), np.zeros_like(x)
    for column, last_x0 in (("prev_history", history), ("prev_history_2", history_2)):
        if c.get(column, 0.0) != 0:
            term = c[column] * np.asarray(last_x0, np.float64)
            past, past_size = past + term, past_size + np.abs(term)
    x_size, added_size = np.abs(x), np.abs(c["prev_noise"] * z) + past_size

    x0 = c["x0_x"] * x + c["x0_m"] * m
    x0_terms = abs(c["x0_x"]) * x_size + abs(c["x0_m"]) * m_size
    if clip != math.inf:
        x0, x0_terms = _clipped(x0, x0_terms, clip, thresholds)
    eps = c["eps_x"] * x + c["eps_m"] * m + c["eps_0"] * x0
    eps_terms = abs(c["eps_x"]) * x_size + abs(c["eps_m"]) * m_size + abs(c["eps_0"]) * x0_terms
    x_prev = c["prev_x0"] * x0 + c["prev_eps"] * eps + past + c["prev_noise"] * z
    long_terms = abs(c["prev_x0"]) * x0_terms + abs(c["prev_eps"]) * eps_terms + added_size
    terms = long_terms
    if clip == math.inf:
        of_x, of_m = fold(row)
        terms = abs(of_x) * x_size + abs(of_m) * m_size + added_size
    result = Result(x_prev, terms, long_terms, x0, x0_terms)
    return result if mask is None else _with_known_region(result, row, mask, known_x0, known_noise)


def _clipped(
    x0: np.ndarray, terms: np.ndarray, clip: float, thresholds: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return x0 scaled and clipped to [-clip, clip], and its terms."""
    scale = clip / per_sample(thresholds, x0) if thresholds is not None else 1.0
    x0, terms = x0 * scale, terms * scale
    # Well outside the bound, nothing is left of x0's own rounding errors.
    terms = np.where(np.abs(x0) > clip + 1e-5 * terms, clip, terms)
    return np.minimum(np.maximum(x0, -clip), clip), terms


def _with_known_region(
    result: Result,
    row: dict[str, float],
    mask: np.ndarray,
    known_x0: np.ndarray | None,
    known_noise: np.ndarray | None,
) -> Result:
    """Blend the known image into x_prev, at the noise level of x_prev (equation 4 of arXiv
    2010.02502)."""
    mask, known = np.asarray(mask, np.float64), row["known_x0"] * np.asarray(known_x0, np.float64)
    known_terms = np.abs(known)
    if row["known_noise"] != 0:
        noise_part = row["known_noise"] * np.asarray(known_noise, np.float64)
        known, known_terms = known + noise_part, known_terms + np.abs(noise_part)
    x_prev = mask * known + (1 - mask) * result.x_prev
    terms, long_terms = (np.abs(mask) * known_terms + (1 + np.abs(mask)) * t for t in (result.terms, result.long_terms))
    return Result(x_prev, terms, long_terms, result.x0, result.x0_terms)
