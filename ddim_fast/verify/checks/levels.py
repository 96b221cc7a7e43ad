"""The noise schedule: alpha_bar of each timestep, and schedules that end in pure noise."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..truth import oracle
from ..truth.cases import Level, Setting, StepCase, shown_level
from .base import CheckFailedError, Context, check
from .judge import Verdict, judge
from .update import CLEAN_DATA, TOLERANCE, random_step

PURE_NOISE = 2.0**-23
"""The largest alpha_bar_T that counts as 0: some implementations use 2**-24 instead."""


def _eps(context: Context) -> float:
    return float(np.finfo(np.float64 if context.subject.arithmetic == "exact" else np.float32).eps)


# --- alpha_bar --------------------------------------------------------------------------------------------------------


@check(
    "alphas-cumprod",
    proves="The alpha_bar of every timestep is the cumulative product of 1 - beta, for every schedule that the subject takes; on "
    "another path, alpha and sigma are those of the time.",
    source="arXiv 2006.11239, section 2 and 4 (linear); arXiv 2112.10752 (scaled_linear); arXiv 2102.09672, equation 17 (cosine); "
    "other paths: see truth/paths.py",
    tolerance="one rounding of each beta, 1 - beta and product up to t, in float64 where the subject is exact, otherwise in float32",
    needs="step timesteps",
)
def alphas_cumprod(context: Context) -> None:
    for total in (1000, 4000) if context.full and context.offers("num_train_timesteps") else (1000,):
        for schedule in context.subject.schedules or (context.paths[0].schedule,):
            setting = context.setting(num_inference_steps=total, schedule=schedule, num_train_timesteps=total)
            if setting.path is None and not setting.divided:
                levels = [level for level in context.levels(setting) if math.isfinite(level.alpha_bar_t)]
                if context.subject.schedules:
                    _equal(context, setting, levels)
                else:
                    _plausible(context, levels)
    for setting in context.settings(num_inference_steps=50):
        if setting.path is not None or setting.divided:
            for level in context.levels(setting):
                _on_path(context, setting, level)


def _on_path(context: Context, setting: Setting, level: Level) -> None:
    """Check the pairs of a step against the path's."""
    for t, found in ((level.t, level.level_t), (level.t_prev, level.level_prev)):
        found, true = (
            oracle.alpha_sigma(found),
            oracle.alpha_sigma(CLEAN_DATA if t == setting.clean else setting.level_at(t)),
        )
        # 8 roundings, each of a number up to 1, or up to sigma; as many as timesteps where sigma comes from products.
        allowed = 8 * _eps(context) * (setting.num_train_timesteps if setting.divided else 1)
        share = max(abs(found.alpha - true.alpha), abs(found.sigma - true.sigma) / max(1.0, true.sigma)) / allowed
        context.measured(share)
        if not share <= 1:
            raise CheckFailedError(
                f"(alpha, sigma) at t = {t:g} must be {shown_level(true)} on the path {setting.schedule}, got {shown_level(found)}"
            )


def _equal(context: Context, setting: Setting, levels: list[Level]) -> None:
    true = setting.alphas_cumprod()
    alphas = true / np.concatenate([[1.0], true[:-1]])
    allowed = np.cumsum(2 + 4 * (1 - alphas) / alphas) * _eps(context)
    t = np.array([int(level.t) for level in levels])
    got = np.array([level.alpha_bar_t for level in levels])
    share = np.nan_to_num(np.abs(got / true[t] - 1) / allowed[t], nan=np.inf)
    worst = int(np.argmax(share))
    context.measured(float(share[worst]))
    if share[worst] > 1:
        first = int(np.max(np.flatnonzero(share > 1)))  # the smallest t: they decrease
        at, off = int(t[first]), np.abs(got - alphas[t]).max()
        hint = " It is alpha_t = 1 - beta_t, not their product." if off < 1e-4 else ""
        raise CheckFailedError(
            f"alpha_bar of t = {at} must be {true[at]:.9g} within a relative {allowed[at]:.2g} (schedule = {setting.schedule}, "
            f"{setting.num_train_timesteps} timesteps), got {got[first]:.9g}; of all, {int((share > 1).sum())} are wrong, most of all "
            f"that of t = {t[worst]}: {got[worst]:.9g} where it is {true[t[worst]]:.9g}.{hint}"
        )


