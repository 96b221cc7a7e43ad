"""The DDIM step in float64 NumPy, written from the papers alone: nothing here comes from the rest of ddim_fast, so that nothing is
shared but the truth.

``textbook_step`` has one formula per prediction type. ``row_step`` evaluates any row of coefficients, and says beside each result
how large the terms were that make it up: the scale that rounding errors are measured in (see ``tolerances``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# --- Correctly rounded results ----------------------------------------------------------------------------------------


def round_to_float32(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(x, np.float64).astype(np.float32).astype(np.float64)


def round_to_float16(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(x, np.float64).astype(np.float16).astype(np.float64)


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even on the bits, through a float32 whose last bit is set where it is not exact (round to odd)."""
    x = np.atleast_1d(np.asarray(x, np.float64))
    with np.errstate(over="ignore", under="ignore"):
        single = x.astype(np.float32)
    too_far = np.abs(single.astype(np.float64)) > np.abs(x)
    bits = single.view(np.uint32) - too_far.astype(
        np.uint32
    )  # now truncated towards zero (infinity becomes the largest number)
    bits = np.where(np.isinf(x), single.view(np.uint32), bits).astype(np.uint32)
    bits |= (bits.view(np.float32).astype(np.float64) != x) & ~np.isnan(x)
    upper = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    result = upper.astype(np.uint32).view(np.float32).astype(np.float64)
    return np.where(np.isnan(x), np.nan, result)


# --- Noise schedules and timesteps --------------------------------------------------------------------------------------


def alphas_cumprod(schedule: str = "linear", num_train_timesteps: int = 1000) -> np.ndarray:
    """Cumulative products of 1 - beta: DDPM's linear schedule, Stable Diffusion's, or the cosine one (equation 17 of arXiv 2102.09672)."""
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
    """Algorithm 1 of arXiv 2305.08891: sqrt(alpha_bar) shifted and scaled so that the last is 0 and the first stays."""
    root = np.sqrt(alpha_bars)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def timesteps(spacing: str, count: int, total: int) -> list[int]:
    """Table 2 of arXiv 2305.08891, for counts that divide the timesteps: what every convention of rounding agrees on."""
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


def std_dev(alpha_bar_t: float, alpha_bar_prev: float, eta: float, eta_scales: str = "std_dev") -> float:
    """Equation 16 of arXiv 2010.02502 ("std_dev"), or the same with the variance, not the standard deviation, scaled by eta."""
    if eta == 0 or alpha_bar_prev == 1:
        return 0.0
    if eta_scales == "variance":
        return math.sqrt(eta * (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev))
    return eta * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t)) * math.sqrt(1 - alpha_bar_t / alpha_bar_prev)


def guide(cond: np.ndarray, uncond: np.ndarray, scale: float) -> np.ndarray:
    """Classifier-free guidance as most code writes it: (1 - w) * uncond + w * cond."""
    return (1 - scale) * uncond + scale * cond


def per_sample(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float64).reshape(-1, *[1] * (like.ndim - 1))


def split(kind, x_t, m, alpha_bar_t):
    """(x0, eps) that the model's output m means."""
    signal, spread = math.sqrt(alpha_bar_t), math.sqrt(1 - alpha_bar_t)
    if kind == "epsilon":
        return (x_t - spread * m) / signal, m
    if kind == "sample":
        return m, (x_t - signal * m) / spread
    return signal * x_t - spread * m, spread * x_t + signal * m