def _plausible(context: Context, levels: list[Level]) -> None:
    """Check a schedule of the subject's own: alpha_bar grows from nearly 0 to nearly 1 towards
    clean data."""
    bars = np.array([level.alpha_bar_t for level in levels])
    right = bars.size and (np.diff(bars) > 0).all() and 0 <= bars[0] < 0.1 and 0.9 < bars[-1] <= 1
    context.measured(0.0)
    if not right:
        raise CheckFailedError(
            "alpha_bar must fall with t, from nearly 1 (data) to nearly 0 (noise, below 0.1), got "
            f"{bars[-1] if bars.size else math.nan:.6g} at the smallest t and {bars[0] if bars.size else math.nan:.6g} at the largest. "
            "Is it the cumulative product of 1 - beta?"
        )


# --- Zero terminal SNR ------------------------------------------------------------------------------------------------


@check(
    "zero-terminal-snr",
    proves="At zero terminal SNR, alpha_bar_T is 0, sampling starts there, and steps with v and x0 prediction are equation 12.",
    source="algorithm 1 and sections 3.1 to 3.3 of arXiv 2305.08891",
    tolerance=f"{TOLERANCE}; sqrt(alpha_bar) within T eps",
    needs="step timesteps zero_terminal_snr",
)
def zero_terminal_snr(context: Context) -> None:
    schedules = [name for name in context.subject.schedules if name != "cosine"]  # cosine nearly ends there already
    for schedule in schedules or ("linear",):
        setting = context.setting(
            num_inference_steps=5,
            timestep_spacing="trailing",
            schedule=schedule,
            zero_terminal_snr=True,
            prediction_type="sample",
        )
        if context.offers("sample"):
            _terminal(context, setting)
            if context.subject.schedules:
                _rescaled(context, setting)
    for setting in _settings(context):
        for index in (0, 1):
            judge(context, random_step(context, setting, index, (2, 3, 5)), _explain)


def _terminal(context: Context, setting: Setting) -> None:
    first, last_t = context.levels(setting)[0], setting.num_train_timesteps - 1
    if "trailing" in context.subject.spacings and first.t != last_t:
        raise CheckFailedError(f'a run with timestep_spacing = "trailing" must start at t = {last_t}, got {first.t:g}')
    if first.t == last_t and not 0 <= first.alpha_bar_t <= PURE_NOISE:
        raise CheckFailedError(f"alpha_bar of t = {last_t} must be 0 at zero terminal SNR, got {first.alpha_bar_t:.3g}")
    context.measured(0.0)


def _rescaled(context: Context, setting: Setting) -> None:
    total = setting.num_train_timesteps
    levels = context.levels(setting.but(num_inference_steps=total))
    true, allowed = np.sqrt(setting.alphas_cumprod()), total * _eps(context)
    for level in levels:
        off = (
            abs(math.sqrt(level.alpha_bar_t) - true[int(level.t)]) / allowed
            if math.isfinite(level.alpha_bar_t)
            else 0.0
        )
        context.measured(off)
        if not off <= 1:
            raise CheckFailedError(
                f"sqrt(alpha_bar) of t = {level.t:g} must be shifted and scaled to {true[int(level.t)]:.6g} at zero terminal SNR "
                f"(algorithm 1 of arXiv 2305.08891), got {math.sqrt(level.alpha_bar_t):.6g} (schedule = {setting.schedule})"
            )


def _settings(context: Context) -> Iterator[Setting]:
    for prediction_type in ("sample", "v_prediction"):
        if context.offers(prediction_type):
            for eta in (0.0, 0.5, 1.0) if context.offers("eta", "given_noise") else (0.0,):
                for count in (2, 10):
                    yield context.setting(
                        num_inference_steps=count,
                        timestep_spacing="trailing",
                        zero_terminal_snr=True,
                        prediction_type=prediction_type,
                        eta=eta,
                        schedule="linear",
                    )


def _explain(case: StepCase, found: Verdict) -> str:
    return f"At zero terminal SNR. {'' if math.isfinite(found.got) else negative_variance(case.setting)}".strip()


def negative_variance(setting: Setting) -> str:
    """Return the most frequent cause of NaN."""
    if setting.eta == 0:
        return "Is there a division by sqrt(alpha_bar_t) = 0?" if setting.zero_terminal_snr else ""
    return (
        "The room for eps, 1 - alpha_bar_prev - std_dev_t**2, is nearly 0 there, and rounding makes it negative: its square root is NaN "
        "unless it is clamped at 0."
    )