def textbook_step(
    prediction_type: str,
    x_t: np.ndarray,
    model_output: np.ndarray,
    alpha_bar_t: float,
    alpha_bar_prev: float,
    *,
    eta: float = 0.0,
    eta_scales: str = "std_dev",
    noise: np.ndarray | None = None,
    clip: float = math.inf,
    use_clipped_model_output: bool = False,
    thresholds: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(x_prev, x0): equation 12, from what each prediction type means."""
    signal, spread = math.sqrt(alpha_bar_t), math.sqrt(1 - alpha_bar_t)
    if prediction_type == "epsilon":
        eps = model_output
        x0 = (x_t - spread * eps) / signal
    elif prediction_type == "sample":
        x0 = model_output
        eps = (x_t - signal * x0) / spread
    elif prediction_type == "v_prediction":
        x0 = signal * x_t - spread * model_output
        eps = signal * model_output + spread * x_t
    else:
        raise ValueError(prediction_type)
    if thresholds is not None:  # Imagen, arXiv 2205.11487: clip to [-s, s], then divide by s
        s = per_sample(thresholds, x_t)
        x0 = np.minimum(np.maximum(x0, -s), s) / s * clip
    elif clip != math.inf:
        x0 = np.minimum(np.maximum(x0, -clip), clip)
    if use_clipped_model_output:
        eps = (x_t - signal * x0) / spread
    std_dev_t = std_dev(alpha_bar_t, alpha_bar_prev, eta, eta_scales)
    x_prev = math.sqrt(alpha_bar_prev) * x0 + math.sqrt(max(1 - alpha_bar_prev - std_dev_t * std_dev_t, 0.0)) * eps
    return (x_prev if std_dev_t == 0 else x_prev + std_dev_t * noise), x0


def textbook_row(
    prediction_type: str,
    alpha_bar_t: float,
    alpha_bar_prev: float,
    *,
    eta: float = 0.0,
    eta_scales: str = "std_dev",
    clip: float = math.inf,
    use_clipped_model_output: bool = False,
) -> dict[str, float]:
    """The same step as the columns of a row of coefficients."""
    signal, spread = math.sqrt(alpha_bar_t), math.sqrt(1 - alpha_bar_t)
    x0_x, x0_m, eps_x, eps_m = {
        "epsilon": lambda: (1 / signal, -spread / signal, 0.0, 1.0),
        "sample": lambda: (0.0, 1.0, 1 / spread, -signal / spread),
        "v_prediction": lambda: (signal, -spread, spread, signal),
    }[prediction_type]()
    eps_0 = 0.0
    if use_clipped_model_output:
        eps_x, eps_m, eps_0 = 1 / spread, 0.0, -signal / spread
    std_dev_t = std_dev(alpha_bar_t, alpha_bar_prev, eta, eta_scales)
    return {
        "x0_x": x0_x,
        "x0_m": x0_m,
        "eps_x": eps_x,
        "eps_m": eps_m,
        "eps_0": eps_0,
        "prev_x0": math.sqrt(alpha_bar_prev),
        "prev_eps": math.sqrt(max(1 - alpha_bar_prev - std_dev_t * std_dev_t, 0.0)),
        "prev_noise": std_dev_t,
        "clip": clip,
        "known_x0": math.sqrt(alpha_bar_prev),
        "known_noise": math.sqrt(1 - alpha_bar_prev),
    }


def ddpm_posterior(alpha_bar_t: float, alpha_bar_s: float) -> tuple[float, float, float]:
    """(a, b, variance) of q(x_s | x_t, x0) = N(a x0 + b x_t, variance): equations 6 and 7 of arXiv 2006.11239 with the beta_t of
    the pair, for any two noise levels of a Markov chain."""
    beta_t = 1 - alpha_bar_t / alpha_bar_s
    alpha_t = 1 - beta_t
    of_x0 = math.sqrt(alpha_bar_s) * beta_t / (1 - alpha_bar_t)
    of_x_t = math.sqrt(alpha_t) * (1 - alpha_bar_s) / (1 - alpha_bar_t)
    return of_x0, of_x_t, (1 - alpha_bar_s) / (1 - alpha_bar_t) * beta_t


# --- Any row ----------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """Results in float64, and beside each the sum of the magnitudes of its terms.

    ``terms`` counts a step without clipping as the two or three terms that it folds to; ``long_terms`` never folds.
    """

    x_prev: np.ndarray
    terms: np.ndarray
    long_terms: np.ndarray
    x0: np.ndarray
    x0_terms: np.ndarray


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
) -> Result:
    c, clip = row, row.get("clip", math.inf)
    x, m = np.asarray(x_t, np.float64), np.asarray(model_output, np.float64)
    m_size = np.abs(m)
    if uncond is not None:
        uncond = np.asarray(uncond, np.float64)
        m, m_size = uncond + guidance * (m - uncond), np.abs(uncond) + abs(guidance) * (np.abs(m) + np.abs(uncond))
    z = np.zeros_like(x) if noise is None or c["prev_noise"] == 0 else np.asarray(noise, np.float64)
    past = np.zeros_like(x)
    if c.get("prev_history", 0.0) != 0:
        past = c["prev_history"] * np.asarray(history, np.float64)
    x_size, added_size = np.abs(x), np.abs(c["prev_noise"] * z) + np.abs(past)

    x0 = c["x0_x"] * x + c["x0_m"] * m
    x0_terms = abs(c["x0_x"]) * x_size + abs(c["x0_m"]) * m_size
    if clip != math.inf:
        scale = clip / per_sample(thresholds, x) if thresholds is not None else 1.0
        x0, x0_terms = x0 * scale, x0_terms * scale
        # Well outside the bound nothing is left of x0's own rounding errors.
        x0_terms = np.where(np.abs(x0) > clip + 1e-5 * x0_terms, clip, x0_terms)
        x0 = np.minimum(np.maximum(x0, -clip), clip)
    eps = c["eps_x"] * x + c["eps_m"] * m + c["eps_0"] * x0
    eps_terms = abs(c["eps_x"]) * x_size + abs(c["eps_m"]) * m_size + abs(c["eps_0"]) * x0_terms
    x_prev = c["prev_x0"] * x0 + c["prev_eps"] * eps + past + c["prev_noise"] * z
    long_terms = abs(c["prev_x0"]) * x0_terms + abs(c["prev_eps"]) * eps_terms + added_size
    terms = long_terms
    if clip == math.inf:
        total = c["prev_x0"] + c["prev_eps"] * c["eps_0"]
        fold_x = total * c["x0_x"] + c["prev_eps"] * c["eps_x"]
        fold_m = total * c["x0_m"] + c["prev_eps"] * c["eps_m"]
        terms = abs(fold_x) * x_size + abs(fold_m) * m_size + added_size
    if mask is not None:
        # The known picture at the noise level of x_prev (equation 4 of the paper), blended in.
        mask, known = np.asarray(mask, np.float64), c["known_x0"] * np.asarray(known_x0, np.float64)
        known_terms = np.abs(known)
        if c["known_noise"] != 0:
            noise_part = c["known_noise"] * np.asarray(
                known_noise, np.float64
            )  # never in the float32 of the noise standard
            known, known_terms = known + noise_part, known_terms + np.abs(noise_part)
        x_prev = mask * known + (1 - mask) * x_prev
        terms, long_terms = (np.abs(mask) * known_terms + (1 + np.abs(mask)) * t for t in (terms, long_terms))
    return Result(x_prev, terms, long_terms, x0, x0_terms)
